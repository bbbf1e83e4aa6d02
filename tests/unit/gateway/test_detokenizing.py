"""From tokens to text: no text is lost or given out too early."""

import pytest
from completions_made import BUILDERS, encoded, gpt2_alphabet, tokenizer_named
from hypothesis import example, given
from hypothesis import strategies as st

from azeotrope.tokens import decode
from gateway.answers.detokenizing import Detokenizer


@pytest.mark.parametrize("name", BUILDERS)
@given(data=st.data())
def test_text_of_any_ids_is_that_of_decode(name: str, data: st.DataObject) -> None:
    tokenizer = tokenizer_named(name)
    # One id beyond the vocabulary is included, because a head may be padded.
    ids = data.draw(st.lists(st.integers(0, len(tokenizer)), max_size=30))
    stream = Detokenizer(tokenizer)
    steps = [stream.step(id) for id in ids]
    assert "".join(steps) + stream.flush() == decode(tokenizer, ids)
    assert stream.flush() == ""


@given(st.text(max_size=20))
@example("é漢🙂👩‍👩‍👧 ab")
def test_half_a_character_is_never_written(text: str) -> None:
    text = text.replace("\N{REPLACEMENT CHARACTER}", "")
    for name in ("gpt2", "llama2"):
        tokenizer = tokenizer_named(name)
        if name == "gpt2":
            alphabet = gpt2_alphabet()
            ids = [tokenizer.convert_tokens_to_ids(alphabet[b]) for b in text.encode()]
        else:
            ids = [tokenizer.convert_tokens_to_ids(f"<0x{b:02X}>") for b in text.encode()]
        stream = Detokenizer(tokenizer)
        pieces = [stream.step(id) for id in ids] + [stream.flush()]
        assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)
        # A leading space belongs to Llama 2's first token and is dropped by its own decoder.
        assert "".join(pieces) == decode(tokenizer, ids)


def test_words_are_given_out_as_soon_as_they_are_written(word) -> None:
    stream = Detokenizer(word)
    pieces = [stream.step(id) for id in [*encoded(word, "joe has 4 eggs."), word.eos_token_id]]
    assert pieces == ["joe", " has", " 4", " eggs", ".", ""]
