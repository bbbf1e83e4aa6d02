"""Clean-ups: what a thief does to stolen text before training on it.

Each is a function from traces to traces, found by its name.
"""

from collections.abc import Callable, Sequence

from azeotrope.config import ConfigError
from azeotrope.pocket.language import digits_for_words
from azeotrope.tokens import Boundary, without_reasoning
from azeotrope.traces import Trace

Cleanup = Callable[[Sequence[Trace], Boundary], list[Trace]]


def none(traces: Sequence[Trace], boundary: Boundary) -> list[Trace]:
    """Train on what was stolen as it is."""
    return list(traces)


def correct_only(traces: Sequence[Trace], boundary: Boundary) -> list[Trace]:
    """Keep the traces whose answer is right: rejection sampling with known answers."""
    return [trace for trace in traces if trace.correct]


def drop_reasoning(traces: Sequence[Trace], boundary: Boundary) -> list[Trace]:
    """Learn the answers alone."""
    return [
        trace.with_text(without_reasoning(trace.text, boundary), trace.correct) for trace in traces
    ]


def digits(traces: Sequence[Trace], boundary: Boundary) -> list[Trace]:
    """Write number words as digits: what a thief does who has looked at the traces."""
    return [trace.with_text(digits_for_words(trace.text), trace.correct) for trace in traces]


_ALL: dict[str, Cleanup] = {f.__name__: f for f in (none, correct_only, drop_reasoning, digits)}


def names() -> list[str]:
    return list(_ALL)


def resolve(name: str) -> Cleanup:
    """The clean-up of this name.

    Raises:
        ConfigError: if there is none.
    """
    if name not in _ALL:
        raise ConfigError(f"unknown clean-up {name!r}; there are {', '.join(_ALL)}")
    return _ALL[name]
