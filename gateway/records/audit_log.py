"""The decisions of a gateway, in files that are only appended to.

No token of a key and no text of a customer can get in. A value is a number, a boolean or a short
name. A longer text is replaced by its digest, and what looks like a token is redacted first.
"""

import hashlib
import json
import math
import os
import re
import threading
import time
from collections.abc import Callable, Sequence
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

from azeotrope.config import ConfigError

Value = str | int | float | bool | None
MOST_REASON = 300
"""Characters of one reason."""

_FILE = re.compile(r"audit-(\d{4}-\d{2}-\d{2})-\d+\.jsonl")
# Wider than a real token, so that a truncated or misspelt one is redacted too.
_TOKEN = re.compile(r"az-[A-Za-z0-9_-]+", re.IGNORECASE)
_NAME = re.compile(r"[\w.:/\[\]-]{0,80}")
_RESERVED = ("at", "key", "event", "reasons")


class AuditLogError(ConfigError):
    """Decisions cannot be recorded; a gateway that sees this must not serve."""


class AuditLog:
    """JSON lines, one for each decision, in `audit-YYYY-MM-DD-<pid>.jsonl` (UTC, mode 0600).

    Each process has its own file and each line is one `write` call, so lines never mix. A line has
    reached the operating system when `write` returns, but is not forced to the disk. Any thread may
    write.
    """

    def __init__(self, folder: Path, *, clock: Callable[[], float] = time.time) -> None:
        """Open today's file, and create the folder if it is missing.

        Raises:
            AuditLogError: if the folder or today's file cannot be created, opened or kept private.
        """
        self.folder, self._clock = folder, clock
        self._lock = threading.Lock()
        self._descriptor: int | None = None
        self._open_for = ("", 0)
        self._closed = False
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise self._explained(error) from error
        with self._lock:
            self._file(self._clock())

    def write(
        self, key_id: str, event: str, *, reasons: Sequence[str] = (), **values: Value
    ) -> None:
        """Add one decision: what happened to whose request, why, and the numbers behind it.

        Args:
            key_id: the public id of a key, never its token.
            event: `request`, `refused`, `extraction`, `licence`, `killed` or another short name.
            reasons: sentences that the gateway wrote, never a client's.

        Raises:
            AuditLogError: if the line could not be written whole.
            ValueError: if the log is closed, or a value is not a finite number, a boolean, a text
                or None.
        """
        if isinstance(reasons, str):
            raise ValueError(f"reasons must be a list of sentences, got one string of {event!r}")
        clash = sorted(set(values) & set(_RESERVED))
        if clash:
            raise ValueError(f"{', '.join(clash)} cannot be the name of a value of {event!r}")
        now = self._clock()
        line = {
            "at": datetime.fromtimestamp(now, UTC).isoformat(timespec="milliseconds"),
            "key": _short(key_id),
            "event": _short(event),
            **(
                {"reasons": [redact(reason)[:MOST_REASON] for reason in reasons]} if reasons else {}
            ),
            **{_short(name): _plain(name, value) for name, value in values.items()},
        }
        encoded = (json.dumps(line, ensure_ascii=True, allow_nan=False) + "\n").encode()
        with self._lock:
            if self._closed:
                raise ValueError("the audit log is closed; nothing may be decided after that")
            descriptor = self._file(now)
            # A single write to an O_APPEND file: the kernel puts it at the end in one piece. A
            # buffered file could hold a line back, or split it.
            try:
                written = os.write(descriptor, encoded)
            except OSError as error:
                raise self._explained(error) from error
        # A disk that fills up may take a part of the line without an error.
        if written != len(encoded):
            raise AuditLogError(
                f"only {written} of {len(encoded)} bytes went into the audit log in {self.folder}; "
                "make room on the disk"
            )

    def prune(self, days: int) -> list[Path]:
        """Delete the files of all processes that are older than so many days, and return them.

        Raises:
            ValueError: if `days` is below 1: today's file is in use.
        """
        if days < 1:
            raise ValueError(f"audit logs are kept for at least 1 day, got {days}")
        today = datetime.fromtimestamp(self._clock(), UTC).date()
        removed: list[Path] = []
        for path in sorted(self.folder.iterdir()):
            day = _day(path)
            if day is not None and day < today - timedelta(days=days):
                # Another replica may prune at the same time.
                path.unlink(missing_ok=True)
                removed.append(path)
        return removed

    def check(self) -> None:
        """Check that a line could be written now.

        Raises:
            AuditLogError: if today's file cannot be opened any more.
        """
        with self._lock:
            if not self._closed:
                self._file(self._clock())

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        with self._lock:
            self._closed = True
            self._release()

    def __enter__(self) -> "AuditLog":
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()

    def _file(self, now: float) -> int:
        """The descriptor of the file of this day and this process; the caller holds the lock.

        It opens a new file after midnight, and after a fork, so that the child does not append to
        the file of its parent. It also does so if the current file was moved or deleted: lines
        written to it would be lost to the readers of the folder.
        """
        day = datetime.fromtimestamp(now, UTC).date().isoformat()
        owner = (day, os.getpid())
        path = self.folder / f"audit-{day}-{os.getpid()}.jsonl"
        if self._descriptor is not None and owner == self._open_for and self._is_at(path):
            return self._descriptor
        # O_NOFOLLOW: a symbolic link at this path could direct the log into any file of this user.
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        try:
            descriptor = os.open(path, flags, 0o600)
            try:
                # The file may be left from an earlier process with this id, with another mode.
                os.fchmod(descriptor, 0o600)
            except OSError:
                os.close(descriptor)
                raise
        except OSError as error:
            raise self._explained(error) from error
        self._release()
        self._descriptor, self._open_for = descriptor, owner
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
    """The day of a log file; None for other files."""
    match = _FILE.fullmatch(path.name)
    try:
        return date.fromisoformat(match[1]) if match else None
    except ValueError:
        return None


def redact(text: str) -> str:
    """The same text with everything that looks like a key's token replaced."""
    return _TOKEN.sub("az-[redacted]", text)


def digest(text: str) -> str:
    """A text's BLAKE2b digest of 64 bits, as sixteen hexadecimal digits."""
    return "blake2b:" + hashlib.blake2b(text.encode(errors="replace"), digest_size=8).hexdigest()


def _short(text: str) -> str:
    """A short name without its tokens; anything else may be a customer's text: its digest."""
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
