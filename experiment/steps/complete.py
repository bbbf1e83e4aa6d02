"""Whether a stage holds everything that its workers were asked for, before it is published."""

from collections.abc import Mapping
from pathlib import Path

import pyarrow.parquet as pq

from experiment.stages import Stage


class IncompleteStageError(RuntimeError):
    """Workers said that they were done, and the stage lacks what they should have written."""


def check_complete(stage: Stage, expected: Mapping[Path, int | None]) -> None:
    """Compare the files of an unpublished stage with those that were asked for.

    Files are opened by name: a listing of a network file system may be out of date.

    Args:
        expected: the files, with the number of rows of those that are Parquet and known.

    Raises:
        IncompleteStageError: if a file is missing, or has another number of rows.
    """
    missing = [path for path in expected if not _opens(path)]
    if missing:
        raise IncompleteStageError(
            f"{stage.path.name} lacks {len(missing)} of {len(expected)} files that its workers "
            f"wrote, first {missing[0]}; nothing was published. Workers on several machines must "
            "write to one disk: set `cache` to a folder that all of them share, and run it again"
        )
    for path, rows in expected.items():
        found = rows if rows is None else pq.read_metadata(path).num_rows
        if found != rows:
            raise IncompleteStageError(
                f"{path} has {found} rows where {rows} were asked for; nothing was published. "
                "Remove the file and run it again"
            )


def _opens(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return bool(file.read(1))
    except OSError:
        return False
