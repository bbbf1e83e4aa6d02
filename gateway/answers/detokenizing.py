"""From token ids to text while a completion is being written."""

import re

from transformers import PreTrainedTokenizerBase

from azeotrope.tokens import decode

_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_UNFINISHED = "\N{REPLACEMENT CHARACTER}"


class Detokenizer:
    """Text of one completion, token by token; joined, it equals `tokens.decode` of all ids.

    `tokenizers.decoders.DecodeStream` does not have this property. It gives out the bytes of a run
    that turns out not to be UTF-8, then fails, and it cannot flush what it holds at the end.

    The method is the usual one: each step decodes the last tokens together with those before them.
    Text is held back in three cases: after a token that spells a byte, because only the end of the
    run says whether it is UTF-8; after a token that has no text of its own; and while the last
    character is incomplete. A tokenizer that cleans up spaces changes text that it has already
    written, so all of it is held back to the end.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._before: list[int] = []
        self._pending: list[int] = []
        # Characters of the decoded `before` ids, all of which were given out.
        self._written = 0
        self._rewrites = _cleans_up(tokenizer)

    def step(self, token_id: int) -> str:
        """The text that is certain now that this token is written; often the token's own text."""
        self._pending.append(token_id)
        name = self._tokenizer.convert_ids_to_tokens(token_id)
        if self._rewrites or (isinstance(name, str) and _BYTE.fullmatch(name)):
            return ""
        alone = decode(self._tokenizer, [token_id])
        if not alone:
            return ""
        text = decode(self._tokenizer, self._before + self._pending)
        if text.endswith(_UNFINISHED):
            return ""
        piece = text[self._written :]
        # Some decoders drop the space of the first token they see. Keeping the last tokens as
        # context puts that loss on tokens whose text was given out before.
        context = alone if len(self._pending) == 1 else decode(self._tokenizer, self._pending)
        self._before, self._pending, self._written = self._pending, [], len(context)
        return piece

    def flush(self) -> str:
        """The text that is still held back when the completion ends."""
        text = decode(self._tokenizer, self._before + self._pending)
        piece, self._written = text[self._written :], len(text)
        return piece


def _cleans_up(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether decoding removes spaces before punctuation; transformers never does it for BPE."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    is_bpe = backend is not None and type(backend.model).__name__ == "BPE"
    return bool(getattr(tokenizer, "clean_up_tokenization_spaces", False)) and not is_bpe
