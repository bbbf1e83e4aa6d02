"""Load, untie and save models as plain Hugging Face checkpoints: safetensors, no remote code."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils.logging import disable_progress_bar

from azeotrope import packaged

# One bar a run is enough; thousands of small loads would bury it.
disable_progress_bar()
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

    `pocket/NAME` is a checkpoint shipped here; `smollm2` and `smollm2:LAYERS` are converted once
    from an installed package, which the workflows do before anything else.

    Raises:
        FileNotFoundError: if a pocket model or a folder does not exist, or holds no checkpoint.
        ValueError: if `smollm2:LAYERS` asks for layers that the model does not have.
    """
    if name.startswith("pocket/"):
        folder = POCKET / name.removeprefix("pocket/")
        if not (folder / "config.json").is_file():
            known = sorted(path.parent.name for path in POCKET.glob("*/config.json"))
            raise FileNotFoundError(
                f"no pocket model {name!r}; there are {', '.join('pocket/' + k for k in known)}"
            )
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
    """
    place = Path(resolve(name))
    if not place.is_dir():
        return name
    digest = hashlib.sha256()
    for path in sorted(place.iterdir()):
        if path.suffix in {".safetensors", ".json", ".jinja", ".model"} and path.name not in {
            "training.json"
        }:
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
    place = resolve(name)
    device = torch.device(device) if device is not None else default_device()
    if dtype is None:
        dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    tokenizer = load_tokenizer(name)
    model = AutoModelForCausalLM.from_pretrained(place, dtype=dtype, use_safetensors=True)
    model.to(device).eval()  # type: ignore[arg-type]
    return Loaded(model, tokenizer)


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    tokenizer = AutoTokenizer.from_pretrained(resolve(name))
    if tokenizer.pad_token_id is None:
        # Padding is masked by position, never by token id, so sharing the id with eos is safe.
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def context_length(name: str) -> int:
    """The greatest number of positions the model was made for."""
    config = AutoConfig.from_pretrained(resolve(name))
    return int(getattr(config, "max_position_embeddings", 1 << 30))


def head_of(model: PreTrainedModel) -> nn.Linear:
    """The output head, the only part that head defenses change."""
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
    """Give the output head a weight of its own, so that changing it leaves the embedding alone."""
    if is_tied(model):
        head = head_of(model)
        head.weight = nn.Parameter(head.weight.detach().clone())
    model.config.tie_word_embeddings = False
    # transformers drops the keys listed here when it saves.
    if hasattr(model, "all_tied_weights_keys"):
        model.all_tied_weights_keys = {}


def save(loaded: Loaded, folder: Path) -> None:
    """Write a plain checkpoint that any engine loads.

    Raises:
        ValueError: if the model has LoRA layers, whose names no engine knows.
    """
    if has_lora(loaded.model):
        raise ValueError("the model has LoRA layers; call merge_lora before saving it")
    folder.mkdir(parents=True, exist_ok=True)
    loaded.model.save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)


def attach_lora(
    loaded: Loaded,
    rank: int,
    alpha: float,
    dropout: float = 0.0,
    targets: str | Sequence[str] = "all-linear",
) -> Loaded:
    """Freeze a model and add low-rank matrices to train in its stead: W + (alpha / rank) B A.

    B starts at zero, so the model computes what it did; A is drawn from torch's global generator.
    The given model is changed in place. Train the parameters that require a gradient, then call
    `merge_lora` before saving.

    Args:
        targets: names of linear layers, or `all-linear` for all but the output head.

    Raises:
        ValueError: if the rank is not positive, no layer has such a name, or the model has LoRA.

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
        target_modules=targets if isinstance(targets, str) else list(targets),
        task_type="CAUSAL_LM",
    )
    # Layers are put into the model itself: peft's wrapper is no PreTrainedModel.
    inject_adapter_in_model(config, loaded.model)
    return loaded


def merge_lora(loaded: Loaded) -> Loaded:
    """Fold the low-rank matrices into the weights: a plain model again, ready to save.

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
    # transformers would save adapters alone while it sees their configuration.
    if hasattr(model, "peft_config"):
        del model.peft_config
    model.requires_grad_(True)
    model.eval()
    return loaded


def has_lora(model: nn.Module) -> bool:
    return any(".lora_A." in name for name, _ in model.named_parameters())


def parameter_count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
