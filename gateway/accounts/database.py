"""A SQLite file that several processes share and that no other user may open."""

import os
import sqlite3
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock

from azeotrope.config import ConfigError

BUSY_TIMEOUT_S = 5.0
"""How long a transaction waits for the write lock of another one before it fails."""


class StoreError(ConfigError):
    """Keys or quotas cannot be read or written; a gateway that sees this must not serve."""


class _ThreadConnections(threading.local):
    """The connections of one thread, each with the device and inode of the file that it opened.

    They are listed by process, because SQLite forbids carrying a connection across a fork, even to
    close it. A child process keeps its parent's entry untouched and adds one of its own.
    """

    def __init__(self) -> None:
        self.by_process: dict[int, tuple[sqlite3.Connection, tuple[int, int]]] = {}


class Database:
    """One connection for each thread of each process, in WAL mode, so readers never wait.

    A commit is written but not forced to the disk (`synchronous=NORMAL`). It survives the death of
    the process; a power failure of the machine may lose the last commits.
    """

    def __init__(self, path: Path, schema: str, tables: Sequence[str], *, read_only: bool) -> None:
        """Open the file. Unless `read_only` is set, create it and its tables first.

        Args:
            schema: SQL statements that create what is missing and change nothing else.
            tables: the tables whose pages are checked for damage now.

        Raises:
            StoreError: if the file is missing (read only), damaged, or open to other users.
        """
        self.path, self._read_only = path, read_only
        self._connections = _ThreadConnections()
        if not read_only:
            self._create(schema)
        for table in tables:
            # A damaged page stops the start of a gateway here. Otherwise the first request that
            # needs the page would discover it.
            self._check_pages(table)

    def rows(self, sql: str, values: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        """The rows of a query that changes nothing.

        Raises:
            StoreError: if the file cannot be read, or another one replaced it.
        """
        try:
            return self._connection().execute(sql, values).fetchall()
        except sqlite3.Error as error:
            raise self._explained(error) from error

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """All changes of the block or none, with no other writer in between.

        Raises:
            StoreError: if the file cannot be written, or another writer held it for too long.
        """
        try:
            connection = self._connection()
            # IMMEDIATE takes the write lock before the first read. With the default (DEFERRED) two
            # writers could read the same quota, and both would let their request in.
            connection.execute("BEGIN IMMEDIATE")
            try:
                yield connection
                connection.execute("COMMIT")
            except BaseException:
                connection.rollback()
                raise
        except sqlite3.Error as error:
            raise self._explained(error) from error

    def _check_pages(self, table: str) -> None:
        [(verdict,), *_] = self.rows(f"PRAGMA quick_check({table})")
        if verdict != "ok":
            raise StoreError(f"{self.path} is damaged ({verdict}); restore it from a copy")

    def _create(self, schema: str) -> None:
        folder = self.path.parent
        # An existing folder keeps its mode: the user may need it for other purposes too.
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        # One process at a time. The switch to WAL needs the file alone and does not wait for it as
        # other statements do: of two processes that start together, one would fail.
        with FileLock(folder / f".{self.path.name}.lock", mode=0o600):
            # SQLite itself would create the file with the mode of the umask. Only a new file may be
            # opened and closed here: POSIX drops all locks of a process on a file when the process
            # closes any descriptor of it, so SQLite would lose the locks that it holds.
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
        entry = self._connections.by_process.get(os.getpid())
        if entry is None:
            entry = self._connections.by_process[os.getpid()] = (self._connect(), identity)
        connection, opened_identity = entry
        if opened_identity != identity:
            raise StoreError(f"{self.path} was replaced while it was open; start again")
        return connection

    def _connect(self) -> sqlite3.Connection:
        mode = "ro" if self._read_only else "rw"
        uri = f"{self.path.resolve().as_uri()}?mode={mode}"
        # isolation_level=None: Python opens no transactions of its own beside `transaction`.
        connection = sqlite3.connect(uri, uri=True, timeout=BUSY_TIMEOUT_S, isolation_level=None)
        connection.execute("PRAGMA synchronous=NORMAL")
        return connection

    def _identity(self) -> tuple[int, int]:
        """Device and inode of the file at the path now, after a look at its mode.

        Each use asks for it. An open connection goes on answering from a file that was deleted or
        moved, so a gateway would accept keys that were revoked in the new file.
        """
        try:
            status = os.stat(self.path)
        except OSError as error:
            raise StoreError(f"no store at {self.path} ({error.strerror})") from error
        # Container platforms give a volume's group access on purpose, so the group's bits may be
        # set; those of all other users may not.
        if status.st_mode & 0o007:
            mode = f"{status.st_mode & 0o777:04o}"
            raise StoreError(
                f"{self.path} has mode {mode}, so that every user can open it: chmod 600 it"
            )
        return status.st_dev, status.st_ino

    def _explained(self, error: sqlite3.Error) -> StoreError:
        return StoreError(f"the store {self.path} cannot be used: {error}")
