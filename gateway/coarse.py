"""Numbers that clients choose or see, made coarse enough to tell nothing about hidden ones."""

import hmac
import math
from collections.abc import Sequence

CELL = 0.05
"""Width of the cells within which all values of top_p act alike."""
LENGTH_CELL = 32
"""Tokens within which the lengths of completions with hidden reasoning look alike."""


def coarse_top_p(
    top_p: float, prompt: Sequence[int], key: bytes, bounds: tuple[float, float] = (0.0, 1.0)
) -> float:
    """The nucleus that is used for a requested one: the middle of a secret cell of width `CELL`.

    The smallest nucleus that lets a second token through is the probability of the first one, and
    a client can search for it by bisection, without any log-probabilities. So all values of a cell
    act alike, and where the cells begin depends on a secret of the account and on the prompt. What
    can be found is a probability to within half a cell.
    """
    if top_p >= 1:
        return 1.0
    shift = _fraction(key, tuple(prompt)) / 2**64
    middle = (math.floor(top_p / CELL + shift) - shift + 0.5) * CELL
    return min(max(middle, CELL / 4, bounds[0]), bounds[1])


def coarse_length(tokens: int, shift: int) -> int:
    """A number of tokens as clients see it whose reasoning is hidden: the end of its cell.

    A client may begin the reasoning in the prompt. If it guessed the teacher's own words, greedy
    decoding writes exactly that many tokens fewer, so exact lengths would confirm hidden text token
    by token. Cells are `LENGTH_CELL` wide, and a secret decides for each prompt where they begin.
    """
    return -(-(tokens + shift) // LENGTH_CELL) * LENGTH_CELL


def coarse_limit(limit: int, shift: int) -> int:
    """The end of the last whole cell within a limit: a limit tells lengths apart too."""
    return max((limit + shift) // LENGTH_CELL * LENGTH_CELL - shift, 1)


def _fraction(key: bytes, purpose: object) -> int:
    """A secret number in [0, 2^64) that belongs to an account and a purpose."""
    return int.from_bytes(hmac.digest(key, repr(purpose).encode(), "sha256")[:8], "big")


def length_shift(prompts: Sequence[Sequence[int]], key: bytes) -> int:
    """Where the cells of hidden lengths begin for these prompts, in tokens."""
    return _fraction(key, [tuple(prompt) for prompt in prompts]) * LENGTH_CELL >> 64
