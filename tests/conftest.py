"""What every test shares: markers by folder, one thread, the pocket tokenizers.

Not covered here, and why:

- GPUs: no test needs one, so placement and bfloat16 on a GPU are not tested.
- vLLM on a GPU: its second generation of logits processors is tested with stand-ins. Tests that
  need vLLM skip if it is not installed; `make test-vllm` runs them.
- A cluster of Redis: keys and quotas are tested on an imitation, and on one real server if one is
  installed.
- Several machines: `tests/ray` uses one machine. It finds faults of scheduling and recovery, but
  not those of networks or of file systems that are not shared.
- Downloads: no test needs a network, so models and data sets of a hub are never read.
- The quality of a defense: tests state identities. The effect of a defense is measured by
  workflows, over seeds and with intervals, because one run of one student proves nothing.

Nothing of `azeotrope` is imported at the top of this file: the hook that checks array shapes is
installed after it, and would miss what is already loaded.
"""

from pathlib import Path
from typing import TYPE_CHECKING

import hypothesis
import pytest
import torch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

FOLDER_MARKERS = ("ray", "serve", "gpu")
HERE = Path(__file__).parent

# A time limit on each example makes a busy machine fail tests that are right.
hypothesis.settings.register_profile("azeotrope", deadline=None, derandomize=True)
hypothesis.settings.load_profile("azeotrope")


def pytest_configure() -> None:
    # Sums in another order differ in the last bit; one thread makes every run the same.
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    no_gpu = pytest.mark.skip(reason="no CUDA device")
    for item in items:
        if not item.path.is_relative_to(HERE):
            continue
        folders = item.path.relative_to(HERE).parts[:-1]
        for name in FOLDER_MARKERS:
            if name in folders:
                item.add_marker(name)
        if "gpu" in folders and not torch.cuda.is_available():
            item.add_marker(no_gpu)


@pytest.fixture(scope="session")
def word() -> "PreTrainedTokenizerFast":
    """The pocket tokenizer with one token a word."""
    from azeotrope.pocket.tokenizer import build

    return build("word")


@pytest.fixture(scope="session")
def pieces() -> "PreTrainedTokenizerFast":
    """The pocket tokenizer with byte pairs and single digits."""
    from azeotrope.pocket.tokenizer import build

    return build("pieces")


@pytest.fixture(params=["word", "pieces"])
def tokenizer(request: pytest.FixtureRequest) -> "PreTrainedTokenizerFast":
    """Each pocket tokenizer in turn."""
    return request.getfixturevalue(request.param)
