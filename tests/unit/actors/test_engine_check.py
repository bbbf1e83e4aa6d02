"""An exported checkpoint says the same in another engine, and a wrong one is found out."""

import importlib.util
from pathlib import Path

import pytest
import torch

from actors import engine_check
from azeotrope import models
from azeotrope.heads.export import ExportError, export, head_from, put_head

PROMPTS = [[1, 9, 20, 33, 40], [1, 12, 5]]
INSTALLED = importlib.util.find_spec("vllm") is not None
needs_vllm = pytest.mark.skipif(not INSTALLED, reason="vLLM is not installed")


@pytest.fixture
def exported(tmp_path: Path) -> tuple[models.Loaded, Path]:
    """A teacher with another head, and the checkpoint that was made of it."""
    loaded = models.load("pocket/teacher", device="cpu")
    head = head_from(loaded)
    noise = torch.randn(head.weight.shape, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        head.weight.add_(0.1 * noise)
    export(loaded, head, tmp_path / "teacher", PROMPTS)
    return loaded, tmp_path / "teacher"


@pytest.mark.skipif(INSTALLED, reason="vLLM is installed")
def test_without_the_engine_nothing_is_claimed(exported: tuple[models.Loaded, Path]) -> None:
    assert engine_check.compare(*exported, PROMPTS) is None


def test_without_prompts_there_is_nothing_to_compare(exported: tuple[models.Loaded, Path]) -> None:
    assert engine_check.compare(*exported, []) is None


@pytest.mark.slow
@needs_vllm
def test_vllm_gives_the_same_log_probabilities(exported: tuple[models.Loaded, Path]) -> None:
    difference = engine_check.compare(*exported, PROMPTS)
    assert difference is not None
    assert difference <= engine_check.TOLERANCE


@pytest.mark.slow
@needs_vllm
def test_a_checkpoint_with_another_head_is_found_out(exported: tuple[models.Loaded, Path]) -> None:
    loaded, checkpoint = exported
    put_head(loaded, head_from(models.load("pocket/teacher", device="cpu")))
    with pytest.raises(ExportError, match=r"nats away from transformers' .* at most 0\.001"):
        engine_check.compare(loaded, checkpoint, PROMPTS)


@pytest.mark.slow
@needs_vllm
def test_a_checkpoint_that_the_engine_cannot_load_is_refused(
    exported: tuple[models.Loaded, Path],
) -> None:
    loaded, checkpoint = exported
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(ExportError, match="vLLM does not serve"):
        engine_check.compare(loaded, checkpoint, PROMPTS)


@pytest.mark.skipif(INSTALLED, reason="vLLM is installed")
def test_an_engine_that_ends_early_is_an_error(exported: tuple[models.Loaded, Path]) -> None:
    # The process is started as it would be; without the engine it ends at the first import.
    with pytest.raises(ExportError, match=r"vLLM does not serve .*No module named 'vllm'"):
        engine_check._ask_vllm(exported[1], PROMPTS)


def test_the_other_side_of_the_comparison_is_every_token_but_the_first(
    exported: tuple[models.Loaded, Path],
) -> None:
    loaded, _ = exported
    found = engine_check._own(loaded, PROMPTS)
    expected = []
    for ids in PROMPTS:
        with torch.no_grad():
            log_p = loaded.model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        expected += [float(log_p[at, token]) for at, token in enumerate(ids[1:])]
    torch.testing.assert_close(found, torch.tensor(expected))
    assert len(found) == 6
