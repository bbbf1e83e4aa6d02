"""Files that appear whole or not at all, even if their writer is killed halfway."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4


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
