"""Mark text with a keyed list of likelier tokens, and compute how surely a text carries the mark.

The last `context` tokens and a secret key divide the vocabulary into green and red tokens, and
green ones get a little more probability. The owner of the key detects the mark by counting the
green tokens of a text.

    logits[v] <- logits[v] + strength [v is green after these tokens]

Each token is green by an independent draw with probability `share`. The paper takes a fixed number
of green tokens instead. With independent draws the count over unmarked text is exactly binomial,
and the list does not depend on how far an engine pads its vocabulary.

Reference: Kirchenbauer et al. 2023, "A Watermark for Large Language Models", arXiv:2301.10226;
counting each pair once is from Fernandez et al. 2023, "Three Bricks to Consolidate Watermarks for
Large Language Models", arXiv:2308.00113.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float
from pydantic import Field
from scipy.stats import binom
from torch import Tensor

from azeotrope.decoding import DecodingRow
from azeotrope.defenses.base import Defense, DefenseConfig, Detection, Suspect, TokenizedTexts

PUBLIC_KEY = "public"
SHARE = 0.25
CONTEXT = 4
STEPS = 256
"""A byte is drawn for each token, so shares are multiples of 1/256."""
CACHED_LISTS = 1024
"""Green lists that stay in memory: 156 MB at a vocabulary of 151,936, on the logits' device."""
PURPOSE = b"azeotrope mark 1"
"""Part of every draw, so that another use of the same secret reveals nothing about the lists."""


class Config(DefenseConfig):
    name: Literal["watermark"] = "watermark"
    strength: float = Field(
        default=2.0, ge=0, description="added to green tokens' logits, in nats; the paper's delta"
    )
    share: float = Field(
        default=SHARE,
        ge=1 / STEPS,
        le=1 - 1 / STEPS,
        description="probability that a token is green, the paper's gamma, to the nearest 1/256",
    )
    context: int = Field(
        default=CONTEXT,
        ge=1,
        le=16,
        description="previous tokens that decide the list. With 1 an attacker can read the lists "
        "off by counting, and a small vocabulary soon has no new pair to count, so that more text "
        "proves no more. With many, each token that is changed hides as many others",
    )
    key: str = Field(
        default=PUBLIC_KEY,
        min_length=1,
        repr=False,
        description="the secret, as text. The default is for experiments: it is public, so "
        "everyone can detect, remove and forge the mark, and `azeotrope serve` refuses it. "
        "Run folders keep the configuration: use another key there than the one that serves",
    )


@dataclass(frozen=True, kw_only=True)
class GreenCount(Detection):
    """How many of the different (context, token) pairs of texts are green."""

    green: int


class Watermark(Defense):
    """Raises the logits of green tokens behind a complete context.

    The prompt's last tokens belong to the context. A client who fetches a text a few tokens at a
    time, each time with what it has as the prompt, gets the same mark as one who fetches it whole.
    A detector seldom has the prompt, so it does not count the first `context` tokens of a text.
    """

    stage = "decoding"
    config: Config

    @property
    def uses_public_key(self) -> bool:
        """Whether everyone can detect, remove and forge the mark; a server refuses to start."""
        return self.config.key == PUBLIC_KEY

    def adjust_rows(
        self, logits: Float[Tensor, "rows vocab"], rows: Sequence[DecodingRow]
    ) -> Float[Tensor, "rows vocab"]:
        """Raise green tokens after the last tokens of prompt and completion together."""
        size = self.config.context
        tails = [[*row.prompt[-size:], *row.written[-size:]] for row in rows]
        return self.adjust_logits(logits, tails)

    def adjust_logits(
        self, logits: Float[Tensor, "rows vocab"], prefixes: list[list[int]]
    ) -> Float[Tensor, "rows vocab"]:
        """Raise green tokens; the result is the same on every device and beside any other rows."""
        if self.is_identity or not prefixes:
            return logits
        contexts = [tuple(prefix[-self.config.context :]) for prefix in prefixes]
        # Rows often share a context; its list is made and stacked once for all of them.
        index_of = {context: index for index, context in enumerate(dict.fromkeys(contexts))}
        lists = torch.stack([self._list(key, logits.shape[-1], logits.device) for key in index_of])
        rows = torch.tensor([index_of[context] for context in contexts], device=logits.device)
        # Memory for only one tensor of the logits' size: the sum is written into the product.
        return lists[rows].to(logits.dtype).mul_(self.config.strength).add_(logits)

    def _list(self, context: tuple[int, ...], vocab: int, device: torch.device) -> Tensor:
        if len(context) < self.config.context:
            return torch.zeros(vocab, dtype=torch.bool, device=device)
        return _cached_list(self.config.key, self.config.share, context, vocab, device)

    def detect(self, evidence: TokenizedTexts | Suspect) -> GreenCount:
        """Look for this defense's own mark in texts; see the function `detect`.

        Raises:
            TypeError: if the evidence is a model.
            ValueError: if a token id is negative, as padding sometimes is.
        """
        if isinstance(evidence, Suspect):
            raise TypeError("a watermark is detected in texts; let the model write some first")
        config = self.config
        return detect(evidence, key=config.key, share=config.share, context=config.context)


def build(config: Config) -> Watermark:
    return Watermark(config)


def green_list(
    context: Sequence[int], vocab: int, *, key: str, share: float = SHARE
) -> Bool[np.ndarray, " vocab"]:
    """Whether each token of the vocabulary is green after `context`.

    BLAKE2b over key and context seeds Philox, and token v is green if byte v of its output is less
    than 256 share. Both compute with integers only and give the same list on every machine. A
    longer vocabulary continues the list of a shorter one. The list of one context reveals nothing
    about the list of another.

    Raises:
        ValueError: if the key is empty.
    """
    if not key:
        raise ValueError("the watermark's key is empty; give the one that the text was marked with")
    message = np.asarray(context, dtype="<i8").tobytes()
    # BLAKE2b takes a key of at most 64 bytes, which is the size of the hash of any key.
    secret = hashlib.blake2b(key.encode()).digest()
    seed = hashlib.blake2b(message, digest_size=16, key=secret, person=PURPOSE).digest()
    words = np.random.Philox(key=int.from_bytes(seed, "little")).random_raw(-(-vocab // 8))
    drawn = words.astype("<u8", copy=False).view(np.uint8)[:vocab]
    return drawn < round(share * STEPS)


@lru_cache(maxsize=CACHED_LISTS)
def _cached_list(
    key: str, share: float, context: tuple[int, ...], vocab: int, device: torch.device
) -> Tensor:
    return torch.from_numpy(green_list(context, vocab, key=key, share=share)).to(device)


def detect(
    completions: TokenizedTexts,
    *,
    key: str,
    share: float = SHARE,
    context: int = CONTEXT,
) -> GreenCount:
    """Test whether texts carry the mark of a key, all of them together.

    Each different pair of a context and the token after it is counted once, however often it is
    written: its colour is one draw. Under the hypothesis that the texts were written without the
    key, the colours of n different pairs are n independent draws, so

        p = P(Binomial(n, share) >= green)

    is exact, whatever the texts are and however much they repeat themselves. The probability is
    over keys: two unmarked texts that share phrases get similar p-values from one key. A test of
    several keys must divide its threshold by their number.

    Args:
        completions: token ids of the teacher's tokenizer, one sequence per text. No prompts: their
            tokens would be counted too. Pairs never cross from one text to the next.
        key: the secret of the defense.
        share: the defense's share of green tokens.
        context: the previous tokens that decide a list, as in the defense.

    Returns:
        A p-value of 1 if there is nothing to count.

    Raises:
        ValueError: if the key is empty, or an id is negative, as padding sometimes is.
    """
    green = scored = 0
    for preceding, tokens in _followers(completions, context).items():
        colours = green_list(preceding, max(tokens) + 1, key=key, share=share)
        green += int(colours[list(tokens)].sum())
        scored += len(tokens)
    probability = drawn_share(share)
    tail = binom.sf(green - 1, scored, probability)
    deviation = math.sqrt(scored * probability * (1 - probability))
    z = (green - scored * probability) / deviation if scored else 0.0
    return GreenCount(green=green, scored=scored, p_value=float(tail), z=z)


def _followers(completions: TokenizedTexts, context: int) -> dict[tuple[int, ...], set[int]]:
    """The different tokens after each context."""
    followers: dict[tuple[int, ...], set[int]] = {}
    for text in completions:
        # Equal scalars of torch are different keys of a dictionary; integers are not.
        ids = [int(token) for token in text]
        if min(ids, default=0) < 0:
            raise ValueError(f"token ids are at least 0, got {min(ids)}; take the padding out")
        for end in range(context, len(ids)):
            followers.setdefault(tuple(ids[end - context : end]), set()).add(ids[end])
    return followers


def drawn_share(share: float) -> float:
    """The share that the lists have in fact: a multiple of 1/256."""
    return round(share * STEPS) / STEPS
