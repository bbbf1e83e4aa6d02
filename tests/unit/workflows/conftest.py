"""What tests of the command line share: a configuration that must be refused before work starts."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest


@pytest.fixture
def nothing_starts(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fails a test that starts Ray or reads a model's weights: mistakes must be found before."""
    import ray
    from transformers import PreTrainedModel

    started: list[str] = []
    read_weights = PreTrainedModel.from_pretrained.__func__
    start_ray = ray.init

    def from_pretrained(cls: type, *args: object, **kwargs: object) -> object:
        started.append("weights were read")
        return read_weights(cls, *args, **kwargs)

    def init(*args: object, **kwargs: object) -> object:
        started.append("Ray was started")
        return start_ray(*args, **kwargs)

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", classmethod(from_pretrained))
    monkeypatch.setattr(ray, "init", init)
    yield
    assert started == []


@pytest.fixture
def refused(tmp_path: Path) -> Callable[..., str]:
    """Loads and checks a configuration that must fail; returns the message."""
    from azeotrope.config import ConfigError
    from experiment import settings
    from experiment.preflight import preflight

    def refused(*overrides: str, yaml: str = "name: trial\n") -> str:
        path = tmp_path / "trial.yaml"
        path.write_text(yaml)
        with pytest.raises(ConfigError) as error:
            preflight(settings.load(str(path), [f"cache={tmp_path / 'cache'}", *overrides]))
        assert not (tmp_path / "cache").exists()
        return str(error.value)

    return refused
