"""Names and folders of models that come inside Python packages.

There is one such model, SmolLM2-135M-Instruct. `smollm2` is the whole model and `smollm2:20` its
first 20 of 30 layers. `pocket.smollm2` makes the checkpoints. This module only says where they are,
so that loading a model never depends on the code that converts one.
"""

import re
from pathlib import Path

from azeotrope.environment import Environment

LAYERS = 30
_NAME = re.compile(r"smollm2(?::(\d+))?")


def is_packaged(name: str) -> bool:
    """Whether a model's name is `smollm2` or `smollm2:LAYERS`."""
    return _NAME.fullmatch(name) is not None


def layers_of(name: str) -> int | None:
    """The number of layers in `smollm2:LAYERS`; None for the whole model.

    Raises:
        ValueError: if the name has another form, or the model does not have that many layers.
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
    """The folder of this name's checkpoint, below AZEOTROPE_CACHE.

    Raises:
        ValueError: as `layers_of` does.
    """
    layers = layers_of(name)
    whole = "smollm2-135m-instruct"
    root = Environment().cache.resolve()
    return root / (whole if layers is None else f"{whole}-{layers}-layers")


def is_converted(name: str) -> bool:
    """Whether the checkpoint of this name exists already.

    Raises:
        ValueError: as `layers_of` does.
    """
    return (folder_of(name) / "config.json").is_file()
