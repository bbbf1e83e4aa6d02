"""Two tokenizers on one text: they meet where both have read the same, and nowhere else."""

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from azeotrope import tasks
from azeotrope.logits.alignment import meetings, next_pieces, same_vocabulary, spellings
from azeotrope.logits.observation import View, merged, observe
from azeotrope.models import load_tokenizer
from azeotrope.tokens import decode

TEXT = "<think> start with 20. then 20 - 6 = 14. all done. </think> #### 14"
# Words of several bytes a letter, and white space of every kind.
HARD = "naïve Ωmega  — 12 héros\n\nplus 3,5 € ? \t fin 日本"


@pytest.fixture(scope="module")
def teacher() -> PreTrainedTokenizerFast:
    return load_tokenizer("pocket/teacher")  # type: ignore[return-value]


@pytest.fixture(scope="module")
def student() -> PreTrainedTokenizerFast:
    return load_tokenizer("pocket/other")  # type: ignore[return-value]


def byte_level(*texts: str, size: int, trim: bool) -> PreTrainedTokenizerFast:
    """A byte-pair encoding over bytes, as most large models have it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim)
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<end>", "<tool>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<end>",
        pad_token="<end>",
        additional_special_tokens=["<tool>"],
    )


@pytest.fixture(scope="module")
def long() -> PreTrainedTokenizerFast:
    """Whole words, with offsets that leave their white space out."""
    return byte_level(*[HARD, TEXT] * 9, size=420, trim=True)


@pytest.fixture(scope="module")
def short() -> PreTrainedTokenizerFast:
    """Hardly more than bytes, so that one letter may be two tokens."""
    return byte_level(HARD, size=262, trim=False)


def table_of(teacher: PreTrainedTokenizerFast, student: PreTrainedTokenizerFast) -> torch.Tensor:
    return spellings(teacher, student, len(teacher.get_vocab()))


def ids(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]  # type: ignore[return-value]


def test_one_vocabulary_is_itself(teacher, student) -> None:
    assert same_vocabulary(teacher, load_tokenizer("pocket/small"))
    assert not same_vocabulary(teacher, student)


def test_words_are_spelt_as_the_student_writes_them(teacher, student) -> None:
    table = table_of(teacher, student)
    for word in ("▁20", "▁start", "▁</think>", ".", "▁carla"):
        pieces = [p for p in table[teacher.get_vocab()[word]].tolist() if p >= 0]
        text = word.replace("▁", " ")
        assert student.convert_tokens_to_string(["x", *student.convert_ids_to_tokens(pieces)]) == (
            "x" + text
        )
        assert ids(student, "joe" + text)[-len(pieces) :] == pieces
    assert student.convert_ids_to_tokens(table[teacher.get_vocab()["▁20"]][:3].tolist()) == [
        "▁", "2", "0",
    ]  # fmt: skip
    # Every token has a spelling, and it ends before the table does.
    assert (table[:, 0] >= 0).all()
    assert (table[:, -1] == -1).all()


def test_a_vocabulary_spelt_by_itself_is_the_identity(teacher, student) -> None:
    for tokenizer in (teacher, student):
        count = len(tokenizer.get_vocab())
        table = spellings(tokenizer, tokenizer, count + 3)
        assert (table[count:] == -1).all(), "rows that pad a head belong to nothing"
        alone = (table[:count, 1] == -1).nonzero()[:, 0]
        assert torch.equal(table[alone, 0], alone)
        # Pieces that only exist inside others, such as halves of words, are the exception.
        assert len(alone) > 0.6 * count


def test_roles_go_before_spelling(teacher, student, long) -> None:
    table = table_of(teacher, long)
    assert table[teacher.eos_token_id, 0] == long.eos_token_id
    assert table[teacher.pad_token_id, 0] == long.pad_token_id
    assert table[teacher.bos_token_id].tolist() == [-1] * 8, "the student has no such role"
    # A token that ends the text and pads it too is taken for the end.
    table = table_of(long, teacher)
    assert long.eos_token_id == long.pad_token_id
    assert table[long.eos_token_id, 0] == teacher.eos_token_id
    # A special token that the other does not know is no text.
    assert table[long.get_vocab()["<tool>"], 0] == -1


def test_what_the_student_cannot_write_has_no_pieces(teacher, long) -> None:
    table = table_of(long, teacher)
    assert table[long.get_vocab()["ĠhÃ©ros"]].tolist() == [-1] * 8
    assert table[long.get_vocab()["Ġstart"], 0] == teacher.get_vocab()["▁start"]
    # Half a letter has no text; the same half is the same token.
    half = long.get_vocab()["Ã"]
    assert table[half, 0] == -1
    again = byte_level("x", size=260, trim=True)
    assert table_of(long, again)[half, 0] == again.get_vocab()["Ã"]


def test_nothing_in_common_is_refused(teacher) -> None:
    words = models.WordLevel({"<unk>": 0, "zzz": 1}, unk_token="<unk>")
    stranger = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), unk_token="<unk>")
    stranger.backend_tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(ValueError, match="can write none of the teacher's tokens"):
        spellings(byte_level("abc", size=259, trim=True), stranger, 259)


def test_where_words_and_pieces_meet(teacher, student) -> None:
    table = table_of(teacher, student)
    ours, theirs = ids(student, TEXT), ids(teacher, TEXT)
    met = meetings(TEXT, student, teacher, table, finished=True)
    # The word tokenizer's tokens are made of pieces: the student can always be compared.
    assert [item.ours for item in met] == list(range(len(ours) + 1))
    assert (met[-1].ours, met[-1].theirs, met[-1].prefix) == (len(ours), len(theirs), ())
    for item in met[:-1]:
        spelling = [piece for piece in table[theirs[item.theirs]].tolist() if piece >= 0]
        depth = len(item.prefix)
        assert item.prefix == tuple(spelling[:depth])
        assert ours[item.ours] == spelling[depth], "the token that comes is the next piece"
        assert ours[item.ours - depth : item.ours] == spelling[:depth]
    starts = [item for item in met if not item.prefix]
    assert [item.theirs for item in starts] == list(range(len(theirs) + 1))
    unfinished = meetings(TEXT, student, teacher, table, finished=False)
    assert unfinished == met[:-1]


def test_a_vocabulary_meets_itself_everywhere(teacher) -> None:
    met = meetings(TEXT, teacher, teacher, table_of(teacher, teacher), finished=True)
    assert [item.ours for item in met] == [item.theirs for item in met]
    assert len(met) == len(ids(teacher, TEXT)) + 1


def read_before(tokenizer: PreTrainedTokenizerFast, tokens: list[int]) -> str | None:
    """What a model has read, as text; None inside a letter."""
    text = decode(tokenizer, tokens)
    return None if text.endswith("\ufffd") else text


@pytest.mark.parametrize("names", [("short", "long"), ("long", "short"), ("short", "short")])
def test_bytes_and_words_meet_where_the_text_is_the_same(
    names: tuple[str, str], request: pytest.FixtureRequest
) -> None:
    reader, writer = (request.getfixturevalue(name) for name in names)
    table = table_of(writer, reader)
    ours, theirs = ids(reader, HARD), ids(writer, HARD)
    met = meetings(HARD, reader, writer, table, finished=False)
    starts = [item for item in met if not item.prefix]
    for item in starts:
        assert read_before(reader, ours[: item.ours]) == read_before(writer, theirs[: item.theirs])
    # Whatever both have read at some token of theirs is found.
    texts = [
        {read_before(t, tokens[:index]) for index in range(len(tokens))} - {None}
        for t, tokens in ((reader, ours), (writer, theirs))
    ]
    assert {read_before(reader, ours[: item.ours]) for item in starts} == texts[0] & texts[1]
    assert len(starts) == len(texts[0] & texts[1])
    for item in met:
        before = ours[item.ours - len(item.prefix) : item.ours]
        assert tuple(before) == item.prefix


def test_a_models_own_tokens_need_not_be_its_tokenizers(student, teacher) -> None:
    text = "start with 20."
    own = student.convert_tokens_to_ids(["▁", "s", "t", "a", "r", "t", "▁with", "▁", "2", "0", "."])
    assert own != ids(student, text)
    table = table_of(student, teacher)
    met = meetings(text, teacher, student, table, finished=True, written=own)
    starts = [(item.ours, item.theirs) for item in met if not item.prefix]
    assert starts == [(0, 0), (1, 6), (2, 7), (3, 10), (4, 11)]
    same = meetings(text, teacher, student, table, finished=True, written=ids(student, text))
    assert same == meetings(text, teacher, student, table, finished=True)


def test_tokens_of_another_text_are_refused(student, teacher) -> None:
    table = table_of(teacher, student)
    for other in ("start with 19.", "start with 20. then", ""):
        with pytest.raises(ValueError, match="the tokens do not spell the text"):
            meetings(
                "start with 20.",
                student,
                teacher,
                table,
                finished=True,
                written=ids(teacher, other),
            )


def test_the_next_piece_of_what_is_begun(teacher, student) -> None:
    table = table_of(teacher, student)
    ours, theirs = student.get_vocab(), teacher.get_vocab()

    def following(*prefix: str) -> tuple[dict[str, str], set[str]]:
        pieces, complete = next_pieces(
            table, torch.tensor([ours[p] for p in prefix], dtype=torch.long)
        )
        names = {index: word for word, index in theirs.items()}
        named = {
            names[index]: student.convert_ids_to_tokens([piece])[0]
            for index, piece in enumerate(pieces.tolist())
            if piece >= 0
        }
        return named, {names[index] for index in complete.nonzero()[:, 0].tolist()}

    first, complete = following()
    assert first["▁start"] == "▁start"
    assert first["▁20"] == first["▁2"] == "▁"
    assert complete == set()
    second, complete = following("▁")
    assert second == {f"▁{n}": str(n)[0] for n in range(21)}
    assert complete == set()
    third, complete = following("▁", "2")
    assert third == {"▁20": "0"}
    assert complete == {"▁2"}, "after it the student may write anything"


def test_pieces_multiply_to_the_teachers_words(teacher, student) -> None:
    """The chain of conditional probabilities is the probability of the word itself."""
    table = table_of(teacher, student)
    generator = torch.Generator().manual_seed(0)
    vocab = len(teacher.get_vocab())
    logits = 2 * torch.randn(1, vocab, generator=generator, dtype=torch.float64)
    p = logits.softmax(-1)[0]
    events = observe(logits, View())
    for word, index in teacher.get_vocab().items():
        spelling = [piece for piece in table[index].tolist() if piece >= 0]
        found = 1.0
        for depth, piece in enumerate(spelling):
            prefix = torch.tensor(spelling[:depth], dtype=torch.long)
            step = merged(events, *next_pieces(table, prefix))
            assert step.tokens is not None
            where = step.tokens[0].tolist().index(piece)
            found *= step.log_p[0, where].exp().item()
        # Longer words that begin so are part of it: 1 of 1, 10, 11 and so on.
        width = len(spelling)
        longer = (table[:, :width] == torch.tensor(spelling)).all(-1)
        assert found == pytest.approx(p[longer].sum().item(), rel=1e-6), word


def test_every_solution_of_the_task_is_compared_throughout(teacher, student) -> None:
    table = table_of(teacher, student)
    for problem in tasks.build(tasks.PocketConfig()).problems("train", 30):
        text = problem.solution
        met = meetings(text, student, teacher, table, finished=True)
        assert [item.ours for item in met] == list(range(len(ids(student, text)) + 1))
