"""What decoding defenses share that let proxies read along with the teacher."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from azeotrope.decoding import DecodingRow
from azeotrope.defenses.base import Defense, DefenseConfig
from azeotrope.proxies.companion import Companion, Forward
from azeotrope.proxies.prepared import PreparedProxy, ProxyPreparation, load_prepared
from azeotrope.proxies.progress import ReasoningWatch
from azeotrope.tokens import Boundary


class ProxiedConfig(DefenseConfig):
    """Settings of defenses that let proxies read along."""

    span: Literal["reasoning", "all"] = Field(
        default="reasoning", description="reasoning leaves the answer to the teacher alone"
    )
    preparation: ProxyPreparation = Field(default_factory=ProxyPreparation)
    prepared: tuple[str, ...] = Field(
        default=(), description="folders of prepared proxies; workflows fill it in"
    )
    boundary: Boundary | None = Field(
        default=None, description="null takes the experiment's, which workflows fill in"
    )


class ProxiedDecoding(Defense):
    """Changes the logits of rows that reason by what its proxies say after the same tokens.

    The proxies have the teacher's tokens. They are loaded at the first token, on the device of the
    logits, and are shared by all defenses of the process that name the same folders.
    """

    stage = "decoding"
    needs_proxies = True
    needs_direction = False
    """Whether proxies are prepared with the direction of their downstream loss."""
    config: ProxiedConfig

    def __init__(self, config: ProxiedConfig) -> None:
        super().__init__(config)
        self._readers: list[Companion] = []
        self._watch: ReasoningWatch | None = None

    @abstractmethod
    def forward(self, proxy: PreparedProxy) -> Forward:
        """What is asked of a proxy at every token: one number for each token of the vocabulary."""

    @abstractmethod
    def changed(
        self,
        logits: Float[Tensor, "rows vocab"],
        terms: Float[Tensor, "proxies rows tokens"],
        rows: Sequence[DecodingRow],
    ) -> Float[Tensor, "rows vocab"]:
        """The new logits, given what the proxies say. `logits` must not be changed in place."""

    def adjust_rows(
        self, logits: Float[Tensor, "rows vocab"], rows: Sequence[DecodingRow]
    ) -> Float[Tensor, "rows vocab"]:
        """Change the rows whose next token belongs to their reasoning.

        Raises:
            ValueError: if the proxies were not prepared, or changed since.
            FileNotFoundError: if a prepared proxy is missing.
        """
        if self.is_identity:
            return logits
        if not self._readers:
            self._open(logits.device)
        chosen = self._chosen(rows)
        if not chosen:
            return logits
        members = [rows[index] for index in chosen]
        terms = torch.stack([reader.outputs(members) for reader in self._readers])
        if len(chosen) == len(rows):
            return self.changed(logits, terms, members)
        adjusted = logits.clone()
        adjusted[chosen] = self.changed(logits[chosen], terms, members).to(logits.dtype)
        return adjusted

    def drop_rows(self, rows: Sequence[DecodingRow]) -> None:
        """Free the memory of rows that ended."""
        for reader in self._readers:
            reader.drop(rows)
        if self._watch is not None:
            self._watch.drop(rows)

    def _chosen(self, rows: Sequence[DecodingRow]) -> list[int]:
        watch = self._watch
        if watch is None or self.config.span == "all":
            return list(range(len(rows)))
        reasoning = [index for index, row in enumerate(rows) if watch.reasons(row)]
        if len(reasoning) < len(rows):
            # Rows never reason again after their answer began, so no proxy need read on.
            answering = [row for row in rows if not watch.reasons(row)]
            for reader in self._readers:
                reader.drop(answering)
        return reasoning

    def _open(self, device: torch.device) -> None:
        if not self.config.prepared:
            name = self.config.name
            raise ValueError(
                f"{name} has no prepared proxies; run it through `azeotrope pipeline` or "
                "`azeotrope defend`, or name folders that azeotrope.proxies.prepared.prepare made"
            )
        for folder in self.config.prepared:
            proxy = load_prepared(folder, str(device))
            pad = int(proxy.loaded.tokenizer.pad_token_id)  # type: ignore[arg-type]
            self._readers.append(Companion(self.forward(proxy), pad_id=pad, device=device))
            boundary = self.config.boundary or Boundary()
            self._watch = ReasoningWatch(proxy.loaded.tokenizer, boundary)
