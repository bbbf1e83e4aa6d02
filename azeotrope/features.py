"""Hidden states of a frozen trunk: computed once, stored, read by every training step after.

A head defense never changes the trunk, so the last hidden states of teacher and proxies at the
positions that predict a completion token are all it needs. They are stored in the dtype the model
computes in (float32, or bfloat16 for a bfloat16 model), so reading them back loses nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from azeotrope.heads import hidden_states
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
    hidden: Float[Tensor, "tokens hidden"]


@dataclass(frozen=True)
class FeatureBatch:
    """Several traces end to end: the teacher's hidden states and those of every proxy."""

    ids: tuple[str, ...]
    targets: Int[Tensor, " tokens"]
    reasoning: Bool[Tensor, " tokens"]
    teacher: Float[Tensor, "tokens hidden"]
    proxies: tuple[Tensor, ...]

    def to(self, device: torch.device | str) -> "FeatureBatch":
        return FeatureBatch(
            self.ids,
            self.targets.to(device),
            self.reasoning.to(device),
            self.teacher.to(device),
            tuple(hidden.to(device) for hidden in self.proxies),
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
    batch_size: int = 16,
) -> list[Features]:
    """Run the trunk over examples.

    Args:
        to_model: this model's id for each of the ids in `examples`, for a proxy that reads the
            teacher's tokens. Targets stay the teacher's.
    """
    found: list[Features] = []
    for start in range(0, len(examples), batch_size):
        batch = collate(examples[start : start + batch_size], pad_id=0)
        inputs = batch if to_model is None else _translate(batch, to_model)
        hidden = hidden_states(model, inputs.to(model.device)).cpu()
        sizes = batch.mask.sum(1).tolist()
        for row, states in enumerate(hidden.split(sizes)):
            keep = batch.mask[row]
            found.append(
                Features(
                    batch.ids[row],
                    batch.targets[row][keep],
                    batch.reasoning[row][keep],
                    batch.answer[row][keep],
                    states,
                )
            )
    return found


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
                )
            )
    return found
