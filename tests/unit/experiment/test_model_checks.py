"""Checkpoints that a run could not use are refused at `validate`, in one line, without loading."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from azeotrope import models
from azeotrope.config import ConfigError
from experiment import settings
from experiment.preflight import preflight

Change = Callable[[Path], None]


def edit(folder: Path, file: str, **changes: object) -> None:
    path = folder / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def pickle_only(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def pointer(folder: Path) -> None:
    (folder / "model.safetensors").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    )


def cut_off(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def missing_shard(folder: Path) -> None:
    shards = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors").rename(folder / shards["a"])
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))


def broken_index(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text("{}")


def own_code(folder: Path) -> None:
    edit(folder, "config.json", auto_map={"AutoConfig": "configuration_x.XConfig"})


def no_end(folder: Path) -> None:
    edit(folder, "tokenizer_config.json", eos_token=None)
    edit(folder, "generation_config.json", eos_token_id=None)
    edit(folder, "config.json", eos_token_id=None)


def no_template(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()


def broken_template(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] }")


def raising_template(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{{ raise_exception('only tools') }}")


def larger_tokenizer(folder: Path) -> None:
    tokenizer = models.load_tokenizer(str(folder))
    tokenizer.add_tokens(["brandnew"])
    tokenizer.save_pretrained(folder)


def broken_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{")


BROKEN: dict[Change, str] = {
    no_weights: "has no weights; expected model.safetensors",
    pickle_only: "in pytorch_model.bin only, a pickle",
    pointer: "is a Git LFS pointer",
    cut_off: "is damaged or was cut off",
    missing_shard: "1 of 2 weight files are missing .* first model-00002-of-00002",
    broken_index: "is no index of weights",
    own_code: "names code of its own",
    no_end: "no end-of-sequence token",
    no_template: "no chat template",
    broken_template: "chat template is broken",
    raising_template: "chat template is broken: only tools",
    larger_tokenizer: "has ids up to 129 and the model 129 rows",
    broken_tokenizer: "tokenizer cannot be loaded",
}


@pytest.mark.parametrize("role", ["teacher", "student"])
@pytest.mark.parametrize("change", BROKEN, ids=lambda change: change.__name__)
def test_a_broken_checkpoint_is_refused_in_one_line(
    change: Change, role: str, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(models.resolve("pocket/teacher"), folder)
    change(folder)
    uses = {
        "teacher": f"teacher={folder}",
        "student": f"students=[{{name: small, model: {folder}}}]",
    }
    config = settings.load("pocket_demo", [uses[role], f"cache={tmp_path / 'cache'}"])
    with pytest.raises(ConfigError, match=BROKEN[change]) as error:
        preflight(config)
    assert len(str(error.value).splitlines()) == 1
    assert not (tmp_path / "cache").exists()


def test_a_generation_configuration_that_cannot_be_written_is_mended(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(models.resolve("pocket/small"), folder)
    edit(folder, "generation_config.json", do_sample=False, temperature=0.6, eos_token_id=[2, 3])
    loaded = models.load(str(folder))
    with pytest.warns(UserWarning, match="only its token ids are saved"):
        models.save(loaded, tmp_path / "saved")
    assert models.load(str(tmp_path / "saved")).model.generation_config.eos_token_id == [2, 3]
