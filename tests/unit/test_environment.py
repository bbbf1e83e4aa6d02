"""Environment variables: one class names all of them."""

import re
from pathlib import Path

import pytest

from azeotrope.environment import Environment, variable

ROOT = Path(__file__).parents[2]
PRODUCT = ("azeotrope", "gateway", "actors", "experiment", "workflows", "deploy")


@pytest.fixture(autouse=True)
def _nothing_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in Environment.model_fields:
        monkeypatch.delenv(variable(name), raising=False)


def test_every_variable_that_the_product_mentions_is_a_field() -> None:
    sources = [
        path.read_text(errors="replace")
        for package in PRODUCT
        for path in (ROOT / package).rglob("*")
        if path.suffix in {".py", ".yaml", ".md", ".sh", ".service"}
    ]
    mentioned = {name for text in sources for name in re.findall(r"AZEOTROPE_[A-Z_]+[A-Z]", text)}
    fields = {variable(name) for name in Environment.model_fields}
    assert mentioned <= fields


def test_keys_and_converted_models_have_folders_of_their_own(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    home = Path.home()
    assert Environment().home == home / ".azeotrope"
    assert Environment().cache == home / ".cache" / "azeotrope"
    monkeypatch.setenv("AZEOTROPE_CACHE", str(tmp_path))
    assert Environment().cache == tmp_path
    assert Environment().home == home / ".azeotrope"


def test_an_empty_variable_is_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AZEOTROPE_DATA", "")
    assert Environment().data is None
    monkeypatch.setenv("AZEOTROPE_DATA", "~/sets")
    assert Environment().data == Path.home() / "sets"


def test_secrets_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AZEOTROPE_KEY", "sk-secret")
    assert "sk-secret" not in repr(Environment())
