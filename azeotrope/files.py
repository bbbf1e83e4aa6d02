"""Files and folders that appear whole or not at all, even if their writer is killed halfway."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import pyarrow as pa
import pyarrow.parquet as pq


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Give a temporary path to write to, and rename it to `path` when the block ends.

    A reader sees the old file or the new one, never a part of one. Two writers of the same path
    do not disturb each other: the last one to finish stays. If the block raises, the temporary
    file is removed and `path` is as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # On storage that several machines share, two processes can have the same id.
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{uuid4().hex[:8]}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def new_folder(folder: Path, marker: str) -> Iterator[Path]:
    """Give a temporary folder to fill, and rename it to `folder` when the block ends.

    If another process made the same folder in the meantime, that one stays: both must be equal.

    Args:
        marker: a file that a complete folder holds; with it the other process's work is recognised.

    Raises:
        OSError: if the folder exists and is not complete.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        yield scratch
        # mkdtemp makes a private folder; this one is to be as readable as any other new folder.
        scratch.chmod(0o777 & ~_umask())
        try:
            os.replace(scratch, folder)
        except OSError:
            if not (folder / marker).is_file():
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write a text as UTF-8, whole or not at all."""
    with written_whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, data: Any) -> None:
    """Write plain data as JSON, whole or not at all.

    Raises:
        ValueError: if a number is not finite, which JSON cannot say.
    """
    write_text(path, json.dumps(data, indent=1, allow_nan=False) + "\n")


def write_parquet(table: pa.Table, path: Path) -> None:
    """Write one Parquet file, whole or not at all.

    Raises:
        OSError: if the disk is full or the folder cannot be written to.
    """
    try:
        with written_whole(path) as temporary:
            pq.write_table(table, temporary, compression="zstd")
    except OSError as error:
        raise OSError(
            error.errno,
            f"could not write {path} ({error.strerror or error}); finished files are kept",
        ) from error


def _umask() -> int:
    """The process's file mode mask, which can only be read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
