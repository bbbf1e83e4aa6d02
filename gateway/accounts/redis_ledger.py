"""The quota ledger for gateways on several nodes: one Lua script in Redis for each operation."""

from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from gateway.accounts import ledger_scripts
from gateway.accounts.database import StoreError
from gateway.accounts.ledger import (
    Reservation,
    Usage,
    check_completion,
    date_of_day,
    lease_ms,
    milliseconds,
)
from gateway.accounts.quotas import Limits, Minute, Refusal, Standing
from gateway.accounts.redis_connection import TAG, RedisConnection, text

if TYPE_CHECKING:
    from redis import Redis


class RedisLedger:
    """A ledger that gateways on several nodes share; needs the extra `redis`."""

    def __init__(
        self, url_or_client: "str | Redis", clock: Callable[[], float] | None = None
    ) -> None:
        """Connect, and check that Redis answers.

        Args:
            clock: seconds since 1970; None takes the clock of Redis, which is the same for all
                nodes.

        Raises:
            ConfigError: if the package is not installed or the URL is not one.
            StoreError: if Redis does not answer.
        """
        self._redis, self._clock = RedisConnection(url_or_client, "the quotas"), clock
        register = self._redis.client.register_script
        self._reserve = register(ledger_scripts.RESERVE)
        self._progress = register(ledger_scripts.PROGRESS)
        self._settle = register(ledger_scripts.SETTLE)
        self._sweep = register(ledger_scripts.SWEEP)
        self._usage = register(ledger_scripts.USAGE)
        # Registering sends nothing. A report without requests changes nothing and needs an answer.
        self._run(self._progress, "", 0)

    def reserve(
        self, reservation: Reservation, limits: Limits, *, owner: str, lease_s: float
    ) -> Standing | Refusal:
        """Admit a request, or say why it does not fit; see `Ledger.reserve`.

        Raises:
            StoreError: if Redis does not answer, or the id of the request was used before.
            ValueError: if the lease is not above 0 s.
        """
        tokens, slots = reservation.tokens, reservation.slots
        verdict, *numbers = self._run(
            self._reserve,
            *(reservation.key, reservation.request, owner, reservation.prompt, tokens, slots),
            *(limits.requests_per_minute, limits.tokens_per_minute),
            *(limits.tokens_per_day, limits.concurrency, lease_ms(lease_s)),
        )
        if text(verdict) == "taken":
            raise StoreError(
                f"the request {reservation.request!r} was reserved before; ids are used once"
            )
        # The script counts; `Minute` applies the same rules as for the SQLite ledger, so that both
        # report the same standing and the same wait.
        *counts, first, second = map(int, numbers)
        minute = Minute(*counts)
        if text(verdict) == "reserved":
            return minute.after(tokens, slots).standing(limits)
        return minute.refusal(limits, tokens, slots, {"requests": first, "tokens": second})

    def progress(self, owner: str, written: Mapping[str, int], *, lease_s: float) -> None:
        pairs = [part for pair in written.items() for part in pair]
        self._run(self._progress, owner, milliseconds(lease_s), *pairs)

    def settle(self, request: str, completion: int) -> None:
        check_completion(completion)
        self._run(self._settle, request, completion)

    def sweep(self) -> int:
        return int(self._run(self._sweep))

    def usage(self, key: str | None = None) -> list[Usage]:
        days: dict[tuple[int, str], dict[str, int]] = defaultdict(dict)
        for name, flat in self._run(self._usage, key or ""):
            # A script returns a hash as a flat list: field, value, field, value.
            for field, count in zip(flat[::2], flat[1::2], strict=True):
                day, _, quantity = text(field).partition(":")
                days[int(day), text(name)][quantity] = int(count)
        return [
            Usage(
                key=name,
                day=date_of_day(day),
                requests=counts.get("requests", 0),
                prompt_tokens=counts.get("prompt", 0),
                completion_tokens=counts.get("completion", 0),
                open_requests=counts["open"],
            )
            for (day, name), counts in sorted(days.items())
        ]

    def _run(self, script: Any, *values: str | int) -> Any:
        now = "" if self._clock is None else milliseconds(self._clock())
        # All names begin with the tag, so it stands for them in KEYS and finds the node of a
        # cluster that holds them.
        with self._redis.explaining_errors():
            return script(keys=[TAG], args=[now, *values])
