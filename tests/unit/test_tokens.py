"""Spans, masks and the shift: what counts as reasoning, as answer, and as neither."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from azeotrope import tokens
from azeotrope.pocket.tokenizer import build
from azeotrope.tokens import Boundary

QUESTION = [{"role": "user", "content": "q"}]
TRACE = "<think> at first 2. 2 doubles to 4. </think> #### 4"
PAD, BOS, EOS = 0, 1, 2


@pytest.fixture(scope="module")
def bars() -> PreTrainedTokenizerFast:
    """A tokenizer that cuts at `|` only, so that a tag can lie inside a token."""
    words = ["<pad>", "<bos>", "<eos>", "<unk>", "|", "a", "b</think>c", "d", "q", "e"]
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"\|"), behavior="isolated")
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
    )
    made.chat_template = "{{ bos_token }}{{ messages[0]['content'] }}"
    return made


def make(tokenizer, completion: str, *, finished: bool = True, max_length: int = 256):
    return tokens.encode(
        tokenizer,
        QUESTION,
        completion,
        boundary=Boundary(),
        max_length=max_length,
        finished=finished,
        id="x",
    )


def flagged(tokenizer, example: tokens.Example, flags: tuple[bool, ...]) -> list[str]:
    ids = [i for i, flag in zip(example.completion, flags, strict=True) if flag]
    return [token.removeprefix("▁") for token in tokenizer.convert_ids_to_tokens(ids)]


@pytest.mark.parametrize(
    ("text", "reasoning", "answer"),
    [
        ("<think>abc</think>#### 4", "abc", "#### 4"),
        ("so: <think>abc</think> 4", "abc", " 4"),
        ("abc</think>4", "abc", "4"),
        ("<think>abc #### 4", "abc #### 4", ""),
        ("so 2. #### 4", "so 2. ", "#### 4"),
        (r"so 2. \boxed{4}", "so 2. ", r"\boxed{4}"),
        ("so 2. The final answer is: 4", "so 2. ", "The final answer is: 4"),
        ("so 2. the answer is 4", "so 2. ", "the answer is 4"),
        ("so 2. Answer: 4", "so 2. ", "Answer: 4"),
        ("#### 4", "", "#### 4"),
        ("nothing to be found", "", ""),
        ("", "", ""),
        ("<think></think>4", "", "4"),
        # Only the first block is reasoning: what follows might hold the answer.
        ("<think>a</think>b<think>c</think>d", "a", "b<think>c</think>d"),
        # The opening tag stood in the prompt, and the model opened another afterwards.
        ("a</think>4<think>c", "a", "4<think>c"),
        ("</think>4", "", "4"),
    ],
)
def test_spans_of_every_kind_of_completion(text: str, reasoning: str, answer: str) -> None:
    first, second = tokens.spans(text, Boundary())
    assert text[first.start : first.end] == reasoning
    assert text[second.start : second.end] == answer


def test_spans_without_tags_or_pattern_are_configurable() -> None:
    silent = Boundary(open_tag="", close_tag="", answer_pattern="")
    first, second = tokens.spans("<think>a</think>#### 4", silent)
    assert first.start == first.end
    assert second.start == second.end
    same = Boundary(open_tag="|", close_tag="|")
    first, second = tokens.spans("|ab|4", same)
    assert (first.start, first.end, second.start, second.end) == (1, 3, 4, 5)


@pytest.mark.parametrize(
    ("text", "reasoning", "answer"),
    [
        ("nothing to be found", "nothing to be found", ""),
        ("", "", ""),
        # Whatever is marked keeps its place.
        ("so 2. #### 4", "so 2. ", "#### 4"),
        ("<think>abc</think>4", "abc", "4"),
        ("<think>abc", "abc", ""),
    ],
)
def test_an_unmarked_completion_may_count_as_reasoning(
    text: str, reasoning: str, answer: str
) -> None:
    first, second = tokens.spans(text, Boundary(unmarked="reasoning"))
    assert text[first.start : first.end] == reasoning
    assert text[second.start : second.end] == answer


@pytest.mark.parametrize("finished", [True, False])
def test_all_of_an_unmarked_completion_is_reasoning_but_its_end(word, finished: bool) -> None:
    boundary = Boundary(unmarked="reasoning")
    example = tokens.encode(
        word, QUESTION, "we have 2", boundary=boundary, max_length=64, finished=finished
    )
    assert flagged(word, example, example.reasoning) == ["we", "have", "2"]
    assert flagged(word, example, example.answer) == (["<eos>"] if finished else [])


def test_without_reasoning_keeps_the_answer_only() -> None:
    assert tokens.without_reasoning(TRACE, Boundary()) == "#### 4"
    assert tokens.without_reasoning("<think> cut at", Boundary()) == ""


def test_a_token_that_straddles_a_boundary_belongs_to_neither(bars) -> None:
    example = make(bars, "a|b</think>c|d", finished=False)
    assert example.completion == (5, 4, 6, 4, 7)
    assert example.reasoning == (True, True, False, False, False)
    assert example.answer == (False, False, False, True, True)


def test_white_space_glued_to_a_token_does_not_decide_its_side(word) -> None:
    # The token of `####` begins with the space that still belongs to the reasoning.
    example = make(word, "we have 2. #### 2")
    assert flagged(word, example, example.reasoning) == ["we", "have", "2", "."]
    assert flagged(word, example, example.answer) == ["####", "2", "<eos>"]


def test_tags_belong_to_neither_side(tokenizer) -> None:
    example = make(tokenizer, TRACE)
    told = "".join(flagged(tokenizer, example, example.reasoning))
    assert told == "atfirst2.2doublesto4."
    assert "".join(flagged(tokenizer, example, example.answer)) == "####4<eos>"


def test_alignment_by_hand(bars) -> None:
    batch = tokens.collate([make(bars, "a|b</think>c|d"), make(bars, "e", finished=False)], PAD)
    assert batch.input_ids.tolist() == [[1, 8, 5, 4, 6, 4, 7], [1, 8, 0, 0, 0, 0, 0]]
    assert batch.targets.tolist() == [[8, 5, 4, 6, 4, 7, 2], [8, 9, 0, 0, 0, 0, 0]]
    assert batch.mask.int().tolist() == [[0, 1, 1, 1, 1, 1, 1], [0, 1, 0, 0, 0, 0, 0]]
    assert batch.reasoning.int().tolist() == [[0, 1, 1, 0, 0, 0, 0], [0] * 7]
    assert batch.answer.int().tolist() == [[0, 0, 0, 0, 1, 1, 1], [0] * 7]


def test_the_shift_is_an_identity(tokenizer) -> None:
    examples = [make(tokenizer, TRACE), make(tokenizer, "<think> start with 3.", finished=False)]
    batch = tokens.collate(examples, tokenizer.pad_token_id)
    for row, example in enumerate(examples):
        whole = torch.tensor(example.prompt + example.completion)
        assert torch.equal(batch.input_ids[row, : len(whole) - 1], whole[:-1])
        assert torch.equal(batch.targets[row, : len(whole) - 1], whole[1:])
        # Masked in are the completion's tokens, all of them, and nothing else.
        assert tuple(batch.targets[row][batch.mask[row]].tolist()) == example.completion
        assert tuple(batch.reasoning[row][batch.mask[row]].tolist()) == example.reasoning
        assert tuple(batch.answer[row][batch.mask[row]].tolist()) == example.answer


def test_the_end_is_learned_when_it_came_and_not_when_the_trace_was_cut(tokenizer) -> None:
    eos = tokenizer.eos_token_id
    whole, cut = make(tokenizer, TRACE), make(tokenizer, TRACE, finished=False)
    assert whole.completion == (*cut.completion, eos)
    assert whole.answer[-1]
    assert not whole.reasoning[-1]
    batch = tokens.collate([whole, cut], tokenizer.pad_token_id)
    assert (batch.targets[0][batch.mask[0]] == eos).sum() == 1
    assert (batch.targets[1][batch.mask[1]] == eos).sum() == 0


def test_ids_a_model_wrote_give_the_same_example_as_their_text(tokenizer) -> None:
    for text in (TRACE, "<think> start with 3.", "#### 4", "we have 2. #### 2"):
        for finished in (True, False):
            expected = make(tokenizer, text, finished=finished)
            found = tokens.from_ids(
                tokenizer,
                expected.prompt,
                expected.completion,
                boundary=Boundary(),
                max_length=256,
                id="x",
            )
            assert found == expected


def test_tokens_the_tokenizer_would_not_have_chosen_keep_their_offsets(pieces) -> None:
    text = "<think> at first 2. </think> #### 2"
    ids = pieces.convert_tokens_to_ids(list("▁" + text.replace(" ", "▁")))
    assert tokens.decode(pieces, ids) == text
    assert list(pieces(text, add_special_tokens=False)["input_ids"]) != ids
    example = tokens.from_ids(pieces, (BOS,), ids, boundary=Boundary(), max_length=256)
    assert example.completion == tuple(ids)
    letters = "▁" + text

    def told(flags: tuple[bool, ...]) -> str:
        return "".join(x for x, flag in zip(letters, flags, strict=True) if flag)

    assert told(example.reasoning) == " at first 2. "
    assert told(example.answer) == " #### 2"


def test_a_trace_that_does_not_fit_is_refused_with_its_size(word) -> None:
    prompt = len(tokens.encode_prompt(word, QUESTION))
    completion = len(make(word, "#### 4").completion)
    assert len(make(word, "#### 4", max_length=prompt + completion)) == prompt + completion
    message = (
        rf"trace 'x' has {prompt} prompt and {completion} completion tokens, "
        rf"{prompt + completion} in all, but the context holds {prompt + completion - 1}"
    )
    with pytest.raises(ValueError, match=message):
        make(word, "#### 4", max_length=prompt + completion - 1)


def test_an_empty_completion_is_refused(word) -> None:
    with pytest.raises(ValueError, match="trace 'x' has an empty completion"):
        make(word, "", finished=False)
    assert make(word, "").completion == (word.eos_token_id,)


def test_a_tokenizer_without_a_chat_template_is_refused() -> None:
    bare = build("word")
    bare.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        tokens.encode_prompt(bare, QUESTION)


FRAGMENTS = ["<think>", "</think>", "####", "\\boxed{", "Answer:", "at", "2", ".", " ", "\n", "zz"]


@given(
    texts=st.lists(
        st.lists(st.sampled_from(FRAGMENTS), max_size=12).map("".join), min_size=1, max_size=3
    ),
    kind=st.sampled_from(["word", "pieces"]),
)
def test_masks_never_overlap_and_lie_inside_the_completion(word, pieces, texts, kind) -> None:
    tokenizer = {"word": word, "pieces": pieces}[kind]
    examples = [make(tokenizer, text) for text in texts]
    batch = tokens.collate(examples, tokenizer.pad_token_id)
    assert not (batch.reasoning & batch.answer).any()
    assert not ((batch.reasoning | batch.answer) & ~batch.mask).any()
    assert batch.mask.sum().item() == sum(len(example.completion) for example in examples)
    for text, example in zip(texts, examples, strict=True):
        # Where an answer might be, nothing may be called reasoning.
        if "<think>" not in text and "</think>" not in text and "####" in text:
            encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
            ends = [end for _, end in encoded["offset_mapping"]]
            # The last flag is the end-of-sequence token's, which has no place in the text.
            told = [end for end, flag in zip(ends, example.reasoning[:-1], strict=True) if flag]
            assert max(told, default=0) <= text.index("####")
