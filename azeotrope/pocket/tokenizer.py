"""Two Hugging Face fast tokenizers with one chat template: whole words, and byte-pair pieces.

`word` gives each word and each number 0..20 one token; the teacher, the proxies and the students of
its family use it. `pieces` is a byte-pair encoding with single digits, so that one student reads
the same text with another vocabulary.
"""

from random import Random
from typing import Literal

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from azeotrope.pocket import language
from azeotrope.pocket.problems import ASKED, LARGEST, NAMES, QUESTIONS, STARTS, THINGS, problems

Kind = Literal["word", "pieces"]
SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>")
FORMAT = ("<think>", "</think>", "####")
PIECES_VOCAB = 400
# The tags are ordinary words, so that decoding gives back the text exactly.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ ' ' + message['content'] + eos_token }}"
    "{% else %}{{ message['content'] }}{% endif %}{% endfor %}"
)
_SPACE = "▁"
_PUNCTUATION = Regex(r"[.?]")


def _words() -> list[str]:
    """Every word that the generator can write, from its templates."""
    fields = {"name": "joe", "things": "eggs", "v": "1", "k": "1", "a": "1", "c": "1"}
    templates = [
        *STARTS,
        *QUESTIONS,
        *[text for group in ASKED.values() for text in group],
        *language.OPENINGS,
        *language.CONNECTORS,
        *language.ENDINGS,
        *[text for group in language.CLAUSES.values() for text in group],
    ]
    words = {word for text in templates for word in text.format(**fields).rstrip(".?").split()}
    numbers = [str(value) for value in range(LARGEST + 1)]
    return sorted({*words, *NAMES, *THINGS, *numbers, *language.WORDS, *FORMAT} - {""})


def _build_word() -> Tokenizer:
    vocabulary = [*SPECIAL, ".", "?", *(_SPACE + word for word in _words())]
    tokenizer = Tokenizer(
        models.WordLevel({token: i for i, token in enumerate(vocabulary)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Metaspace(replacement=_SPACE, prepend_scheme="always"),
            pre_tokenizers.Split(_PUNCTUATION, behavior="isolated"),
        ]
    )
    tokenizer.decoder = decoders.Metaspace(replacement=_SPACE, prepend_scheme="always")
    return tokenizer


def _build_pieces() -> Tokenizer:
    rng = Random("pocket-v1:pieces")
    stream = problems("train", seed=1)
    lines: list[str] = []
    for problem, _ in zip(stream, range(2000), strict=False):
        lines.append(problem.question)
        for notation in ("digits", "words"):
            lines.append(language.reasoning(problem, rng, notation=notation))
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Metaspace(replacement=_SPACE, prepend_scheme="always"),
            pre_tokenizers.Split(_PUNCTUATION, behavior="isolated"),
            pre_tokenizers.Digits(individual_digits=True),
        ]
    )
    tokenizer.decoder = decoders.Metaspace(replacement=_SPACE, prepend_scheme="always")
    trainer = trainers.BpeTrainer(
        vocab_size=PIECES_VOCAB, special_tokens=list(SPECIAL), show_progress=False
    )
    tokenizer.train_from_iterator(lines, trainer)
    return tokenizer


def build(kind: Kind) -> PreTrainedTokenizerFast:
    """The tokenizer, built from the generator only: no corpus and no download."""
    backend = _build_word() if kind == "word" else _build_pieces()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
        model_max_length=256,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer
