"""Load, untie and save models as plain Hugging Face checkpoints: safetensors, no remote code."""

import hashlib
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils.logging import disable_progress_bar

from azeotrope import packaged
from azeotrope.endings import declare

# A run shows one progress bar of its own; a bar for each of thousands of loads would hide it.
disable_progress_bar()
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
POCKET = Path(__file__).parent / "pocket" / "weights"


@dataclass(frozen=True)
class Loaded:
    """A model and the tokenizer that belongs to it."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    @property
    def device(self) -> torch.device:
        return self.model.device


def resolve(name: str) -> str:
    """The folder or hub name behind a model's name.

    `pocket/NAME` is a checkpoint of this package. `smollm2` and `smollm2:LAYERS` must have been
    converted from an installed package: the caller does that, as every workflow does at its start.

    Raises:
        FileNotFoundError: if a pocket model or a folder does not exist, or holds no checkpoint.
        ValueError: if `smollm2:LAYERS` asks for layers that the model does not have.
    """
    if name.startswith("pocket/"):
        folder = POCKET / name.removeprefix("pocket/")
        if not (folder / "config.json").is_file():
            names = sorted(f"pocket/{path.parent.name}" for path in POCKET.glob("*/config.json"))
            raise FileNotFoundError(f"no pocket model {name!r}; there are {', '.join(names)}")
        return str(folder)
    if packaged.is_packaged(name):
        folder = packaged.folder_of(name)
        if not packaged.is_converted(name):
            raise FileNotFoundError(
                f"{name} is not converted yet: there is no checkpoint in {folder}; every workflow "
                "converts it when it starts, and pocket.smollm2.ensure does it from Python"
            )
        return str(folder)
    path = Path(name).expanduser()
    if name.startswith((".", "/", "~")) or path.exists():
        if not (path / "config.json").is_file():
            raise FileNotFoundError(
                f"no checkpoint at {name}: expected a folder with config.json and safetensors; "
                "give a folder that save_pretrained wrote, a hub name, or pocket/NAME"
            )
        # Workers may run in another folder.
        return str(path.resolve())
    return name


def fingerprint(name: str) -> str:
    """A hash of the checkpoint's files, so that a stage knows when a model has changed.

    A hub name is its own fingerprint: nothing is downloaded to compute it.

    Raises:
        FileNotFoundError: if a checkpoint that should be on this machine is missing.
    """
    folder = Path(resolve(name))
    if not folder.is_dir():
        return name
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.suffix in {
            ".safetensors",
            ".json",
            ".jinja",
            ".model",
            ".txt",
        } and path.name not in {"training.json"}:
            digest.update(path.name.encode())
            with path.open("rb") as file:
                while chunk := file.read(1 << 20):
                    digest.update(chunk)
    return digest.hexdigest()[:16]


def default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def load(
    name: str, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
) -> Loaded:
    """A causal language model and its tokenizer, ready for inference.

    Args:
        dtype: float32 on a CPU and bfloat16 on a GPU unless given.

    Raises:
        FileNotFoundError: if the checkpoint is missing.
    """
    source = resolve(name)
    device = torch.device(device) if device is not None else default_device()
    if dtype is None:
        dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    tokenizer = load_tokenizer(name)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, use_safetensors=True)
    model.to(device).eval()  # type: ignore[arg-type]
    return Loaded(model, tokenizer)


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    source = resolve(name)
    tokenizer = AutoTokenizer.from_pretrained(source)
    declare(tokenizer, _generation_ends(source))
    if tokenizer.pad_token_id is None:
        # Padding is masked by position, never by token id, so sharing the id with eos is safe.
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _generation_ends(source: str) -> int | list[int] | None:
    """The ids that end a completion, from the generation configuration or the model's own."""
    try:
        return GenerationConfig.from_pretrained(source).eos_token_id
    except OSError:
        # A checkpoint without the file; transformers then takes the model's configuration.
        return getattr(AutoConfig.from_pretrained(source).get_text_config(), "eos_token_id", None)


def context_length(name: str) -> int:
    """The greatest number of positions the model was made for."""
    config = AutoConfig.from_pretrained(resolve(name)).get_text_config()
    return int(getattr(config, "max_position_embeddings", 1 << 30))


def head_of(model: PreTrainedModel) -> nn.Linear:
    """The output head, the only part that head defenses change.

    Raises:
        ValueError: if it is not a plain linear layer.
    """
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise ValueError(
            f"{type(model).__name__} has an output head of type {type(head).__name__}; "
            "head defenses need a plain linear layer, so dequantise the model first"
        )
    return head


def is_tied(model: PreTrainedModel) -> bool:
    embedding = model.get_input_embeddings()
    return head_of(model).weight.data_ptr() == embedding.weight.data_ptr()  # type: ignore[union-attr]


def untie(model: PreTrainedModel) -> None:
    """Give the output head its own weight, so that a change of it leaves the embedding alone."""
    if is_tied(model):
        head = head_of(model)
        head.weight = nn.Parameter(head.weight.detach().clone())
    model.config.tie_word_embeddings = False
    # transformers drops the keys listed here when it saves.
    if hasattr(model, "all_tied_weights_keys"):
        model.all_tied_weights_keys = {}


def save(loaded: Loaded, folder: Path) -> None:
    """Write a plain checkpoint that any engine can load.

    Raises:
        ValueError: if the model has LoRA layers, whose names no engine knows.
    """
    if has_lora(loaded.model):
        raise ValueError("the model has LoRA layers; call merge_lora before saving it")
    folder.mkdir(parents=True, exist_ok=True)
    _make_writable(loaded.model)
    loaded.model.save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)


def _make_writable(model: PreTrainedModel) -> None:
    """Leave out of a generation configuration what transformers reads but refuses to write.

    Checkpoints with `do_sample: false` beside a temperature are in use, for example. Which tokens
    end a completion is always kept.
    """
    config = model.generation_config
    if config is None:
        return
    try:
        config.validate(strict=True)
    except ValueError as error:
        kept = {name: getattr(config, name, None) for name in _TOKEN_IDS}
        model.generation_config = GenerationConfig(**kept)
        warnings.warn(
            "the generation configuration contradicts itself, so only its token ids are saved: "
            + str(error).strip().splitlines()[0],
            stacklevel=3,
        )


def attach_lora(
    loaded: Loaded,
    rank: int,
    alpha: float,
    dropout: float,
) -> Loaded:
    """Freeze a model in place and add low-rank matrices to train: W + (alpha / rank) B A.

    B starts at zero, so the model computes the same as before; A is drawn from torch's global
    generator. Train the parameters that require a gradient, then call `merge_lora` before saving.

    Raises:
        ValueError: if the rank is not positive, or the model has LoRA.

    Reference:
        Hu et al. 2021, "LoRA", arXiv:2106.09685.
    """
    if rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}")
    if has_lora(loaded.model):
        raise ValueError("the model has LoRA layers already; call merge_lora first")
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]  # peft divides by the rank; a float is fine
        lora_dropout=dropout,
        # All linear layers but the output head.
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    # Layers are put into the model itself: peft's wrapper is no PreTrainedModel.
    inject_adapter_in_model(config, loaded.model)
    return loaded


def merge_lora(loaded: Loaded) -> Loaded:
    """Fold the low-rank matrices into the weights, so that the model is plain again.

    Raises:
        ValueError: if the model has no LoRA, or a merged weight is not finite.
    """
    if not has_lora(loaded.model):
        raise ValueError(
            f"{type(loaded.model).__name__} has no LoRA to merge; call attach_lora first"
        )
    from peft.tuners.tuners_utils import BaseTunerLayer

    model = loaded.model
    for name, layer in list(model.named_modules()):
        if isinstance(layer, BaseTunerLayer):
            layer.merge(safe_merge=True)
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, layer.get_base_layer())
    # While transformers sees this configuration, it saves the adapters only.
    if hasattr(model, "peft_config"):
        del model.peft_config
    model.requires_grad_(True)
    model.eval()
    return loaded


def has_lora(model: nn.Module) -> bool:
    return any(".lora_A." in name for name, _ in model.named_parameters())


def parameter_count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
