"""Export a defended head as a plain checkpoint, and check that the files are what was trained."""

from dataclasses import dataclass
from pathlib import Path

import torch

from azeotrope import models
from azeotrope.heads.head import Head, ProxyHead
from azeotrope.logits.chunks import head_logits
from azeotrope.logits.served import check_served, check_uncapped, scaled
from azeotrope.logits.vocabulary import share
from azeotrope.models import Loaded

TOLERANCE = 1e-4
"""Largest difference between logits of a float32 model and its checkpoint."""
LOW_PRECISION_TOLERANCE = 0.25
"""The same for lower precisions, which round the trained head: bfloat16 keeps 8 bits of a number,
so logits of about 30 are 0.125 apart."""


def head_from(loaded: Loaded) -> Head:
    """A float32 copy of the teacher's head; training it leaves a tied embedding as it is."""
    layer = models.head_of(loaded.model)
    return Head(layer.weight, layer.bias)


def proxy_head_from(proxy: Loaded, teacher: Loaded, name: str) -> ProxyHead:
    """A proxy's frozen head on the tokens that it shares with the teacher.

    Args:
        name: of the proxy, for the error.

    Raises:
        ValueError: if the proxy knows less than half of the teacher's tokens, caps its logits, or
            changes them in a way that is not known here.
    """
    check_uncapped(proxy.model, "proxy")
    check_served(proxy.model)
    layer = models.head_of(proxy.model)
    shared = share(teacher.tokenizer, proxy.tokenizer, proxy_name=name)
    return ProxyHead(layer.weight, layer.bias, shared)


def put_head(loaded: Loaded, head: Head) -> None:
    """Give the model this head, untied from the embedding. It may be called again and again."""
    models.untie(loaded.model)
    layer = models.head_of(loaded.model)
    with torch.no_grad():
        layer.weight.copy_(head.weight)
        if head.bias is not None and layer.bias is not None:
            layer.bias.copy_(head.bias)


@dataclass(frozen=True)
class ExportCheck:
    """The comparison of the model in memory with the checkpoint read back."""

    largest_logit_difference: float
    tied: bool
    trunk_tensors: int
    prompts: int


class ExportError(RuntimeError):
    """The checkpoint on disk is not the model that was trained."""


def export(loaded: Loaded, head: Head, folder: Path, prompts: list[list[int]]) -> ExportCheck:
    """Write the defended teacher and verify the files.

    The trunk must be the same bit for bit, the head must be stored apart from the embedding, and
    the logits on `prompts` must be the head's to `TOLERANCE`.

    Raises:
        ExportError: if any of these does not hold; the folder must then not be served.
    """
    trunk_before = {
        # In main memory: a GPU that holds the model twice need not hold it a third time.
        name: value.to("cpu", copy=True)
        for name, value in loaded.model.state_dict().items()
        if not _is_head(loaded, name)
    }
    put_head(loaded, head)
    models.save(loaded, folder)
    reloaded = models.load(str(folder), dtype=loaded.model.dtype, device=loaded.device)
    _check_trunk(trunk_before, reloaded, folder)
    if models.is_tied(reloaded.model):
        raise ExportError(f"{folder} was read back with its head tied to the embedding")
    worst = max((_difference(loaded, reloaded, head, ids) for ids in prompts), default=0.0)
    precise = loaded.model.dtype == torch.float32
    allowed = TOLERANCE if precise else LOW_PRECISION_TOLERANCE
    # Written so that NaN fails too.
    if not worst <= allowed:
        raise ExportError(
            f"{folder} gives logits {worst:.2g} away from the trained head's; at most {allowed:g} "
            "is allowed"
        )
    return ExportCheck(worst, False, len(trunk_before), len(prompts))


def _is_head(loaded: Loaded, name: str) -> bool:
    # Most families call it lm_head, not all.
    layer = models.head_of(loaded.model)
    places = [place for place, module in loaded.model.named_modules() if module is layer]
    parts = [part for part, _ in layer.named_parameters()]
    return name in {f"{place}.{part}" for place in places for part in parts}


def _check_trunk(before: dict[str, torch.Tensor], reloaded: Loaded, folder: Path) -> None:
    after = reloaded.model.state_dict()
    for name, value in before.items():
        if name not in after or not torch.equal(value, after[name].cpu()):
            raise ExportError(
                f"{folder} holds a tensor {name} that differs from the teacher's frozen trunk"
            )


@torch.inference_mode()
def _difference(loaded: Loaded, reloaded: Loaded, head: Head, ids: list[int]) -> float:
    """The largest difference of logits on one prompt."""
    tokens = torch.tensor([ids], device=loaded.device)
    states = loaded.model.base_model(input_ids=tokens, use_cache=False).last_hidden_state[0]
    hidden = scaled(loaded.model, states)
    expected = head_logits(hidden.float(), head.weight, head.bias)
    actual = reloaded.model(input_ids=tokens, use_cache=False).logits[0].float()
    return float((expected - actual).abs().max())
