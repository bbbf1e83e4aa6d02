"""Export a defended head as a plain checkpoint, and check that it is what was trained."""

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open

from azeotrope import models
from azeotrope.heads.head import Head, ProxyHead
from azeotrope.logits.chunks import head_logits
from azeotrope.logits.vocabulary import share
from azeotrope.models import Loaded

TOLERANCE = 1e-4


def head_from(loaded: Loaded) -> Head:
    """The teacher's head as float32 parameters of its own; tied or not, the embedding is safe."""
    layer = models.head_of(loaded.model)
    return Head(layer.weight, layer.bias)


def proxy_head_from(proxy: Loaded, teacher: Loaded, name: str) -> ProxyHead:
    layer = models.head_of(proxy.model)
    shared = share(teacher.tokenizer, proxy.tokenizer, proxy_name=name)
    return ProxyHead(layer.weight, layer.bias, shared)


def put_head(loaded: Loaded, head: Head) -> None:
    """Give the model this head, untied from the embedding."""
    models.untie(loaded.model)
    layer = models.head_of(loaded.model)
    with torch.no_grad():
        layer.weight.copy_(head.weight)
        if head.bias is not None and layer.bias is not None:
            layer.bias.copy_(head.bias)


@dataclass(frozen=True)
class ExportCheck:
    """What was compared between the model in memory and the checkpoint read back."""

    largest_logit_difference: float
    tied: bool
    trunk_tensors: int
    prompts: int


class ExportError(RuntimeError):
    """The checkpoint on disk is not the model that was trained."""


def export(loaded: Loaded, head: Head, folder: Path, prompts: list[list[int]]) -> ExportCheck:
    """Write the defended teacher and verify the files.

    The trunk must be the same bit for bit, the head must be stored apart from the embedding, and
    the logits on `prompts` must be the head's to 1e-4.

    Raises:
        ExportError: if any of these does not hold; the folder must then not be served.
    """
    before = {
        # Kept in main memory: a GPU that holds the model twice need not hold it three times.
        name: value.to("cpu", copy=True)
        for name, value in loaded.model.state_dict().items()
        if not _is_head(loaded, name)
    }
    put_head(loaded, head)
    models.save(loaded, folder)
    again = models.load(str(folder), dtype=loaded.model.dtype, device=loaded.device)
    _check_trunk(before, again, folder)
    if models.is_tied(again.model):
        raise ExportError(f"{folder} was read back with its head tied to the embedding")
    worst = max((_difference(loaded, again, head, ids) for ids in prompts), default=0.0)
    # A lower precision rounds the trained head; it is held to its own resolution.
    allowed = TOLERANCE if loaded.model.dtype == torch.float32 else 0.25
    if not worst <= allowed:
        raise ExportError(f"{folder} gives logits {worst:.2g} away from the trained head's")
    return ExportCheck(worst, False, len(before), len(prompts))


def stored_tensors(folder: Path) -> list[str]:
    """Names of all tensors in a checkpoint's safetensors files."""
    names: list[str] = []
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            names.extend(file.keys())
    return names


def _is_head(loaded: Loaded, name: str) -> bool:
    layer = models.head_of(loaded.model)
    return any(name.endswith(f"lm_head.{part}") for part, _ in layer.named_parameters())


def _check_trunk(before: dict[str, torch.Tensor], again: Loaded, folder: Path) -> None:
    after = again.model.state_dict()
    for name, value in before.items():
        if name not in after or not torch.equal(value, after[name].cpu()):
            raise ExportError(f"{folder} holds another {name} than the teacher's frozen trunk")


@torch.inference_mode()
def _difference(loaded: Loaded, again: Loaded, head: Head, ids: list[int]) -> float:
    tokens = torch.tensor([ids], device=loaded.device)
    hidden = loaded.model.base_model(input_ids=tokens, use_cache=False).last_hidden_state[0]
    wanted = head_logits(hidden.float(), head.weight, head.bias)
    given = again.model(input_ids=tokens, use_cache=False).logits[0].float()
    return float((wanted - given).abs().max())
