"""What is learned are the tokens that a model writes behind its prompt, tags included."""

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from azeotrope.tokens import Boundary, decode, encode, encode_prompt, from_ids

SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "[INST]", "[/INST]"]
TEXTS = ["The answer is 18 .", "First take 2 , so 3 .", "how many eggs ?"]
DIRECT = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}"
    "[INST]{{ m['content'] }}[/INST]"
    "{% else %}{{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
)
SPACED = DIRECT.replace("{% else %}{{ m", "{% else %} {{ m")
QUESTION = [{"role": "user", "content": "how many eggs ?"}]


def sentencepiece(scheme: str, template: str) -> PreTrainedTokenizerFast:
    """Byte pairs with a mark for spaces, as SentencePiece makes them."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme=scheme)
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=SPECIAL, show_progress=False)
    tokenizer.train_from_iterator([*TEXTS, *(" " + t for t in TEXTS)] * 50, trainer)
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
    fast.chat_template = template
    return fast


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("scheme", ["first", "always", "never"])
@pytest.mark.parametrize("template", [DIRECT, SPACED])
def test_the_learned_ids_are_those_of_the_whole_conversation(
    scheme: str, template: str, text: str
) -> None:
    tokenizer = sentencepiece(scheme, template)
    answered = [*QUESTION, {"role": "assistant", "content": text}]
    whole = tokenizer.apply_chat_template(answered, tokenize=True, return_dict=False)
    example = encode(tokenizer, QUESTION, text, boundary=Boundary(), max_length=256)
    assert [*example.prompt, *example.completion] == whole
    assert decode(tokenizer, example.completion).strip() == text


def test_it_matters_for_sentencepiece() -> None:
    tokenizer = sentencepiece("first", DIRECT)
    alone = tokenizer(TEXTS[0], add_special_tokens=False)["input_ids"]
    example = encode(tokenizer, QUESTION, TEXTS[0], boundary=Boundary(), max_length=256)
    assert list(example.completion[:-1]) != alone


def test_marks_follow_the_words_behind_a_prompt() -> None:
    tokenizer = sentencepiece("first", SPACED)
    text = "First take 2 , so 3 . #### 3"
    example = encode(tokenizer, QUESTION, text, boundary=Boundary(), max_length=256)
    pairs = zip(example.completion, example.reasoning, strict=True)
    reasoning = decode(tokenizer, [id for id, flag in pairs if flag])
    assert reasoning.strip() == "First take 2 , so 3 ."


@pytest.mark.parametrize("tags", [("<think>", "</think>"), ("[THINK]", "[/THINK]")])
def test_tags_that_are_special_tokens_stay_in_the_text(tags: tuple[str, str]) -> None:
    tokenizer = sentencepiece("never", DIRECT)
    tokenizer.add_tokens([AddedToken(tag, special=True) for tag in tags], special_tokens=True)
    opening, closing = tags
    text = f"{opening}First take 2{closing}The answer is 18 ."
    boundary = Boundary(open_tag=opening, close_tag=closing)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert decode(tokenizer, [*ids, tokenizer.eos_token_id]) == text
    prompt = encode_prompt(tokenizer, QUESTION)
    ended = [*ids, tokenizer.eos_token_id]
    written = from_ids(tokenizer, prompt, ended, boundary=boundary, max_length=256)
    read = encode(tokenizer, QUESTION, text, boundary=boundary, max_length=256)
    assert written == read
    inside = [id for id, flag in zip(ids, written.reasoning, strict=False) if flag]
    assert decode(tokenizer, inside) == "First take 2"


def test_special_tokens_with_a_role_stay_out_of_the_text() -> None:
    tokenizer = sentencepiece("never", DIRECT)
    ids = tokenizer("The answer", add_special_tokens=False)["input_ids"]
    assert decode(tokenizer, [1, *ids, 2, 0]) == "The answer"
