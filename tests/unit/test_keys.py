"""API keys: what is kept, who is let in, and the commands that make and end keys."""

import os
import re
import sqlite3
import sys
import time
from base64 import urlsafe_b64decode
from pathlib import Path

import pytest
from typer.testing import CliRunner

from azeotrope.config import ConfigError
from azeotrope.gateway.database import StoreError
from azeotrope.gateway.keys import KEYS_FILE, KeyStore
from azeotrope.gateway.ledger import LEDGER_FILE, SqliteLedger
from azeotrope.gateway.policy import Tier
from azeotrope.gateway.quotas import Limits
from workflows import cli
from workflows.keys import default_store


class Clock:
    """Seconds since 1970, moved by hand."""

    def __init__(self, now: float) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock(1_800_000_000.0)


@pytest.fixture
def store(tmp_path: Path, clock: Clock) -> KeyStore:
    return KeyStore(tmp_path / "home" / KEYS_FILE, clock=clock)


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


def test_a_token_opens_its_record_and_nothing_else_does(store: KeyStore) -> None:
    record, token = store.create(
        "ada", tier="trusted", licence="distillation", models=("m",), features=("chat",)
    )
    assert re.fullmatch(r"ak-[0-9a-f]{8}", record.id)
    assert re.fullmatch(r"az-[A-Za-z0-9_-]{43}", token)
    assert len(urlsafe_b64decode(token[3:] + "=")) == 32
    assert store.find(token) == record == store.list()[0]
    assert (record.tier, record.licence, record.models, record.features) == (
        "trusted",
        "distillation",
        ("m",),
        ("chat",),
    )
    for other in (
        "",
        "az-",
        token[:-1],
        token + "x",
        token.swapcase(),
        "Bearer é\udcff",
        record.id,
    ):
        assert store.find(other) is None


def test_the_files_hold_no_token(store: KeyStore, tmp_path: Path) -> None:
    tokens = [store.create(f"customer {i}")[1] for i in range(5)]
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.name for path in files} >= {KEYS_FILE, f"{KEYS_FILE}-wal"}
    content = b"".join(path.read_bytes() for path in files)
    assert b"customer 4" in content
    for token in tokens:
        assert token[3:].encode() not in content
        assert urlsafe_b64decode(token[3:] + "=") not in content


def test_only_the_owner_can_read_the_files(store: KeyStore, tmp_path: Path) -> None:
    store.create("ada")
    assert mode(tmp_path / "home") == 0o700
    assert {mode(path) for path in (tmp_path / "home").iterdir()} == {0o600}


def test_the_secret_of_the_watermark_is_not_shown(store: KeyStore) -> None:
    record, _ = store.create("ada")
    assert len(record.watermark_key) == 64
    assert record.watermark_key not in repr(record)
    assert store.create("bob")[0].watermark_key != record.watermark_key


def test_a_key_expires_to_the_second(store: KeyStore, clock: Clock) -> None:
    record, token = store.create("ada", expires_in_s=60.0)
    assert record.expires == clock.now + 60
    clock.now += 59.999
    assert store.find(token) == record
    clock.now += 0.001
    assert store.find(token) is None
    assert not record.is_active(clock.now)


def test_a_revocation_holds_at_once_here_and_within_a_second_elsewhere(
    store: KeyStore, tmp_path: Path, clock: Clock
) -> None:
    record, token = store.create("ada")
    gateway = KeyStore(tmp_path / "home" / KEYS_FILE, must_exist=True, clock=clock)
    assert gateway.find(token) == record
    revoked = store.revoke(record.id)
    assert revoked.revoked == clock.now
    assert store.find(token) is None
    time.sleep(1.0)
    assert gateway.find(token) is None
    clock.now += 5
    assert store.revoke(record.id) == revoked
    with pytest.raises(ValueError, match="cache_s"):
        KeyStore(tmp_path / "home" / KEYS_FILE, cache_s=1.1)


def test_rotation_keeps_rights_and_watermark(store: KeyStore, clock: Clock) -> None:
    old, old_token = store.create("ada", tier="trusted", models=("m",), expires_in_s=1000.0)
    clock.now += 100
    new, new_token = store.rotate(old.id)
    assert store.find(old_token) is None
    assert store.find(new_token) == new
    assert new.id != old.id
    assert new.created == clock.now
    same = ("name", "tier", "licence", "models", "features", "expires", "watermark_key")
    assert [getattr(new, name) for name in same] == [getattr(old, name) for name in same]
    with pytest.raises(ConfigError, match="has ended"):
        store.rotate(old.id)


def test_both_keys_work_during_the_overlap(store: KeyStore, clock: Clock) -> None:
    old, old_token = store.create("ada")
    new, new_token = store.rotate(old.id, overlap_s=60.0)
    clock.now += 59
    assert store.find(old_token) is not None
    clock.now += 1
    assert store.find(old_token) is None
    assert store.find(new_token) == new
    assert new.expires is None


def test_an_overlap_does_not_prolong_a_key(store: KeyStore, clock: Clock) -> None:
    old, old_token = store.create("ada", expires_in_s=10.0)
    store.rotate(old.id, overlap_s=60.0)
    clock.now += 10
    assert store.find(old_token) is None


def test_what_is_not_allowed_is_said(store: KeyStore) -> None:
    with pytest.raises(ConfigError, match="no key has the id 'ak-0'"):
        store.revoke("ak-0")
    with pytest.raises(ConfigError, match="no key has the id 'ak-0'"):
        store.rotate("ak-0")
    with pytest.raises(ConfigError, match="licence must be usage or distillation"):
        store.create("ada", licence="free")
    with pytest.raises(ConfigError, match="features are chat, completions, metrics"):
        store.create("ada", features=("embeddings",))
    with pytest.raises(ConfigError, match="features are"):
        store.create("ada", features=())
    with pytest.raises(ConfigError, match="end in the future"):
        store.create("ada", expires_in_s=0.0)
    with pytest.raises(ConfigError, match="needs a name"):
        store.create(" ")
    with pytest.raises(ConfigError, match="overlap"):
        store.rotate("ak-0", overlap_s=-1.0)
    assert store.list() == []


def test_a_gateway_does_not_start_without_its_store(tmp_path: Path) -> None:
    path = tmp_path / KEYS_FILE
    with pytest.raises(StoreError, match="no store at"):
        KeyStore(path, must_exist=True)
    assert not path.exists()
    path.touch(mode=0o600)
    with pytest.raises(StoreError, match="no such table"):
        KeyStore(path, must_exist=True)
    path.write_bytes(b"not a database" * 1000)
    with pytest.raises(StoreError, match="not a database"):
        KeyStore(path, must_exist=True)
    with pytest.raises(StoreError, match="not a database"):
        KeyStore(path)


def test_a_damaged_page_is_found_when_the_store_is_opened(tmp_path: Path) -> None:
    path = tmp_path / KEYS_FILE
    store = KeyStore(path)
    for i in range(100):
        store.create(f"customer {i}")
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    whole = path.read_bytes()
    broken = tmp_path / "broken.sqlite"
    broken.touch(mode=0o600)
    assert len(whole) > 5 * 4096
    for start in range(4096, len(whole), 4096):
        broken.write_bytes(whole[:start] + os.urandom(4096) + whole[start + 4096 :])
        with pytest.raises(StoreError, match=r"damaged|malformed"):
            KeyStore(broken, must_exist=True)


def test_a_store_that_others_may_open_is_refused(tmp_path: Path) -> None:
    path = tmp_path / KEYS_FILE
    KeyStore(path).create("ada")
    path.chmod(0o604)
    with pytest.raises(StoreError, match=r"mode 0604.*chmod 600"):
        KeyStore(path, must_exist=True)


def test_a_store_that_goes_away_lets_nobody_in(tmp_path: Path) -> None:
    path = tmp_path / KEYS_FILE
    _, token = KeyStore(path).create("ada")
    gateway = KeyStore(path, must_exist=True, cache_s=0.0)
    assert gateway.find(token) is not None
    path.rename(tmp_path / "elsewhere")
    with pytest.raises(StoreError, match="no store"):
        gateway.find(token)
    path.write_bytes((tmp_path / "elsewhere").read_bytes())
    path.chmod(0o600)
    with pytest.raises(StoreError, match="replaced"):
        gateway.find(token)


def test_a_gateway_cannot_write_keys(store: KeyStore, tmp_path: Path) -> None:
    store.create("ada")
    with pytest.raises(StoreError, match="readonly"):
        KeyStore(tmp_path / "home" / KEYS_FILE, must_exist=True).create("bob")


# The command line ----------------------------------------------------------------------------


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("AZEOTROPE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("COLUMNS", "200")
    return tmp_path / "home"


def run(*args: str) -> tuple[str, str]:
    """Standard output and standard error of a command that must work."""
    result = CliRunner().invoke(cli.app, list(args), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout, result.stderr


def test_create_prints_the_token_alone_and_says_that_it_is_not_stored(home: Path) -> None:
    assert default_store() == home
    out, notes = run("keys", "create", "ada", "--model", "a", "--model", "b", "--feature", "chat")
    record = KeyStore(home / KEYS_FILE).find(out.strip())
    assert record is not None
    assert (record.name, record.models, record.features) == ("ada", ("a", "b"), ("chat",))
    assert "not stored" in notes
    assert "distillation" not in notes
    shown, _ = run("keys", "list")
    assert record.id in shown
    assert "active" in shown
    assert out.strip() not in shown
    assert record.watermark_key not in shown


def test_a_distillation_licence_says_what_it_means(home: Path) -> None:
    out, notes = run("keys", "create", "lab", "--licence", "distillation", "--expires-days", "2")
    record = KeyStore(home / KEYS_FILE).find(out.strip())
    assert record is not None
    assert record.licence == "distillation"
    assert record.expires == pytest.approx(record.created + 2 * 86_400)
    assert "undefended teacher" in notes
    assert "It ends on" in notes


def test_keys_are_revoked_and_rotated_by_their_ids(tmp_path: Path) -> None:
    folder = tmp_path / "elsewhere"
    place = ("--store", str(folder))
    first = run("keys", "create", "ada", *place)[0].strip()
    store = KeyStore(folder / KEYS_FILE, cache_s=0.0)
    old = store.find(first)
    assert old is not None
    out, notes = run("keys", "rotate", old.id, "--overlap-hours", "1", *place)
    assert f"{old.id} works for 1 hours more" in notes
    new = store.find(out.strip())
    assert new is not None
    assert new.watermark_key == old.watermark_key
    assert store.find(first) is not None
    assert "revoked" in run("keys", "revoke", old.id, *place)[0]
    assert store.find(first) is None
    assert "is revoked" in run("keys", "rotate", new.id, *place)[1]


def test_usage_is_a_table_of_days(home: Path) -> None:
    run("keys", "create", "ada [bold]")
    [record] = KeyStore(home / KEYS_FILE).list()
    ledger = SqliteLedger(home / LEDGER_FILE, clock=Clock(1_700_000_000.0))
    limits = Limits.of(Tier())
    for name in ("a", "b"):
        ledger.reserve(
            *(record.id, name),
            **{"prompt": 1000, "completion": 500, "slots": 1},
            limits=limits,
            owner="o",
            lease_s=10.0,
        )
    ledger.settle("a", 234)
    # b's lease ran out long ago, so the table settles it at its prompt.
    for shown in (run("usage")[0], run("usage", "--key", record.id)[0]):
        [row] = [line for line in shown.splitlines() if record.id in line]
        cells = [cell.strip() for cell in row.strip("│").split("│")]
        assert cells == ["2023-11-14", record.id, "ada [bold]", "2", "2,000", "234", "0"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["keys", "revoke", "ak-1"], "no keys in"),
        (["usage"], "no keys in"),
        (["keys", "create", "x", "--licence", "all"], "licence must be usage or distillation"),
        (["keys", "create", "x", "--feature", "images"], "features are chat, completions, metrics"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    args: list[str],
    message: str,
    home: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["azeotrope", *args])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert message in line


def test_unknown_keys_are_named(home: Path) -> None:
    run("keys", "create", "ada")
    for args in (
        ["keys", "revoke", "ak-1"],
        ["keys", "rotate", "ak-1"],
        ["usage", "--key", "ak-1"],
    ):
        result = CliRunner().invoke(cli.app, args)
        assert isinstance(result.exception, ConfigError)
        assert "'ak-1'" in str(result.exception)
