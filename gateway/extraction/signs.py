"""Signs that a key's requests collect a data set: how each is measured, and what it weighs."""

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean, pstdev

from gateway.extraction.footprint import Observation

HARMLESS = 15
"""Requests without any sign that are added to each key's: 20 like a thief's are not yet a thief."""
SAME_TEMPLATE = 5
"""Distinct prompts that must share a form before it counts as one."""
LONG = 16
"""Tokens from which an answer is worth distilling; a label with its probability is shorter."""
HOUR, DAY = 3600.0, 86400.0
LEAST_SPAN = 600.0
"""Seconds from which evenness means something: people are busy for some minutes too."""

Measured = tuple[float, str]


@dataclass(frozen=True)
class Sign:
    """Evidence rises from 0 at `low` to 1 at `high`; `weight` is what it adds at most."""

    measure: Callable[[Sequence[Observation]], Measured]
    low: float
    high: float
    weight: float


def ramp(value: int | float, low: int | float, high: int | float) -> float:
    """0 at `low` and below, 1 at `high` and above."""
    return min(1.0, max(0.0, (value - low) / (high - low)))


def _share(count: int, total: int) -> float:
    return count / (total + HARMLESS)


def _shrunk(value: float, total: int) -> float:
    """The mean of a value over requests of which the harmless ones have 0."""
    return value * total / (total + HARMLESS)


def _span(seen: Sequence[Observation]) -> float:
    return max(seen[-1].at - seen[0].at, 60.0)


def _spread(values: Iterable[float]) -> float:
    """Standard deviation over mean."""
    listed = list(values)
    mean = fmean(listed)
    return pstdev(listed) / mean if mean else 0.0


def _distinct(seen: Sequence[Observation]) -> list[Observation]:
    """One observation of each prompt."""
    return list({item.prompt: item for item in seen}.values())


def volume(seen: Sequence[Observation]) -> Measured:
    """Requests a day at the window's pace; a person hardly sends a thousand."""
    pace = len(seen) / _span(seen) * DAY
    return _shrunk(pace, len(seen)), f"{pace:,.0f} requests a day"


def steadiness(seen: Sequence[Observation]) -> Measured:
    """How evenly requests come, in twelve parts of the window or over the hours of the day.

    Even is a spread of 0.3 between the parts (1 and above is a person's), or 22 hours of the day
    with requests (14 is a waking day). Bins, not gaps: jitter and parallel requests change gaps.
    """
    span = _span(seen)
    if span < LEAST_SPAN:
        return 0.0, ""
    bins = Counter(min(11, int(12 * (item.at - seen[0].at) / span)) for item in seen)
    spread = _spread(bins[part] for part in range(12))
    hours = len({int(item.at // HOUR) % 24 for item in seen}) if span >= DAY else 0
    value = max(1 - ramp(spread, 0.3, 1.0), ramp(hours, 14, 22))
    clock = f", in {hours} hours of the day" if hours else ""
    words = f"requests come evenly over {span / HOUR:.1f} h (spread {spread:.2f}){clock}"
    return _shrunk(value, len(seen)), words


def template(seen: Sequence[Observation]) -> Measured:
    """Share of the distinct prompts that fill in a form which others fill in too.

    A form is the whole masked text, or only its beginning or its end: bodies of free text differ.
    """
    prompts = _distinct(seen)
    forms: Counter[Hashable] = Counter(form for item in prompts for form in _forms(item))
    filled = sum(any(forms[form] >= SAME_TEMPLATE for form in _forms(item)) for item in prompts)
    return _share(filled, len(prompts)), f"{filled} of {len(prompts)} prompts fill in a template"


def _forms(item: Observation) -> list[Hashable]:
    named = (("whole", item.template), ("head", item.head), ("tail", item.tail))
    return [form for form in named if form[1] is not None]


def coverage(seen: Sequence[Observation]) -> Measured:
    """Share of prompts whose masked text is new, times how alike they are in length.

    Who goes through a data set asks each of its rows once, and rows are of one kind; people follow
    up, repeat themselves, and paste. A spread of lengths of 0.4 is even, 1 is not.
    """
    fresh = len({item.template or item.prompt for item in seen})
    spread = _spread(item.length for item in seen)
    value = _share(fresh, len(seen)) * (1 - ramp(spread, 0.4, 1.0))
    return value, f"{fresh} of {len(seen)} prompts are new (spread of lengths {spread:.2f})"


def fixed_length(seen: Sequence[Observation]) -> Measured:
    """Share with the most frequent max_tokens; one that is left to the default does not count."""
    limits = Counter(item.max_tokens for item in seen if item.max_tokens is not None)
    limit, count = limits.most_common(1)[0] if limits else (0, 0)
    return _share(count, len(seen)), f"{count} of {len(seen)} requests set max_tokens to {limit}"


def addresses(seen: Sequence[Observation]) -> Measured:
    """Addresses per request with one and the same client program: a pool of proxies."""
    agents = Counter(item.user_agent_hash for item in seen)
    agent = agents.most_common(1)[0][0]
    found = len({item.ip_hash for item in seen if item.user_agent_hash == agent})
    return _share(found, len(seen)), f"{found} addresses with one user agent"


def elicitation(seen: Sequence[Observation]) -> Measured:
    """Share that asks for the reasoning: the part of an answer that a student learns most from."""
    count = sum(item.elicits_reasoning for item in seen)
    return _share(count, len(seen)), f"{count} of {len(seen)} requests ask for the reasoning"


def probing(seen: Sequence[Observation]) -> Measured:
    """Share that asks for log-probabilities of long answers, of repeated prompts, or beside bans.

    A label with its probability, once for each row of a table, is the common honest use and does
    not count. Bans move probability to the next tokens, as in arXiv:2403.06634. Who asks for
    either and is refused was told that he gets none, and counts each time he asks again.
    """
    times = Counter(item.prompt for item in seen)
    bans = any(item.used_bans for item in seen)
    count = sum(
        item.used_bans
        or (
            item.asked_logprobs
            and (
                item.refused or bans or times[item.prompt] > 2 or (item.max_tokens or LONG) >= LONG
            )
        )
        for item in seen
    )
    return _share(count, len(seen)), f"{count} of {len(seen)} requests probe log-probabilities"


def repetition(seen: Sequence[Observation]) -> Measured:
    """Share that samples an earlier prompt again, at a temperature above 0.

    It counts in full for ten prompts repeated or 600 repetitions an hour; a health check is one
    prompt, and asks at most every 30 seconds.
    """
    # A refused request sampled nothing.
    times = Counter(item.prompt for item in seen if item.temperature > 0 and not item.refused)
    repeated = [count for count in times.values() if count > 1]
    again = sum(repeated) - len(repeated)
    pace = again / _span(seen) * HOUR
    serious = max(ramp(len(repeated), 1, 10), ramp(pace, 120, 600))
    words = f"{again} of {len(seen)} requests sample {len(repeated)} prompts again"
    return _share(again, len(seen)) * serious, words


# All automation together: 1 - .85 * .8 * .75 * .85 * .9 * .9 = 0.65; a sign of purpose alone: 0.6.
# Both: 0.86. Purpose reaches 0.7 beside 0.25 of automation: a template, or evenness and coverage.
SIGNS = (
    # A busy product sends as much, so this only adds to others.
    Sign(volume, 1000.0, 10_000.0, 0.15),
    # A little more: products follow their users' day unless these live everywhere.
    Sign(steadiness, 0.0, 1.0, 0.2),
    # The strongest of the six: it is how data sets are asked. Below a third it may be habit.
    Sign(template, 0.3, 0.8, 0.25),
    Sign(coverage, 0.3, 0.9, 0.15),
    # Most client programs fix it, so it says little, and nothing below four requests in five.
    Sign(fixed_length, 0.8, 0.95, 0.1),
    # Serverless clients change addresses too.
    Sign(addresses, 0.05, 0.3, 0.1),
    # A fifth is what a cook or a pupil asks for; thieves leave some out, so it need not be all.
    Sign(elicitation, 0.2, 0.7, 0.6),
    # Honest uses are few; a tenth is a trial.
    Sign(probing, 0.1, 0.6, 0.6),
    # A fifth is what people regenerate because they did not like the answer.
    Sign(repetition, 0.2, 0.7, 0.6),
)
