"""A SQLite file that several processes share and that only its owner reads."""

import fcntl
import os
import sqlite3
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from azeotrope.config import ConfigError

BUSY_TIMEOUT_S = 5.0


class StoreError(ConfigError):
    """Keys or quotas cannot be read or written; a gateway that sees this must not serve."""


class _Held(threading.local):
    """This thread's connections, each with the device and inode of its file.

    A connection must not cross a fork, not even to be closed: the child keeps its parent's,
    untouched, beside its own.
    """

    def __init__(self) -> None:
        self.by_process: dict[int, tuple[sqlite3.Connection, tuple[int, int]]] = {}


class Database:
    """One connection for each thread of each process, in WAL mode, so readers never wait.

    A commit is written but not forced to the disk (`synchronous=NORMAL`): it survives the death of
    the process, and the last ones may be lost when the machine loses its power.
    """

    def __init__(self, path: Path, schema: str, tables: Sequence[str], *, read_only: bool) -> None:
        """Open the file; unless it is opened to read only, make it and its tables first.

        Raises:
            StoreError: if the file is missing (read only), broken, or open to other users.
        """
        self.path, self._read_only = path, read_only
        self._held = _Held()
        if not read_only:
            self._make(schema)
        for table in tables:
            # A broken page is found now, and not by the request that needs it.
            self.check(table)

    def check(self, table: str) -> None:
        """Raises StoreError if a page of this table is broken."""
        [(verdict,), *_] = self.rows(f"PRAGMA quick_check({table})")
        if verdict != "ok":
            raise StoreError(f"{self.path} is damaged ({verdict}); restore it from a copy")

    def rows(self, sql: str, values: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        """The answer to a question that changes nothing."""
        try:
            return self._connection().execute(sql, values).fetchall()
        except sqlite3.Error as error:
            raise self._explained(error) from error

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """All or nothing, and alone: the write lock is taken before anything is read."""
        try:
            connection = self._connection()
            connection.execute("BEGIN IMMEDIATE")
            try:
                yield connection
                connection.execute("COMMIT")
            except BaseException:
                connection.rollback()
                raise
        except sqlite3.Error as error:
            raise self._explained(error) from error

    def _make(self, schema: str) -> None:
        folder = self.path.parent
        # A folder that exists keeps its mode: it may be the user's for other things too.
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with _locked(folder):
            # Only a file that nobody has open may be opened and closed by hand: closing it would
            # drop the locks that SQLite holds in this process.
            with suppress(FileExistsError):
                os.close(os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
            try:
                connection = self._connection()
                connection.execute("PRAGMA journal_mode=WAL")
                connection.executescript(schema)
            except sqlite3.Error as error:
                raise self._explained(error) from error

    def _connection(self) -> sqlite3.Connection:
        identity = self._identity()
        held = self._held.by_process.get(os.getpid())
        if held is None:
            held = self._held.by_process[os.getpid()] = (self._connect(), identity)
        connection, opened = held
        if opened != identity:
            raise StoreError(f"{self.path} was replaced while it was open; start again")
        return connection

    def _connect(self) -> sqlite3.Connection:
        mode = "ro" if self._read_only else "rw"
        uri = f"{self.path.resolve().as_uri()}?mode={mode}"
        connection = sqlite3.connect(uri, uri=True, timeout=BUSY_TIMEOUT_S, isolation_level=None)
        connection.execute("PRAGMA synchronous=NORMAL")
        return connection

    def _identity(self) -> tuple[int, int]:
        """Which file it is. A deleted one would go on answering from its open descriptor."""
        try:
            found = os.stat(self.path)
        except OSError as error:
            raise StoreError(f"no store at {self.path} ({error.strerror})") from error
        # The group may have been let in on purpose, as container platforms do; others never are.
        if found.st_mode & 0o007:
            mode = f"{found.st_mode & 0o777:04o}"
            raise StoreError(
                f"{self.path} has mode {mode}, so that every user can open it: chmod 600 it"
            )
        return found.st_dev, found.st_ino

    def _explained(self, error: sqlite3.Error) -> StoreError:
        return StoreError(f"the store {self.path} cannot be used: {error}")


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One process at a time sets a file up: switching to WAL does not wait for others."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
