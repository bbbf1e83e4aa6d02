"""The file of a key store: its contents, its mode, and damage."""

import os
import sqlite3
import subprocess
import sys
from base64 import urlsafe_b64decode
from pathlib import Path

import pytest

from gateway.accounts.database import StoreError
from gateway.accounts.sqlite_keys import KEYS_FILE, SqliteKeyStore

ROOT = Path(__file__).parents[3]


@pytest.fixture
def file_store(tmp_path: Path) -> SqliteKeyStore:
    return SqliteKeyStore(tmp_path / "home" / KEYS_FILE)


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


def test_the_files_contain_no_token(file_store: SqliteKeyStore, tmp_path: Path) -> None:
    tokens = [file_store.create(f"customer {i}")[1] for i in range(5)]
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.name for path in files} >= {KEYS_FILE, f"{KEYS_FILE}-wal"}
    content = b"".join(path.read_bytes() for path in files)
    assert b"customer 4" in content
    for token in tokens:
        assert token[3:].encode() not in content
        assert urlsafe_b64decode(token[3:] + "=") not in content


def test_only_the_owner_can_read_the_files(file_store: SqliteKeyStore, tmp_path: Path) -> None:
    file_store.create("ada")
    assert mode(tmp_path / "home") == 0o700
    assert {mode(path) for path in (tmp_path / "home").iterdir()} == {0o600}


def test_a_gateway_does_not_start_without_its_store(tmp_path: Path) -> None:
    path = tmp_path / KEYS_FILE
    with pytest.raises(StoreError, match="no store at"):
        SqliteKeyStore(path, must_exist=True)
    assert not path.exists()
    path.touch(mode=0o600)
    with pytest.raises(StoreError, match="no such table"):
        SqliteKeyStore(path, must_exist=True)
    path.write_bytes(b"not a database" * 1000)
    with pytest.raises(StoreError, match="not a database"):
        SqliteKeyStore(path, must_exist=True)
    with pytest.raises(StoreError, match="not a database"):
        SqliteKeyStore(path)


def test_a_damaged_page_is_found_when_the_store_is_opened(tmp_path: Path) -> None:
    path = tmp_path / KEYS_FILE
    store = SqliteKeyStore(path)
    for i in range(100):
        store.create(f"customer {i}")
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    intact = path.read_bytes()
    damaged = tmp_path / "damaged.sqlite"
    damaged.touch(mode=0o600)
    assert len(intact) > 5 * 4096
    for start in range(4096, len(intact), 4096):
        damaged.write_bytes(intact[:start] + os.urandom(4096) + intact[start + 4096 :])
        with pytest.raises(StoreError, match=r"damaged|malformed"):
            SqliteKeyStore(damaged, must_exist=True)


def test_a_store_that_others_may_open_is_refused(tmp_path: Path) -> None:
    path = tmp_path / KEYS_FILE
    SqliteKeyStore(path).create("ada")
    path.chmod(0o604)
    with pytest.raises(StoreError, match=r"mode 0604.*chmod 600"):
        SqliteKeyStore(path, must_exist=True)


@pytest.mark.usefixtures("no_cache")
def test_a_store_that_is_moved_or_replaced_admits_no_token(tmp_path: Path) -> None:
    path = tmp_path / KEYS_FILE
    _, token = SqliteKeyStore(path).create("ada")
    gateway = SqliteKeyStore(path, must_exist=True)
    assert gateway.find(token) is not None
    path.rename(tmp_path / "elsewhere")
    with pytest.raises(StoreError, match="no store"):
        gateway.find(token)
    path.write_bytes((tmp_path / "elsewhere").read_bytes())
    path.chmod(0o600)
    with pytest.raises(StoreError, match="replaced"):
        gateway.find(token)


def test_processes_that_create_a_store_together_agree_on_its_secret(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path;"
        "from gateway.accounts.sqlite_keys import SqliteKeyStore;"
        "print(SqliteKeyStore(Path(sys.argv[1])).secret().hex())"
    )
    path = tmp_path / "home" / KEYS_FILE
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
        for _ in range(3)
    ]
    secrets = {worker.communicate(timeout=60)[0].strip() for worker in workers}
    assert secrets == {SqliteKeyStore(path).secret().hex()}


def test_a_gateway_does_not_read_a_store_without_its_secret(tmp_path: Path) -> None:
    path = tmp_path / KEYS_FILE
    SqliteKeyStore(path).create("ada")
    with sqlite3.connect(path) as connection:
        connection.execute("DELETE FROM secrets")
    with pytest.raises(StoreError, match="has no secret"):
        SqliteKeyStore(path, must_exist=True)
    assert len(SqliteKeyStore(path).secret()) == 32
