"""The signs that requests collect a data set: how each is measured, and how much it weighs.

A sign reads the observations of one account, oldest first, and returns a value with a description.
"""

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean, pstdev

from gateway.extraction.footprint import Observation

HARMLESS = 15
"""Requests without any sign that are added to those of each account: 20 suspicious requests are
too few to judge by."""
SAME_TEMPLATE = 5
"""Distinct prompts that must share a form before it counts as a template."""
LONG = 16
"""Tokens from which an answer is worth distilling. A label with its probability is shorter."""
HOUR, DAY = 3600.0, 86400.0
LEAST_SPAN = 600.0
"""Seconds from which evenness means something: a person may send requests evenly for some
minutes."""

Measured = tuple[float, str]


@dataclass(frozen=True)
class Sign:
    """Evidence rises linearly from 0 at `low` to 1 at `high`; `weight` is the most that it adds."""

    measure: Callable[[Sequence[Observation]], Measured]
    low: float
    high: float
    weight: float


def ramp(value: int | float, low: int | float, high: int | float) -> float:
    """0 at `low` and below, 1 at `high` and above, linear in between."""
    return min(1.0, max(0.0, (value - low) / (high - low)))


def _share(count: int, total: int) -> float:
    return count / (total + HARMLESS)


def _shrunk(value: float, total: int) -> float:
    """The mean of a value over all requests, if the harmless ones have 0."""
    return value * total / (total + HARMLESS)


def _span(requests: Sequence[Observation]) -> float:
    # At least a minute: the pace of two requests in one second says nothing about a day.
    return max(requests[-1].at - requests[0].at, 60.0)


def _spread(values: Iterable[float]) -> float:
    """Standard deviation divided by the mean (the coefficient of variation)."""
    numbers = list(values)
    mean = fmean(numbers)
    return pstdev(numbers) / mean if mean else 0.0


def _distinct(requests: Sequence[Observation]) -> list[Observation]:
    """One observation of each prompt."""
    return list({request.prompt: request for request in requests}.values())


def volume(requests: Sequence[Observation]) -> Measured:
    """Requests per day at the pace of the window; a person rarely sends a thousand."""
    pace = len(requests) / _span(requests) * DAY
    return _shrunk(pace, len(requests)), f"{pace:,.0f} requests per day"


def steadiness(requests: Sequence[Observation]) -> Measured:
    """How evenly requests arrive, over twelve parts of the window or over the hours of the day.

    The value is 1 for a spread of 0.3 between the parts and 0 for one of 1, which is typical of a
    person. It is also 1 for requests in 22 hours of the day and 0 for 14, which is a waking day.
    """
    span = _span(requests)
    if span < LEAST_SPAN:
        return 0.0, ""
    start = requests[0].at
    # Counts per bin and not gaps between requests: jitter and parallel requests change the gaps,
    # and leave the counts as they are.
    bins = Counter(min(11, int(12 * (request.at - start) / span)) for request in requests)
    spread = _spread(bins[part] for part in range(12))
    hours = {int(request.at // HOUR) % 24 for request in requests}
    hour_count = len(hours) if span >= DAY else 0
    value = max(1 - ramp(spread, 0.3, 1.0), ramp(hour_count, 14, 22))
    clock = f", in {hour_count} hours of the day" if hour_count else ""
    description = f"requests come evenly over {span / HOUR:.1f} h (spread {spread:.2f}){clock}"
    return _shrunk(value, len(requests)), description


def template(requests: Sequence[Observation]) -> Measured:
    """Share of the distinct prompts that fill in a form which others fill in too.

    A form is the whole masked text, or only its beginning or its end: the bodies of free text
    differ.
    """
    prompts = _distinct(requests)
    forms: Counter[Hashable] = Counter(form for prompt in prompts for form in _forms(prompt))
    filled = sum(any(forms[form] >= SAME_TEMPLATE for form in _forms(prompt)) for prompt in prompts)
    return _share(filled, len(prompts)), f"{filled} of {len(prompts)} prompts fill in a template"


def _forms(request: Observation) -> list[Hashable]:
    parts = (
        ("whole", request.template),
        ("head", request.head),
        ("tail", request.tail),
    )
    return [part for part in parts if part[1] is not None]


def coverage(requests: Sequence[Observation]) -> Measured:
    """Share of prompts whose masked text is new, times how similar they are in length.

    A program that goes through a data set sends each row once, and rows are of one kind. People
    follow up, repeat themselves, and paste. The similarity is 1 for a spread of lengths of 0.4 and
    0 for one of 1.
    """
    fresh = len({request.template or request.prompt for request in requests})
    spread = _spread(request.length for request in requests)
    count = len(requests)
    value = _share(fresh, count) * (1 - ramp(spread, 0.4, 1.0))
    return value, f"{fresh} of {count} prompts are new (spread of lengths {spread:.2f})"


def fixed_length(requests: Sequence[Observation]) -> Measured:
    """Share with the most frequent max_tokens; requests that do not set it do not count."""
    limits = Counter(request.max_tokens for request in requests if request.max_tokens is not None)
    limit, count = limits.most_common(1)[0] if limits else (0, 0)
    total = len(requests)
    return _share(count, total), f"{count} of {total} requests set max_tokens to {limit}"


def addresses(requests: Sequence[Observation]) -> Measured:
    """Addresses per request of the most frequent client program: a pool of proxies has many."""
    agents = Counter(request.user_agent_hash for request in requests)
    agent = agents.most_common(1)[0][0]
    count = len({request.ip_hash for request in requests if request.user_agent_hash == agent})
    return _share(count, len(requests)), f"{count} addresses with one user agent"


def elicitation(requests: Sequence[Observation]) -> Measured:
    """Share that asks for the reasoning, the part of an answer that teaches a student most."""
    count = sum(request.elicits_reasoning for request in requests)
    total = len(requests)
    return _share(count, total), f"{count} of {total} requests ask for the reasoning"


def probing(requests: Sequence[Observation]) -> Measured:
    """Share that asks for log-probabilities in a way that reads the model's distribution.

    That is: for long answers, for prompts sent more than twice, or together with bans. Bans move
    the probability to the next tokens, which reveals their logits one by one (arXiv:2403.06634). A
    label with its probability, once per row of a table, is the common honest use and does not
    count. A refused request counts: the refusal said that this key gets no log-probabilities, and
    the client asked again.
    """
    times = Counter(request.prompt for request in requests)
    bans = any(request.used_bans for request in requests)
    count = sum(
        request.used_bans
        or (
            request.asked_logprobs
            and (
                request.refused
                or bans
                or times[request.prompt] > 2
                or (request.max_tokens or LONG) >= LONG
            )
        )
        for request in requests
    )
    total = len(requests)
    return _share(count, total), f"{count} of {total} requests probe log-probabilities"


def repetition(requests: Sequence[Observation]) -> Measured:
    """Share that samples an earlier prompt again, at a temperature above 0.

    It counts in full from ten repeated prompts or 600 repetitions per hour. A health check repeats
    one prompt, at most every 30 seconds (120 per hour).
    """
    # A refused request sampled nothing.
    times = Counter(
        request.prompt for request in requests if request.temperature > 0 and not request.refused
    )
    repeated = [count for count in times.values() if count > 1]
    again, total = sum(repeated) - len(repeated), len(requests)
    pace = again / _span(requests) * HOUR
    serious = max(ramp(len(repeated), 1, 10), ramp(pace, 120, 600))
    description = f"{again} of {total} requests sample {len(repeated)} prompts again"
    return _share(again, total) * serious, description


# The weights follow from the default threshold of 0.7 (see score.py):
# - all six signs of automation: 1 - .85 * .8 * .75 * .85 * .9 * .9 = 0.65, below the threshold;
# - one sign of purpose alone: 0.6, below the threshold;
# - both: 1 - .35 * .4 = 0.86. A sign of purpose reaches 0.7 with 0.25 of automation beside it,
#   which is a template, or evenness together with coverage.
SIGNS = (
    # A busy product sends as much, so volume only adds to other signs.
    Sign(volume, 1000.0, 10_000.0, 0.15),
    # Slightly more: the traffic of a product follows the day of its users, unless they live in all
    # time zones.
    Sign(steadiness, 0.0, 1.0, 0.2),
    # The strongest of the six, because data sets are collected with templates. Below a third it may
    # be a person's habit.
    Sign(template, 0.3, 0.8, 0.25),
    Sign(coverage, 0.3, 0.9, 0.15),
    # Most client programs set a fixed length, so it says little, and nothing below 80 %.
    Sign(fixed_length, 0.8, 0.95, 0.1),
    # Serverless clients change their addresses too.
    Sign(addresses, 0.05, 0.3, 0.1),
    # Up to a fifth is ordinary use (recipes, homework). Attackers omit it in some requests, so 70 %
    # is enough for full evidence.
    Sign(elicitation, 0.2, 0.7, 0.6),
    # Honest uses are few; a tenth may be a trial.
    Sign(probing, 0.1, 0.6, 0.6),
    # People regenerate up to a fifth of the answers, because they did not like the first one.
    Sign(repetition, 0.2, 0.7, 0.6),
)
