"""Stop strings of a request."""

from collections.abc import Sequence

from gateway.answers.reading import overlap


class StopStrings:
    """Ends a text where a stop string begins; the stop string itself is not part of the answer.

    If the text contains several, the one that is complete first counts, and among those the
    longest. So the result does not depend on how the text was divided into parts.

    Raises:
        ValueError: if a stop string is empty.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        if not all(stops):
            raise ValueError(f"a stop string must have at least one character, got {list(stops)}")
        self._stops = tuple(stops)
        self._held = ""
        self._stopped = False

    def feed(self, text: str) -> tuple[str, bool]:
        """More text that may be sent, and whether a stop was met. No text follows a stop."""
        if self._stopped:
            return "", True
        text = self._held + text
        matches = [(at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0]
        if matches:
            self._stopped, self._held = True, ""
            return text[: min(matches)[1]], True
        # The longest end of the text that may become a stop waits for the next part. Without this
        # a client would receive the first half of a stop string that spans two chunks.
        waiting = max((overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - waiting :]
        return text[: len(text) - waiting], False

    def flush(self) -> str:
        """The text that was held back and did not become a stop."""
        text, self._held = self._held, ""
        return text
