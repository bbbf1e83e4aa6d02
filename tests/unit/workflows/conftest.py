"""What tests of the command line share: a configuration that must be refused, and a time limit."""

import importlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

LIMIT_S = 5.0
"""Processor time of a check: mistakes must be found before anything is loaded."""


@pytest.fixture
def quick() -> Iterator[None]:
    """Limits the time of a test."""
    # Modules that are imported at first use are not limited, so that they are imported here.
    from experiment import settings

    importlib.import_module("transformers.models.llama.modeling_llama")
    settings.load("pocket_logits", [])
    # Only the time of this process counts, so that a busy machine does not fail correct tests.
    started = time.process_time()
    yield
    assert time.process_time() - started < LIMIT_S


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
