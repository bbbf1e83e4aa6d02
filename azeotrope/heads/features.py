"""Hidden states of a frozen trunk: computed once, stored, read by every training step after.

A head defense never changes the trunk, so the last hidden states of teacher and proxies at the
positions that predict a completion token are all it needs. They are stored in the dtype the model
computes in (float32, or bfloat16 for a bfloat16 model), so reading them back loses nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from azeotrope.heads.chunked import hidden_states
from azeotrope.tokens import Batch, Example, collate
from azeotrope.traces import write_parquet

_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("targets", pa.list_(pa.int32())),
        ("reasoning", pa.list_(pa.bool_())),
        ("answer", pa.list_(pa.bool_())),
        ("hidden", pa.large_binary()),
        ("dtype", pa.string()),
        ("width", pa.int32()),
        ("own", pa.bool_()),
    ]
)
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Features:
    """One trace as a head sees it: index t of everything speaks of the same predicted token."""

    id: str
    targets: Int[Tensor, " tokens"]
    reasoning: Bool[Tensor, " tokens"]
    answer: Bool[Tensor, " tokens"]
    hidden: Float[Tensor, "rows hidden"]
    """One row a completion token; or, taken before a block, one row a token of the whole text."""
    own: bool = True
    """Written by the teacher itself, and not a text from elsewhere that it was asked about."""


@dataclass(frozen=True)
class FeatureBatch:
    """Several traces end to end: the teacher's hidden states and those of every proxy.

    `counts` are completion tokens a trace, `rows` each proxy's rows a trace, and `own` says for
    each trace whether the teacher wrote it.
    """

    ids: tuple[str, ...]
    targets: Int[Tensor, " tokens"]
    reasoning: Bool[Tensor, " tokens"]
    teacher: Float[Tensor, "tokens hidden"]
    proxies: tuple[Tensor, ...]
    counts: tuple[int, ...] = ()
    rows: tuple[tuple[int, ...], ...] = ()
    own: tuple[bool, ...] = ()

    def to(self, device: torch.device | str) -> "FeatureBatch":
        return FeatureBatch(
            self.ids,
            self.targets.to(device),
            self.reasoning.to(device),
            self.teacher.to(device),
            tuple(hidden.to(device) for hidden in self.proxies),
            self.counts,
            self.rows,
            self.own,
        )

    def only(self, *, own: bool) -> "FeatureBatch":
        """The traces that the teacher wrote, or the others."""
        chosen = [index for index, flag in enumerate(self.own) if flag == own]

        def pick(values: Tensor, sizes: tuple[int, ...]) -> Tensor:
            parts = values.split(list(sizes))
            return torch.cat([values[:0], *(parts[index] for index in chosen)])

        return FeatureBatch(
            tuple(self.ids[index] for index in chosen),
            pick(self.targets, self.counts),
            pick(self.reasoning, self.counts),
            pick(self.teacher, self.counts),
            tuple(pick(h, sizes) for h, sizes in zip(self.proxies, self.rows, strict=True)),
            tuple(self.counts[index] for index in chosen),
            tuple(tuple(sizes[index] for index in chosen) for sizes in self.rows),
            tuple(self.own[index] for index in chosen),
        )


@dataclass(frozen=True)
class FeaturePair:
    """One trace's features from the teacher and from each proxy."""

    teacher: Features
    proxies: tuple[Features, ...]


@torch.inference_mode()
def compute(
    model: PreTrainedModel,
    examples: Sequence[Example],
    *,
    to_model: Int[Tensor, " vocab"] | None = None,
    before_block: int | None = None,
    batch_size: int = 16,
    own: bool = True,
) -> list[Features]:
    """Run the trunk over examples.

    Args:
        to_model: this model's id for each of the ids in `examples`, for a proxy that reads the
            teacher's tokens. Targets stay the teacher's.
        before_block: take the states that enter this block, at every token of the text, and not
            the last ones where a completion token is predicted.
        own: recorded in the features: the model wrote these texts itself.
    """
    found: list[Features] = []
    for start in range(0, len(examples), batch_size):
        chosen = examples[start : start + batch_size]
        batch = collate(chosen, pad_id=0)
        inputs = batch if to_model is None else _translate(batch, to_model)
        if before_block is None:
            hidden = hidden_states(model, inputs.to(model.device)).cpu()
            parts = hidden.split(batch.mask.sum(1).tolist())
        else:
            entering = block_inputs(model, inputs.input_ids.to(model.device), before_block).cpu()
            parts = [row[: len(e) - 1] for row, e in zip(entering, chosen, strict=True)]
        for row, states in enumerate(parts):
            keep = batch.mask[row]
            found.append(
                Features(
                    batch.ids[row],
                    batch.targets[row][keep],
                    batch.reasoning[row][keep],
                    batch.answer[row][keep],
                    states.clone(),
                    own,
                )
            )
    return found


def block_inputs(
    model: PreTrainedModel, input_ids: Int[Tensor, "batch time"], block: int
) -> Float[Tensor, "batch time hidden"]:
    """What enters a block of the trunk; the blocks from there on are not run.

    Raises:
        ValueError: if the trunk keeps its blocks elsewhere than in `layers`.
    """
    blocks = blocks_of(model)
    if block >= len(blocks):
        return model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state
    caught: list[Tensor] = []

    def catch(_: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        caught.append(arguments[0] if arguments else named["hidden_states"])
        raise _ReachedError

    handle = blocks[block].register_forward_pre_hook(catch, with_kwargs=True)
    try:
        model.base_model(input_ids=input_ids, use_cache=False)
    except _ReachedError:
        pass
    finally:
        handle.remove()
    return caught[0]


def blocks_of(model: PreTrainedModel) -> nn.ModuleList:
    """The blocks of a trunk, first to last.

    Raises:
        ValueError: if the trunk keeps them elsewhere than in `layers`.
    """
    blocks = getattr(model.base_model, "layers", None)
    if not isinstance(blocks, nn.ModuleList):
        raise ValueError(
            f"{type(model).__name__} has no list `layers` of blocks; surrogates need one, as "
            "Llama, Qwen, OLMo and most decoders have"
        )
    return blocks


class _ReachedError(Exception):
    """The block that was waited for is about to run."""


def _translate(batch: Batch, to_model: Tensor) -> Batch:
    return replace(batch, input_ids=to_model[batch.input_ids])


def join(pairs: Sequence[FeaturePair]) -> FeatureBatch:
    """Lay traces end to end for one step; nothing is padded."""
    return FeatureBatch(
        tuple(pair.teacher.id for pair in pairs),
        torch.cat([pair.teacher.targets for pair in pairs]),
        torch.cat([pair.teacher.reasoning for pair in pairs]),
        torch.cat([pair.teacher.hidden for pair in pairs]),
        tuple(
            torch.cat([pair.proxies[index].hidden for pair in pairs])
            for index in range(len(pairs[0].proxies))
        ),
        tuple(len(pair.teacher.targets) for pair in pairs),
        tuple(
            tuple(len(pair.proxies[index].hidden) for pair in pairs)
            for index in range(len(pairs[0].proxies))
        ),
        tuple(pair.teacher.own for pair in pairs),
    )


def pair_up(
    teacher: Sequence[Features], proxies: Sequence[Sequence[Features]]
) -> list[FeaturePair]:
    """Match the features of several models by trace id.

    Raises:
        ValueError: if a model lacks a trace or has it with another number of tokens.
    """
    tables = [{item.id: item for item in proxy} for proxy in proxies]
    pairs: list[FeaturePair] = []
    for item in teacher:
        found = []
        for number, table in enumerate(tables):
            other = table.get(item.id)
            if other is None or len(other.targets) != len(item.targets):
                raise ValueError(
                    f"proxy {number} has no features that fit trace {item.id}; "
                    "they were computed from other traces"
                )
            found.append(other)
        pairs.append(FeaturePair(item, tuple(found)))
    return pairs


def write_features(path: Path, features: Sequence[Features]) -> None:
    rows = [
        {
            "id": item.id,
            "targets": item.targets.tolist(),
            "reasoning": item.reasoning.tolist(),
            "answer": item.answer.tolist(),
            "hidden": item.hidden.contiguous().view(torch.uint8).numpy().tobytes(),
            "dtype": str(item.hidden.dtype).removeprefix("torch."),
            "width": item.hidden.shape[1],
            "own": item.own,
        }
        for item in features
    ]
    write_parquet(pa.Table.from_pylist(rows, schema=_SCHEMA), path)


def read_features(folder: Path) -> list[Features]:
    """All features of a folder of Parquet files, in the order of their names."""
    files = sorted(folder.glob("*.parquet"))
    if not files:
        raise FileNotFoundError(f"no features in {folder}: expected Parquet files")
    found: list[Features] = []
    for path in files:
        for row in pq.read_table(path).to_pylist():
            raw = torch.from_numpy(np.frombuffer(row["hidden"], dtype=np.uint8).copy())
            found.append(
                Features(
                    row["id"],
                    torch.tensor(row["targets"], dtype=torch.long),
                    torch.tensor(row["reasoning"], dtype=torch.bool),
                    torch.tensor(row["answer"], dtype=torch.bool),
                    raw.view(_DTYPES[row["dtype"]]).view(-1, row["width"]),
                    row["own"],
                )
            )
    return found
