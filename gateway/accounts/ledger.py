"""The quota ledger: tokens are reserved before an engine writes them, and settled afterwards.

The length of an answer is unknown before it ends. A reservation therefore takes the most tokens
that the answer may have, and the settlement gives back those that it did not use. A gateway that
dies settles nothing, so each reservation has a lease. When a lease runs out, the next process that
uses the ledger settles the request.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, date, datetime
from typing import Protocol, runtime_checkable

from gateway.accounts.quotas import DAY_MS, Limits, Refusal, Standing


@dataclass(frozen=True)
class Reservation:
    """What one request may use at most.

    Raises:
        ValueError: if it has negative tokens or no slot.
    """

    key: str
    """The account that pays; all keys of a customer share it."""
    request: str
    """An id that was never used before."""
    prompt: int
    """Tokens of all prompts."""
    completion: int
    """The most tokens that all completions together may have."""
    slots: int
    """Completions under way."""

    def __post_init__(self) -> None:
        if self.prompt < 0 or self.completion < 0 or self.slots < 1:
            raise ValueError(
                "a reservation has 0 tokens or more and 1 slot or more, got "
                f"prompt={self.prompt}, completion={self.completion}, slots={self.slots}"
            )

    @property
    def tokens(self) -> int:
        return self.prompt + self.completion


@dataclass(frozen=True)
class Usage:
    """What one account used on one day of UTC; a request belongs to the day of its arrival."""

    key: str
    """The account: the id of the customer's first key."""
    day: date
    requests: int
    """Settled requests; the tokens are those of these requests."""
    prompt_tokens: int
    completion_tokens: int
    open_requests: int


@runtime_checkable
class Ledger(Protocol):
    """Every operation is one transaction over all processes that share the ledger.

    Each raises StoreError if the ledger cannot be read or written. A gateway must refuse requests
    then.
    """

    def reserve(
        self, reservation: Reservation, limits: Limits, *, owner: str, lease_s: float
    ) -> Standing | Refusal:
        """Admit a request, or say why it does not fit.

        Args:
            owner: the replica that will settle the request.
            lease_s: how long the owner may be silent before another process settles it.

        Raises:
            StoreError: if the id of the request was used before.
            ValueError: if the lease is not above 0 s.
        """
        ...

    def progress(self, owner: str, written: Mapping[str, int], *, lease_s: float) -> None:
        """Renew the leases of an owner's requests and note the tokens they have written so far.

        Requests that are settled already, or that have another owner, do not change.
        """
        ...

    def settle(self, request: str, completion: int) -> None:
        """End a request with the tokens it wrote, and give back the rest and the slots.

        The first settlement counts, whichever process makes it. A second one changes nothing, and
        neither does one of an unknown request.

        Raises:
            ValueError: if the number of tokens is negative.
        """
        ...

    def sweep(self) -> int:
        """Settle the requests whose lease ran out, and return how many these were.

        Such a request is charged its prompt and the tokens last reported. Every reservation sweeps
        too; this method is for times without reservations.
        """
        ...

    def usage(self, key: str | None = None) -> list[Usage]:
        """Usage per day, of one account or of all."""
        ...


def lease_ms(lease_s: float) -> int:
    """The length of a new reservation's lease in milliseconds.

    Raises:
        ValueError: if it is not above 0.
    """
    if lease_s <= 0:
        raise ValueError(f"a reservation has a lease above 0 s, got lease_s={lease_s}")
    return milliseconds(lease_s)


def check_completion(tokens: int) -> None:
    """Refuse a settlement that would pay tokens back.

    Raises:
        ValueError: if the number of tokens is negative.
    """
    if tokens < 0:
        raise ValueError(f"a completion has 0 tokens or more, got {tokens}")


def milliseconds(seconds: float) -> int:
    # Ledgers calculate with whole milliseconds: sums of floats would depend on their order, and a
    # request would leave its window a rounding error too early or too late.
    return round(seconds * 1000)


def date_of_day(number: int) -> date:
    """The date of a day counted from 1970."""
    return datetime.fromtimestamp(number * DAY_MS / 1000, UTC).date()
