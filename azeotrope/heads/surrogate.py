"""A frozen surrogate student whose gradients a defense aims at.

Only the gradients of one layer near the end are needed, so the blocks before it never run again:
what enters that layer is stored, and a step runs the tail of the trunk from there on.
"""

import copy
import re
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call, jvp
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from azeotrope import models
from azeotrope.heads.features import block_inputs, blocks_of
from azeotrope.logits.alignment import same_vocabulary
from azeotrope.logits.chunks import head_logits
from azeotrope.logits.served import check_served, check_trunk, check_uncapped, logit_scale
from azeotrope.logits.vocabulary import token_rows
from azeotrope.models import Loaded

TOLERANCE = 1e-4
"""Greatest relative difference between the last states of the tail and those of the model."""
HEAD_TENSOR = "lm_head.weight"
"""The name of a surrogate's output head among the tensors that can be watched."""
_BLOCK = re.compile(r"(?:^|\.)layers\.(\d+)\.")


def first_block(model: PreTrainedModel, layer: str) -> int:
    """The block from which the trunk must be run for the gradients of a layer.

    Args:
        layer: `last` or `penultimate` block, or the name of one tensor, such as
            `model.layers.3.mlp.down_proj.weight` or `lm_head.weight`.

    Raises:
        ValueError: if the model has no list of blocks, or no such block or tensor.
    """
    blocks = len(blocks_of(model))
    if layer in {"last", "penultimate"}:
        block = blocks - (1 if layer == "last" else 2)
        if block < 0:
            raise ValueError(f"a surrogate of {blocks} blocks has no penultimate one")
        return block
    if layer == HEAD_TENSOR:
        return blocks
    # Stored states enter a block, so the final norm is reached through the last one.
    block_of = {
        name: int(match[1]) if (match := _BLOCK.search(name)) else blocks - 1
        for name, _ in model.named_parameters()
        if _BLOCK.search(name) or ".norm." in f".{name}"
    }
    if layer not in block_of:
        last_names = ", ".join(list(block_of)[-10:])
        raise ValueError(
            f"the surrogate has no tensor {layer!r} that a gradient can be taken of; give `last`, "
            f"`penultimate`, `lm_head.weight` or one such as: {last_names}"
        )
    return block_of[layer]


def check_tail(model: PreTrainedModel) -> None:
    """Refuse a model whose last blocks cannot be run alone; its weights are not needed.

    Raises:
        ValueError: if it caps its logits, multiplies what enters the trunk, or has a fixed list of
            kinds of blocks.
    """
    check_trunk(model)
    check_uncapped(model, "surrogate")
    config = copy.deepcopy(model.config.get_text_config())
    multiplier = getattr(config, "embedding_multiplier", None) or 1.0
    if multiplier != 1.0:
        raise ValueError(
            f"{type(model).__name__} multiplies whatever enters its trunk "
            f"(embedding_multiplier {multiplier:g}), so its last blocks alone give other states "
            "and it cannot be a surrogate; take a proxy of another family"
        )
    try:
        _shorten(config, 0)
    except AttributeError:
        raise ValueError(
            f"{type(model).__name__} has a fixed list of kinds of blocks, so its last blocks "
            "cannot be run alone and it cannot be a surrogate; take a proxy of another family"
        ) from None


def _shorten(config: PretrainedConfig, start: int) -> None:
    """Leave the first blocks out of a configuration: masks and caches follow its lists."""
    config.num_hidden_layers -= start
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[start:]


class Surrogate(nn.Module):
    """The tail of a student from the chosen layer on, with its head; nothing in it is trained.

    Args:
        loaded: the student. Its model is changed: the earlier blocks are dropped.
        layer: the layer whose gradients count; see `first_block`.
        rows: rows of the vocabulary that belong to tokens; rows that pad the head are left out.

    Raises:
        ValueError: if the model has no such layer, its last blocks alone compute other states
            than they do in the whole model, or it changes its logits in a way that is not known.
    """

    def __init__(self, loaded: Loaded, layer: str, rows: int) -> None:
        super().__init__()
        model = loaded.model
        check_tail(model)
        start = first_block(model, layer)
        # Flash and memory-saving attention have no forward-mode derivative.
        model.set_attn_implementation("eager")
        if hasattr(model, "set_experts_implementation"):
            # Nor has the grouped product of experts.
            model.set_experts_implementation("eager")
        # The loss is an angle between gradients, and bfloat16 does not resolve small angles. It is
        # so from here on, so that the two ways to the last states below can be compared exactly.
        model.to(dtype=_precise(model.dtype))  # type: ignore[call-arg]
        check_served(model)
        trunk = model.base_model
        sample = torch.arange(min(rows, 8), device=model.device).unsqueeze(0)
        with torch.no_grad():
            entering = block_inputs(model, sample, start)[0]
            expected = trunk(input_ids=sample, use_cache=False).last_hidden_state[0]
        trunk.layers = blocks_of(model)[start:]
        _shorten(model.config, start)
        self.trunk: nn.Module = trunk
        head = models.head_of(model)
        # The scale of the logits is folded into the frozen head.
        scale = logit_scale(model)
        self.weight = nn.Buffer(scale * head.weight.detach().float()[:rows])
        self.bias = (
            None if head.bias is None else nn.Buffer(scale * head.bias.detach().float()[:rows])
        )
        trunk.requires_grad_(False)
        self.in_head = layer == HEAD_TENSOR
        self.names = [] if self.in_head else _chosen(model, trunk, layer, start)
        with torch.no_grad():
            actual = self.hidden({}, entering, [len(entering)], [len(entering)])
        # Some models scale whatever enters the trunk, not just embeddings. Families whose tail is
        # the same are near 1e-7.
        if not (actual - expected).norm() <= TOLERANCE * expected.norm():
            raise ValueError(
                f"the blocks of {type(model).__name__} from {start} on give other states than in "
                "the whole model, so it cannot be a surrogate; take a proxy of another family"
            )

    def watched(self) -> dict[str, Tensor]:
        """Copies of the tensors whose gradients count, ready to be differentiated."""
        if self.in_head:
            return {HEAD_TENSOR: self.weight.detach().requires_grad_(True)}
        named = dict(self.trunk.named_parameters())
        return {name: named[name].detach().requires_grad_(True) for name in self.names}

    def hidden(
        self,
        tensors: dict[str, Tensor],
        inputs: Float[Tensor, "rows width"],
        rows: Sequence[int],
        counts: Sequence[int],
    ) -> Float[Tensor, "tokens hidden"]:
        """Last hidden states of the completion tokens, as a function of the watched tensors.

        Args:
            inputs: what enters the tail, text after text.
            rows: tokens of each text.
            counts: completion tokens of each text.
        """
        width = max(rows)
        shape = len(rows), width, inputs.shape[-1]
        padded = torch.zeros(shape, dtype=_precise(inputs.dtype), device=inputs.device)
        mask = torch.zeros(len(rows), width, dtype=torch.bool, device=inputs.device)
        for number, part in enumerate(inputs.split(list(rows))):
            # Padding comes last and attention is causal, so it changes no state that counts.
            padded[number, : len(part)] = part
            mask[number, len(part) - counts[number] : len(part)] = True
        if self.in_head:
            # Only the head remains: the stored inputs are the last states.
            return padded[mask]
        arguments = {"inputs_embeds": padded, "use_cache": False}
        out = functional_call(self.trunk, tensors, kwargs=arguments)
        return out.last_hidden_state[mask]

    def direction(
        self,
        tensors: dict[str, Tensor],
        along: dict[str, Tensor],
        inputs: Tensor,
        rows: Sequence[int],
        counts: Sequence[int],
    ) -> Float[Tensor, "tokens hidden"]:
        """How the last hidden states move when the watched tensors move along a direction."""

        def states(moved: dict[str, Tensor]) -> Tensor:
            return self.hidden(moved, inputs, rows, counts)

        fixed = {name: value.detach() for name, value in tensors.items()}
        return jvp(states, (fixed,), (along,))[1]

    def moved(
        self,
        tensors: dict[str, Tensor],
        along: dict[str, Tensor],
        inputs: Tensor,
        rows: Sequence[int],
        counts: Sequence[int],
    ) -> Callable[[slice], Tensor]:
        """How the logits move along that direction, as a function of a chunk of the tokens."""
        if self.in_head:
            states, turn = self.hidden(tensors, inputs, rows, counts), along[HEAD_TENSOR]
            # Logits are linear in the head's weight, so no derivative is taken.
            return lambda part: states[part].float() @ turn.T
        change = self.direction(tensors, along, inputs, rows, counts)
        return lambda part: change[part].float() @ self.weight.T

    def logits(self, hidden: Float[Tensor, "tokens hidden"]) -> Float[Tensor, "tokens vocab"]:
        """The surrogate's own logits of the rows that are tokens."""
        return head_logits(hidden.float(), self.weight, self.bias)


def _precise(dtype: torch.dtype) -> torch.dtype:
    """At least float32; float64 stays, for tests of the derivatives."""
    return torch.promote_types(dtype, torch.float32)


def _chosen(model: PreTrainedModel, trunk: nn.Module, layer: str, start: int) -> list[str]:
    """Names of the watched tensors within the shortened trunk."""
    if layer in {"last", "penultimate"}:
        return [name for name, _ in trunk.named_parameters() if name.startswith("layers.0.")]
    short = layer.removeprefix(f"{model.base_model_prefix}.")
    return [re.sub(r"^layers\.\d+\.", "layers.0.", short)]


def check_vocabulary(
    surrogate: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase, name: str
) -> None:
    """Refuse a surrogate whose distribution cannot be compared with the teacher's token by token.

    Raises:
        ValueError: if the two vocabularies differ.
    """
    if not same_vocabulary(teacher, surrogate):
        raise ValueError(
            f"the surrogate {name} has another vocabulary ({len(surrogate)} tokens) than the "
            f"teacher ({len(teacher)} tokens); its gradients under the teacher's logits need the "
            "same one, so take a proxy of the teacher's family"
        )


def surrogate_from(loaded: Loaded, teacher: Loaded, layer: str, name: str) -> Surrogate:
    """A surrogate for this teacher.

    Raises:
        ValueError: if it has another vocabulary than the teacher, no such layer, or a tail that
            does not compute alone what it does in the whole model.
    """
    check_vocabulary(loaded.tokenizer, teacher.tokenizer, name)
    return Surrogate(loaded, layer, token_rows(teacher.tokenizer))
