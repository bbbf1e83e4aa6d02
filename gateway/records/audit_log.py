"""What a gateway decided, kept in files that are only ever added to.

Neither a key's token nor a text of a customer can get in. A value is a number, a yes or no, or a
short name; anything longer stands in the file as its digest, and what looks like a token is struck
out first.
"""

import hashlib
import json
import math
import os
import re
import threading
import time
from collections.abc import Sequence
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

from azeotrope.config import ConfigError

Value = str | int | float | bool | None
MOST_REASON = 300
"""Characters of one reason."""

_FILE = re.compile(r"audit-(\d{4}-\d{2}-\d{2})-\d+\.jsonl")
# Wider than a real token, so that one that is cut or misspelt is struck out too.
_TOKEN = re.compile(r"az-[A-Za-z0-9_-]+", re.IGNORECASE)
_NAME = re.compile(r"[\w.:/\[\]-]{0,80}")
_RESERVED = ("at", "key", "event", "reasons")


class AuditLogError(ConfigError):
    """Decisions cannot be written down; a gateway that sees this must not serve."""


class AuditLog:
    """JSON lines, one for each decision, in `audit-YYYY-MM-DD-<pid>.jsonl` (UTC, mode 0600).

    Each process has a file of its own and each line is one write, so lines never mix. A line
    reaches the operating system before `write` returns, and is not forced to the disk. Any thread
    may write.

    Raises:
        AuditLogError: if the folder or today's file cannot be made, opened or kept private.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock = threading.Lock()
        self._descriptor: int | None = None
        self._open_for = ("", 0)
        self._closed = False
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise self._explained(error) from error
        with self._lock:
            self._file(time.time())

    def write(
        self,
        key_id: str,
        event: str,
        *,
        reasons: Sequence[str] = (),
        at: float | None = None,
        **values: Value,
    ) -> None:
        """Add one decision: what happened to whose request, why, and the numbers behind it.

        Args:
            key_id: the public id of a key, never its token.
            event: `request`, `refused`, `extraction`, `licence`, `killed` or another short name.
            reasons: sentences of the gateway's own, never a client's.
            at: seconds since 1970; None is now.

        Raises:
            AuditLogError: if the line could not be written whole.
            ValueError: if the log is closed, or a value is no plain finite one.
        """
        if isinstance(reasons, str):
            raise ValueError(f"reasons must be a list of sentences, got one string of {event!r}")
        clash = sorted(set(values) & set(_RESERVED))
        if clash:
            raise ValueError(f"{', '.join(clash)} cannot be the name of a value of {event!r}")
        now = time.time() if at is None else at
        line = {
            "at": datetime.fromtimestamp(now, UTC).isoformat(timespec="milliseconds"),
            "key": _short(key_id),
            "event": _short(event),
            **(
                {"reasons": [redact(reason)[:MOST_REASON] for reason in reasons]} if reasons else {}
            ),
            **{_short(name): _plain(name, value) for name, value in values.items()},
        }
        data = (json.dumps(line, ensure_ascii=True, allow_nan=False) + "\n").encode()
        with self._lock:
            if self._closed:
                raise ValueError("the audit log is closed; nothing may be decided after that")
            descriptor = self._file(now)
            try:
                written = os.write(descriptor, data)
            except OSError as error:
                raise self._explained(error) from error
        if written != len(data):
            raise AuditLogError(
                f"only {written} of {len(data)} bytes went into the audit log in {self.folder}; "
                "make room on the disk"
            )

    def prune(self, days: int, *, today: date | None = None) -> list[Path]:
        """Remove the files that are older than so many days, of all processes; returns them.

        Raises:
            ValueError: if `days` is below 1: today's file is being written.
        """
        if days < 1:
            raise ValueError(f"audit logs are kept for at least 1 day, got {days}")
        oldest = (today or datetime.now(UTC).date()) - timedelta(days=days)
        removed: list[Path] = []
        for path in sorted(self.folder.iterdir()):
            day = _day(path)
            if day is not None and day < oldest:
                # Another replica may prune at the same time.
                path.unlink(missing_ok=True)
                removed.append(path)
        return removed

    def check(self) -> None:
        """See whether a line could be written.

        Raises:
            AuditLogError: if today's file cannot be opened any more.
        """
        with self._lock:
            if not self._closed:
                self._file(time.time())

    def close(self) -> None:
        """Close the file; a second time does nothing."""
        with self._lock:
            self._closed = True
            self._release()

    def __enter__(self) -> "AuditLog":
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()

    def _file(self, now: float) -> int:
        """The descriptor of this day's and this process's file; a fork gets another.

        So does a file that somebody moved away: lines written to it would be seen by nobody.
        """
        day = datetime.fromtimestamp(now, UTC).date().isoformat()
        wanted = (day, os.getpid())
        path = self.folder / f"audit-{day}-{os.getpid()}.jsonl"
        if self._descriptor is not None and wanted == self._open_for and self._is_at(path):
            return self._descriptor
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        try:
            descriptor = os.open(path, flags, 0o600)
            try:
                # A file of an earlier process with this number may have been opened to others.
                os.fchmod(descriptor, 0o600)
            except OSError:
                os.close(descriptor)
                raise
        except OSError as error:
            raise self._explained(error) from error
        self._release()
        self._descriptor, self._open_for = descriptor, wanted
        return descriptor

    def _is_at(self, path: Path) -> bool:
        assert self._descriptor is not None
        try:
            return os.path.samestat(os.fstat(self._descriptor), os.lstat(path))
        except FileNotFoundError:
            return False
        except OSError as error:
            raise self._explained(error) from error

    def _release(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _explained(self, error: OSError) -> AuditLogError:
        return AuditLogError(
            f"the audit log in {self.folder} cannot be written ({error.strerror or error}); "
            "give a folder that this process owns, on a disk with room"
        )


def _day(path: Path) -> date | None:
    """The day that a file is of; None for files that are not the log's."""
    match = _FILE.fullmatch(path.name)
    try:
        return date.fromisoformat(match[1]) if match else None
    except ValueError:
        return None


def redact(text: str) -> str:
    """The same text with whatever looks like a key's token struck out."""
    return _TOKEN.sub("az-[redacted]", text)


def digest(text: str) -> str:
    """Sixteen hexadecimal digits that stand for a text."""
    return "blake2b:" + hashlib.blake2b(text.encode(errors="replace"), digest_size=8).hexdigest()


def _short(text: str) -> str:
    """A short name as it is; anything else might be somebody's text, and leaves its digest."""
    redacted = redact(text)
    return redacted if _NAME.fullmatch(redacted) else digest(text)


def _plain(name: str, value: object) -> Value:
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, float) and math.isfinite(value):
        return value
    if isinstance(value, str):
        return _short(value)
    raise ValueError(
        f"{name} must be a finite number, a bool, a short string or None, "
        f"got {type(value).__name__}"
    )
