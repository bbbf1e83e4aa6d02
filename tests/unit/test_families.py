"""Every model family works as transformers itself computes it, or is refused with the reason.

The table in `docs/models.md` is what these tests find.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from families import FAMILIES, REFUSED, VOCAB, build
from transformers import PreTrainedModel

from azeotrope.engine.row_batch import BatchRow, RowBatch
from azeotrope.generation import Sampling, generate
from azeotrope.heads.chunked import sequence_loss
from azeotrope.heads.export import export, head_from, proxy_head_from
from azeotrope.heads.features import compute
from azeotrope.heads.folding import check_foldable
from azeotrope.heads.surrogate import Surrogate
from azeotrope.logits.served import check_served
from azeotrope.models import Loaded, load_tokenizer
from azeotrope.tokens import Example, collate

PROMPTS = [tuple(range(5, 5 + length)) for length in (3, 9, 20)]
NEW, END, PAD = 24, 2, 0
TABLE = Path(__file__).parents[2] / "docs" / "models.md"
NO_TEXT = {"Mamba", "RecurrentGemma", "RWKV"}
NO_ROWS = NO_TEXT | {"Falcon-H1"}
NO_HEAD = {"Gemma 2", "NanoChat", "RecurrentGemma"}
NO_SURROGATE = {
    **dict.fromkeys(NO_HEAD, "caps"),
    "Granite": "multiplies",
    "Mamba": "fixed",
    "Falcon-H1": "fixed",
    "RWKV": "no list",
}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def model(family: str) -> PreTrainedModel:
    return build(family)


@pytest.fixture(scope="module")
def reference(family: str, model: PreTrainedModel) -> list[list[int]]:
    """What transformers writes after each prompt alone, greedily."""
    written = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NEW,
            do_sample=False,
            eos_token_id=END,
            pad_token_id=PAD,
        )
        written.append(output[0, len(prompt) :].tolist())
    return written


def examples() -> list[Example]:
    flags = (True,) * 10
    return [
        Example(str(n), prompt, tuple(range(30, 40)), flags, flags)
        for n, prompt in enumerate(PROMPTS)
    ]


def test_generation_writes_what_transformers_writes(
    family: str, model: PreTrainedModel, reference: Sequence[list[int]]
) -> None:
    greedy = Sampling(temperature=0.0, max_new_tokens=NEW)
    if family in NO_TEXT:
        with pytest.raises(ValueError, match="finished rows cannot be taken out"):
            generate(model, PROMPTS, greedy, end_ids=(END,), pad_id=PAD)
        return
    completions = generate(model, PROMPTS, greedy, end_ids=(END,), pad_id=PAD)
    assert [list(completion.ids) for completion in completions] == reference


def test_rows_of_the_serving_engine_write_the_same(
    family: str, model: PreTrainedModel, reference: Sequence[list[int]]
) -> None:
    if family in NO_ROWS:
        with pytest.raises(ValueError, match="serve it with vLLM instead"):
            RowBatch(model, end_ids=(END,), pad_id=PAD)
        return
    batch = RowBatch(model, end_ids=(END,), pad_id=PAD)
    rows = [BatchRow(prompt, limit=NEW) for prompt in PROMPTS]
    waiting = list(rows)
    while not all(row.is_done for row in rows):
        batch.step([waiting.pop()] if waiting else [])
    assert [row.written for row in rows] == [
        [token for token in tokens if token != END] for tokens in reference
    ]


def test_the_loss_is_the_one_that_the_model_serves(model: PreTrainedModel) -> None:
    check_served(model)
    ours = sequence_loss(model, collate(examples(), PAD))
    total = 0.0
    for example in examples():
        ids = torch.tensor([[*example.prompt, *example.completion]])
        labels = ids.clone()
        labels[:, : len(example.prompt)] = -100
        with torch.no_grad():
            total += float(model(input_ids=ids, labels=labels).loss) * len(example.completion)
    assert float(ours.total) == pytest.approx(total, rel=1e-4)


def test_stored_features_and_the_head_give_the_models_logits(
    family: str, model: PreTrainedModel
) -> None:
    if family in NO_HEAD:
        with pytest.raises(ValueError, match="squashes its final logits"):
            check_foldable(model)
        return
    check_foldable(model)
    head = model.get_output_embeddings()
    for example, features in zip(examples(), compute(model, examples()), strict=True):
        ids = torch.tensor([[*example.prompt, *example.completion]])
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, len(example.prompt) - 1 : -1]
            ours = features.hidden @ head.weight.T
        torch.testing.assert_close(ours, logits, rtol=1e-3, atol=1e-3)


def test_a_changed_head_is_exported_and_read_back(
    family: str, model: PreTrainedModel, tmp_path: Path
) -> None:
    if family in NO_HEAD:
        return
    loaded = Loaded(build(family), load_tokenizer("pocket/teacher"))
    head = head_from(loaded)
    with torch.no_grad():
        head.weight.mul_(1.1)
    check = export(loaded, head, tmp_path, [list(prompt) for prompt in PROMPTS])
    assert not check.tied
    assert check.largest_logit_difference < 1e-4


def test_its_gradients_can_be_watched(family: str) -> None:
    loaded = Loaded(build(family), load_tokenizer("pocket/teacher"))
    if family in NO_SURROGATE:
        with pytest.raises(ValueError, match=NO_SURROGATE[family]):
            Surrogate(loaded, "last", VOCAB)
        return
    surrogate = Surrogate(loaded, "last", VOCAB)
    watched = surrogate.watched()
    along = {name: torch.ones_like(value) for name, value in watched.items()}
    moved = surrogate.direction(watched, along, torch.randn(7, 32), [7], [4])
    assert moved.isfinite().all()
    assert moved.norm() > 0


@pytest.mark.parametrize("reason", REFUSED)
def test_what_is_not_understood_is_refused_in_every_use(reason: str) -> None:
    loaded = Loaded(build(reason), load_tokenizer("pocket/teacher"))
    teacher = Loaded(build("Llama"), loaded.tokenizer)
    uses: list[Callable[[], object]] = [
        lambda: check_served(loaded.model),
        lambda: check_foldable(loaded.model),
        lambda: proxy_head_from(loaded, teacher, "proxy"),
        lambda: Surrogate(loaded, "last", VOCAB),
    ]
    for use in uses:
        with pytest.raises(ValueError, match=reason):
            use()


def test_the_documented_table_is_what_is_tested() -> None:
    rows = [line for line in TABLE.read_text().splitlines() if line.startswith("| ")][1:]
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    assert [row[0] for row in cells] == list(FAMILIES)
    for name, text, engine, head, surrogate in cells:
        assert (text == "yes") == (name not in NO_TEXT), name
        assert (engine == "yes") == (name not in NO_ROWS), name
        assert (head == "yes") == (name not in NO_HEAD | NO_TEXT), name
        assert (surrogate == "yes") == (name not in NO_SURROGATE), name
