"""Hidden states of a frozen trunk: computed once, stored, and read by every training step.

A head defense never changes the trunk, so the last hidden states of teacher and proxies at the
positions that predict a completion token are all it needs. They are stored in the dtype in which
the model computes (float32, or bfloat16 for a bfloat16 model), so reading them back loses nothing.
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

from azeotrope.files import write_parquet
from azeotrope.heads.chunked import hidden_states
from azeotrope.tokens import Batch, Example, collate

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
    """One trace as a head sees it: index t of every tensor is about the same predicted token."""

    id: str
    targets: Int[Tensor, " tokens"]
    reasoning: Bool[Tensor, " tokens"]
    answer: Bool[Tensor, " tokens"]
    hidden: Float[Tensor, "rows hidden"]
    """One row per completion token; or, if taken before a block, one per token of the text."""
    own: bool = True
    """Whether the teacher itself wrote the text, as opposed to ground truth."""


@dataclass(frozen=True)
class FeatureBatch:
    """Several traces end to end: the teacher's hidden states and those of every proxy.

    `counts` are the completion tokens per trace, `rows` each proxy's rows per trace, and `own` says
    for each trace whether the teacher wrote it.
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
        """The traces that the teacher wrote, or all that it did not write."""
        selected = [index for index, flag in enumerate(self.own) if flag == own]

        def pick(values: Tensor, sizes: tuple[int, ...]) -> Tensor:
            parts = values.split(list(sizes))
            # The empty slice gives an empty selection the right dtype, device and width.
            return torch.cat([values[:0], *(parts[index] for index in selected)])

        return FeatureBatch(
            tuple(self.ids[index] for index in selected),
            pick(self.targets, self.counts),
            pick(self.reasoning, self.counts),
            pick(self.teacher, self.counts),
            tuple(pick(h, sizes) for h, sizes in zip(self.proxies, self.rows, strict=True)),
            tuple(self.counts[index] for index in selected),
            tuple(tuple(sizes[index] for index in selected) for sizes in self.rows),
            tuple(self.own[index] for index in selected),
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
        before_block: take the states that enter this block, at every token of the text, instead
            of the last ones where a completion token is predicted.
        batch_size: examples per pass of the trunk; the features do not depend on it.
        own: recorded in the features: whether the teacher wrote these texts itself.

    Raises:
        ValueError: if `before_block` is set and the trunk has no list `layers` of blocks.
    """
    features: list[Features] = []
    for start in range(0, len(examples), batch_size):
        chunk = examples[start : start + batch_size]
        # Padding comes last and attention is causal, so the padding's id does not matter.
        batch = collate(chunk, pad_id=0)
        inputs = batch if to_model is None else _translate(batch, to_model)
        if before_block is None:
            hidden = hidden_states(model, inputs.to(model.device)).cpu()
            parts = hidden.split(batch.mask.sum(1).tolist())
        else:
            entering = block_inputs(model, inputs.input_ids.to(model.device), before_block).cpu()
            # The last token is a target only: nothing is predicted after it.
            parts = [row[: len(example) - 1] for row, example in zip(entering, chunk, strict=True)]
        for row, states in enumerate(parts):
            keep = batch.mask[row]
            features.append(
                Features(
                    batch.ids[row],
                    batch.targets[row][keep],
                    batch.reasoning[row][keep],
                    batch.answer[row][keep],
                    # A copy: a slice would keep the padded states of the whole batch alive.
                    states.clone(),
                    own,
                )
            )
    return features


def block_inputs(
    model: PreTrainedModel, input_ids: Int[Tensor, "batch time"], block: int
) -> Float[Tensor, "batch time hidden"]:
    """What enters a block of the trunk; this block and the later ones are not run.

    Raises:
        ValueError: if the trunk has no list `layers` of blocks.
    """
    blocks = blocks_of(model)
    if block >= len(blocks):
        return model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state
    entering: list[Tensor] = []

    # A hook that raises ends the forward pass here: the later blocks cost nothing.
    def catch(_: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        entering.append(arguments[0] if arguments else named["hidden_states"])
        raise _ReachedError

    handle = blocks[block].register_forward_pre_hook(catch, with_kwargs=True)
    try:
        model.base_model(input_ids=input_ids, use_cache=False)
    except _ReachedError:
        pass
    finally:
        handle.remove()
    return entering[0]


def blocks_of(model: PreTrainedModel) -> nn.ModuleList:
    """The blocks of a trunk, first to last.

    Raises:
        ValueError: if the trunk has no list `layers` of blocks.
    """
    blocks = getattr(model.base_model, "layers", None)
    if not isinstance(blocks, nn.ModuleList):
        raise ValueError(
            f"{type(model).__name__} has no list `layers` of blocks; surrogates need one, as "
            "Llama, Qwen, OLMo and most decoders have"
        )
    return blocks


class _ReachedError(Exception):
    """The block whose input is taken is about to run."""


def _translate(batch: Batch, to_model: Tensor) -> Batch:
    return replace(batch, input_ids=to_model[batch.input_ids])


def join(pairs: Sequence[FeaturePair]) -> FeatureBatch:
    """Lay traces end to end for one step, without padding."""
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
        ValueError: if a proxy lacks a trace, or has it with a different number of tokens.
    """
    tables = [{features.id: features for features in proxy} for proxy in proxies]
    pairs: list[FeaturePair] = []
    for ours in teacher:
        matches = []
        for number, table in enumerate(tables):
            theirs = table.get(ours.id)
            if theirs is None or len(theirs.targets) != len(ours.targets):
                raise ValueError(
                    f"proxy {number} has no features that fit trace {ours.id}; they were computed "
                    "from different traces, so compute the features of all models again"
                )
            matches.append(theirs)
        pairs.append(FeaturePair(ours, tuple(matches)))
    return pairs


def write_features(path: Path, features: Sequence[Features]) -> None:
    """Write features as one Parquet file, whole or not at all."""
    rows = [
        {
            "id": item.id,
            "targets": item.targets.tolist(),
            "reasoning": item.reasoning.tolist(),
            "answer": item.answer.tolist(),
            # As raw bytes: numpy and Parquet have no bfloat16.
            "hidden": item.hidden.contiguous().view(torch.uint8).numpy().tobytes(),
            "dtype": str(item.hidden.dtype).removeprefix("torch."),
            "width": item.hidden.shape[1],
            "own": item.own,
        }
        for item in features
    ]
    write_parquet(pa.Table.from_pylist(rows, schema=_SCHEMA), path)


def read_features(folder: Path) -> list[Features]:
    """All features of a folder of Parquet files, in the order of the files' names.

    Raises:
        FileNotFoundError: if the folder holds no Parquet file.
    """
    files = sorted(folder.glob("*.parquet"))
    if not files:
        raise FileNotFoundError(f"no features in {folder}: expected Parquet files")
    features: list[Features] = []
    for path in files:
        for row in pq.read_table(path).to_pylist():
            # A copy: the buffer is read-only, and torch warns of tensors that must not be written.
            raw = torch.from_numpy(np.frombuffer(row["hidden"], dtype=np.uint8).copy())
            features.append(
                Features(
                    row["id"],
                    torch.tensor(row["targets"], dtype=torch.long),
                    torch.tensor(row["reasoning"], dtype=torch.bool),
                    torch.tensor(row["answer"], dtype=torch.bool),
                    raw.view(_DTYPES[row["dtype"]]).view(-1, row["width"]),
                    row["own"],
                )
            )
    return features
