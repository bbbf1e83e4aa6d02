"""Mark text with a keyed list of likelier tokens, and say how surely a text carries the mark.

The last `context` tokens and a secret key divide the vocabulary into green and red tokens, and
green ones get a little more probability. Whoever has the key counts the green tokens of a text.

    logits[v] <- logits[v] + strength [v is green after these tokens]

Each token is green by a draw of its own, as likely as `share` says. The paper takes a fixed number
of green tokens instead. With draws of their own the count over innocent text is exactly binomial,
and the list does not depend on how far an engine pads its vocabulary.

Reference: Kirchenbauer et al. 2023, "A Watermark for Large Language Models", arXiv:2301.10226;
counting each pair once is from Fernandez et al. 2023, "Three Bricks to Consolidate Watermarks for
Large Language Models", arXiv:2308.00113.
"""

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal, SupportsInt

import numpy as np
import torch
from jaxtyping import Bool, Float
from pydantic import Field
from scipy.stats import binom
from torch import Tensor

from azeotrope.defenses.base import Defense, DefenseConfig

PUBLIC_KEY = "public"
SHARE = 0.25
CONTEXT = 4
STEPS = 256
"""A byte is drawn for each token, so shares are multiples of 1/256."""
LISTS = 1024
"""Green lists kept ready: 156 MB at a vocabulary of 151,936, on the device of the logits."""
PURPOSE = b"azeotrope mark 1"
"""Part of every draw: the same secret used elsewhere gives nothing away about the lists."""


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
        description="previous tokens that decide the list. With 1 a thief can read the lists off "
        "by counting, and a small vocabulary soon has no new pair to count, so more text proves "
        "no more; with many, each token that somebody changes hides as many others",
    )
    key: str = Field(
        default=PUBLIC_KEY,
        min_length=1,
        repr=False,
        description="the secret, as text. The default is for experiments: everybody knows it, so "
        "everybody can detect, remove and forge the mark, and `azeotrope serve` refuses it. "
        "Run folders keep the configuration: use another key there than the one that serves",
    )


@dataclass(frozen=True)
class Detection:
    """How many of the different (context, token) pairs of a text are green."""

    green: int
    scored: int
    p_value: float
    """How often innocent text has at least so many green pairs."""
    z: float = field(default=0.0, compare=False)
    """Standard deviations above what innocent text has on average. To be read, not to judge by:
    the p-value is exact where the normal distribution is not."""


class Watermark(Defense):
    """Raises green tokens; a row with fewer than `context` tokens so far is left alone.

    Its tokens would all be judged by one list, that of the empty context, and who finds a piece of
    text in the middle of something does not know what stood before it. The prompt does not count
    for the same reason: a detector seldom has it.
    """

    stage = "decoding"
    config: Config

    @property
    def uses_public_key(self) -> bool:
        """Whether everybody can detect, remove and forge the mark; a server refuses to start."""
        return self.config.key == PUBLIC_KEY

    def adjust_logits(
        self, logits: Float[Tensor, "rows vocab"], prefixes: list[list[int]]
    ) -> Float[Tensor, "rows vocab"]:
        """The same on every device and whatever the other rows are."""
        if self.is_identity or not prefixes:
            return logits
        contexts = [tuple(prefix[-self.config.context :]) for prefix in prefixes]
        # Rows often share a context, and the list is made and stacked once for all of them.
        place = {context: index for index, context in enumerate(dict.fromkeys(contexts))}
        lists = torch.stack([self._list(one, logits.shape[-1], logits.device) for one in place])
        rows = torch.tensor([place[context] for context in contexts], device=logits.device)
        # One tensor as large as the logits is made, and the sum is written into it.
        return lists[rows].to(logits.dtype).mul_(self.config.strength).add_(logits)

    def _list(self, context: tuple[int, ...], vocab: int, device: torch.device) -> Tensor:
        if len(context) < self.config.context:
            return torch.zeros(vocab, dtype=torch.bool, device=device)
        return _kept_list(self.config.key, self.config.share, context, vocab, device)

    def detect(self, completions: Iterable[Iterable[SupportsInt]]) -> Detection:
        """Look for this defense's own mark: see the function `detect`."""
        config = self.config
        return detect(completions, key=config.key, share=config.share, context=config.context)


def build(config: Config) -> Watermark:
    return Watermark(config)


def green_list(
    context: Sequence[int], vocab: int, *, key: str, share: float = SHARE
) -> Bool[np.ndarray, " vocab"]:
    """Whether each token of the vocabulary is green after `context`.

    BLAKE2b over key and context seeds Philox, and token v is green if byte v of what it draws is
    less than 256 share. Both are integers throughout and the same on every machine, a longer
    vocabulary continues the list of a shorter one, and who has learned the whole list of one
    context knows nothing about the next.

    Raises:
        ValueError: if the key is empty.
    """
    if not key:
        raise ValueError("the watermark's key is empty; give the one that the text was marked with")
    before = np.asarray(context, dtype="<i8").tobytes()
    # BLAKE2b takes 64 bytes of key; a hash of the key has as many, however long the key is.
    secret = hashlib.blake2b(key.encode()).digest()
    seed = hashlib.blake2b(before, digest_size=16, key=secret, person=PURPOSE).digest()
    words = np.random.Philox(key=int.from_bytes(seed, "little")).random_raw(-(-vocab // 8))
    drawn = words.astype("<u8", copy=False).view(np.uint8)[:vocab]
    return drawn < round(share * STEPS)


@lru_cache(maxsize=LISTS)
def _kept_list(
    key: str, share: float, context: tuple[int, ...], vocab: int, device: torch.device
) -> Tensor:
    return torch.from_numpy(green_list(context, vocab, key=key, share=share)).to(device)


def detect(
    completions: Iterable[Iterable[SupportsInt]],
    *,
    key: str,
    share: float = SHARE,
    context: int = CONTEXT,
) -> Detection:
    """Test whether texts carry the mark of a key, all of them together.

    Each different pair of a context and the token after it is counted once, however often it is
    written: its colour is one draw. Under the hypothesis that the texts were written without the
    key, the colours of n different pairs are n independent draws, so

        p = P(Binomial(n, share) >= green)

    is exact, whatever the texts are and however much they repeat themselves. The p-value is over
    keys: two innocent texts that share phrases get similar p-values from one key. Who tries
    several keys or customers must divide the threshold by their number.

    Args:
        completions: token ids of the teacher's tokenizer, one sequence a text. No prompts: their
            words would be counted too. Pairs never cross from one text to the next.
        key, share, context: those of the defense.

    Returns:
        A p-value of 1 if there is nothing to count.

    Raises:
        ValueError: if the key is empty, or an id is negative, as padding sometimes is.
    """
    return judge(different_pairs(completions, context), key=key, share=share)


Pairs = dict[tuple[int, ...], set[int]]
"""The different tokens after each context."""


def different_pairs(completions: Iterable[Iterable[SupportsInt]], context: int = CONTEXT) -> Pairs:
    """What `detect` counts, without a key: who tries many keys collects it once.

    Raises:
        ValueError: if an id is negative, as padding sometimes is.
    """
    followers: Pairs = {}
    for text in completions:
        # Scalars of torch that are equal are still different keys of a dictionary.
        ids = [int(token) for token in text]
        if min(ids, default=0) < 0:
            raise ValueError(f"token ids are at least 0, got {min(ids)}; take the padding out")
        for place in range(context, len(ids)):
            followers.setdefault(tuple(ids[place - context : place]), set()).add(ids[place])
    return followers


def judge(pairs: Pairs, *, key: str, share: float = SHARE) -> Detection:
    """Count the green pairs of one key: the second half of `detect`.

    Raises:
        ValueError: if the key is empty.
    """
    green = 0
    for before, tokens in pairs.items():
        colours = green_list(before, max(tokens) + 1, key=key, share=share)
        green += int(colours[list(tokens)].sum())
    scored = sum(map(len, pairs.values()))
    exact = drawn_share(share)
    tail = binom.sf(green - 1, scored, exact)
    spread = math.sqrt(scored * exact * (1 - exact))
    z = (green - scored * exact) / spread if scored else 0.0
    return Detection(green, scored, float(tail), z)


def drawn_share(share: float) -> float:
    """The share that the lists really have: a multiple of 1/256."""
    return round(share * STEPS) / STEPS
