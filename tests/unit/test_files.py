"""Files that appear whole or not at all."""

from pathlib import Path

import pytest

from azeotrope.files import new_folder, write_json, written_whole


def test_a_failed_writer_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "below" / "data.json"
    write_json(path, {"a": 1})
    old = path.read_bytes()
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"a": float("nan")})
    with pytest.raises(KeyError), written_whole(path) as temporary:
        {}[temporary.write_text("half")]
    assert path.read_bytes() == old
    assert list(path.parent.iterdir()) == [path]


def test_two_writers_do_not_disturb_each_other(tmp_path: Path) -> None:
    path = tmp_path / "data"
    with written_whole(path) as first:
        with written_whole(path) as second:
            first.write_text("first")
            second.write_text("second")
        assert path.read_text() == "second"
    assert path.read_text() == "first"
    assert list(tmp_path.iterdir()) == [path]


def test_the_first_of_two_equal_folders_stays(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    with new_folder(folder, "config.json") as scratch:
        (scratch / "config.json").write_text("second")
        with new_folder(folder, "config.json") as scratch_of_another:
            (scratch_of_another / "config.json").write_text("first")
    assert (folder / "config.json").read_text() == "first"
    assert list(tmp_path.iterdir()) == [folder]


def test_an_incomplete_folder_is_an_error(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "notes").touch()
    with pytest.raises(OSError, match="model"), new_folder(folder, "config.json"):
        pass
    assert list(folder.iterdir()) == [folder / "notes"]
