"""Whether a checkpoint on this machine can be loaded, prompted and ended, before anything starts.

Only headers of weight files are read, so a check takes seconds for models of any size.
"""

import json
from collections.abc import Iterator
from pathlib import Path

from jinja2.exceptions import TemplateError
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from azeotrope import models
from azeotrope.config import ConfigError
from azeotrope.endings import end_ids
from azeotrope.logits.served import check_trunk
from azeotrope.row_cache import check_leaving
from azeotrope.tokens import encode_prompt

LFS_POINTER = b"version https://git-lfs"
INDEX = "model.safetensors.index.json"
PICKLED = (".bin", ".pt", ".pth", ".ckpt")


def check_model(name: str, skeleton: PreTrainedModel) -> None:
    """Refuse a checkpoint of this machine that a run could not use.

    Args:
        skeleton: the model's shapes without its weights.

    Raises:
        ConfigError: in one line, with the file at fault and what to do.
    """
    folder = Path(models.resolve(name))
    try:
        for file in _weight_files(folder):
            _check_weights(file)
        _check_own_code(folder)
        tokenizer = _tokenizer(name)
        _check_tokenizer(tokenizer, skeleton)
        check_trunk(skeleton)
        check_leaving(skeleton)
    except (OSError, ValueError) as error:
        raise ConfigError(f"model {name}: {' '.join(str(error).split())}") from None


def _weight_files(folder: Path) -> Iterator[Path]:
    """The files that hold the weights.

    Raises:
        ValueError: if there are none, or the index names one that is missing.
    """
    if (folder / INDEX).is_file():
        try:
            names = sorted(set(json.loads((folder / INDEX).read_text())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError):
            raise ValueError(f"{folder / INDEX} is no index of weights; save it again") from None
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise ValueError(
                f"{len(missing)} of {len(names)} weight files are missing in {folder}, first "
                f"{missing[0]}; copy the whole checkpoint"
            )
        yield from (folder / name for name in names)
        return
    single = folder / "model.safetensors"
    if single.is_file():
        yield single
        return
    pickled = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLED)
    if pickled:
        raise ValueError(
            f"{folder} has its weights in {pickled[0]} only, a pickle, which can run code when it "
            "is loaded; convert it with save_pretrained, which writes safetensors"
        )
    raise ValueError(f"{folder} has no weights; expected model.safetensors or {INDEX}")


def _check_weights(file: Path) -> None:
    with file.open("rb") as opened:
        if opened.read(len(LFS_POINTER)) == LFS_POINTER:
            raise ValueError(
                f"{file} is a Git LFS pointer and not the file itself; fetch it with `git lfs pull`"
            )
    try:
        with safe_open(file, framework="pt") as tensors:
            tensors.keys()
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged or was cut off ({error}); copy it again") from None


def _check_own_code(folder: Path) -> None:
    for file in ("config.json", "tokenizer_config.json"):
        path = folder / file
        if path.is_file() and json.loads(path.read_text()).get("auto_map"):
            raise ValueError(
                f"{path} names code of its own (auto_map), and code that comes with a checkpoint "
                "is never run; take a model that transformers itself supports, or remove the entry"
            )


def _tokenizer(name: str) -> PreTrainedTokenizerBase:
    try:
        return models.load_tokenizer(name)
    except Exception as error:
        # Whatever a broken tokenizer raises, the run would end with it later.
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(f"its tokenizer cannot be loaded: {reason[0]}") from None


def _check_tokenizer(tokenizer: PreTrainedTokenizerBase, skeleton: PreTrainedModel) -> None:
    """Prompt, end and count tokens as a run will.

    Raises:
        ValueError: if there is no end or no chat template, the template is broken, or the
            tokenizer has tokens that the model has not.
    """
    end_ids(tokenizer)
    try:
        prompt = encode_prompt(tokenizer, [{"role": "user", "content": "How many?"}])
    except (TemplateError, TypeError, KeyError) as error:
        raise ValueError(f"its chat template is broken: {error}; save it again") from None
    if not prompt:
        raise ValueError("its chat template makes an empty prompt of a question; save it again")
    head = skeleton.get_output_embeddings()
    rows = int(skeleton.config.get_text_config().vocab_size)
    if head is not None:
        rows = min(rows, int(head.weight.shape[0]))  # type: ignore[union-attr, index]
    largest = max(tokenizer.get_vocab().values())
    if largest >= rows:
        raise ValueError(
            f"its tokenizer has ids up to {largest} and the model {rows} rows, so some tokens "
            "have no embedding; resize the model's embeddings, or take the tokenizer that "
            "belongs to it"
        )
