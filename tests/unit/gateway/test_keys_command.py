"""The commands `azeotrope keys` and `azeotrope usage`."""

import re
import sys
from pathlib import Path

import pytest
import redis
from store_kinds import Clock
from typer.testing import CliRunner

from azeotrope.config import ConfigError
from gateway.accounts.key_records import UNDEFENDED
from gateway.accounts.ledger import Reservation
from gateway.accounts.quotas import Limits
from gateway.accounts.redis_keys import RedisKeyStore
from gateway.accounts.redis_ledger import RedisLedger
from gateway.accounts.sqlite_keys import KEYS_FILE, SqliteKeyStore
from gateway.accounts.sqlite_ledger import LEDGER_FILE, SqliteLedger
from gateway.accounts.stores import default_store
from gateway.policy import Tier
from workflows import cli


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


def test_create_prints_only_the_token_and_a_note_that_it_is_not_stored(home: Path) -> None:
    assert default_store() == home
    out, notes = run("keys", "create", "ada", "--model", "a", "--model", "b", "--feature", "chat")
    record = SqliteKeyStore(home / KEYS_FILE).find(out.strip())
    assert record is not None
    assert (record.name, record.models, record.features) == ("ada", ("a", "b"), ("chat",))
    assert "not stored" in notes
    assert "distillation" not in notes
    table, _ = run("keys", "list")
    assert record.id in table
    assert "active" in table
    assert out.strip() not in table
    assert record.watermark_key not in table


def test_create_warns_about_a_distillation_licence(home: Path) -> None:
    out, notes = run("keys", "create", "lab", "--licence", "distillation", "--expires-days", "2")
    record = SqliteKeyStore(home / KEYS_FILE).find(out.strip())
    assert record is not None
    assert record.licence == "distillation"
    assert record.expires == pytest.approx(record.created + 2 * 86_400)
    assert "undefended teacher" in notes
    assert "It ends on" in notes


@pytest.mark.usefixtures("no_cache")
def test_keys_are_revoked_and_rotated_by_their_ids(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    options = ("--store", str(folder))
    first = run("keys", "create", "ada", *options)[0].strip()
    store = SqliteKeyStore(folder / KEYS_FILE)
    old = store.find(first)
    assert old is not None
    out, notes = run("keys", "rotate", old.id, "--overlap-hours", "1", *options)
    assert f"{old.id} works for 1 hours more" in notes
    new = store.find(out.strip())
    assert new is not None
    assert new.watermark_key == old.watermark_key
    assert store.find(first) is not None
    assert "revoked" in run("keys", "revoke", old.id, *options)[0]
    assert store.find(first) is None
    assert "is revoked" in run("keys", "rotate", new.id, *options)[1]


def test_usage_is_a_table_of_days(home: Path) -> None:
    run("keys", "create", "ada [bold]")
    [record] = SqliteKeyStore(home / KEYS_FILE).list()
    ledger = SqliteLedger(home / LEDGER_FILE, clock=Clock(1_700_000_000.0))
    limits = Limits.of(Tier())
    for name in ("a", "b"):
        ledger.reserve(Reservation(record.id, name, 1000, 500, 1), limits, owner="o", lease_s=10.0)
    ledger.settle("a", 234)
    # b's lease ran out long ago, so the table settles it at its prompt.
    for table in (run("usage")[0], run("usage", "--key", record.id)[0]):
        [row] = [line for line in table.splitlines() if record.id in line]
        cells = [cell.strip() for cell in row.strip("│").split("│")]
        assert cells == ["2023-11-14", record.id, "ada [bold]", "2", "2,000", "234", "0"]
    # Requests to the undefended teacher have a row of their own, with the same name.
    licensed = record.id + UNDEFENDED
    ledger.reserve(Reservation(licensed, "c", 7, 5, 1), limits, owner="o", lease_s=10.0)
    ledger.settle("c", 5)
    table = run("usage", "--key", record.id)[0]
    [row] = [line for line in table.splitlines() if licensed in line]
    assert [cell.strip() for cell in row.strip("│").split("│")][1:5] == [
        *(licensed, "ada [bold]", "1", "7"),
    ]


@pytest.mark.usefixtures("no_cache")
def test_a_rotated_key_is_the_same_customer(home: Path) -> None:
    first = run("keys", "create", "ada")[0].strip()
    store = SqliteKeyStore(home / KEYS_FILE)
    [old] = store.list()
    assert "account" not in run("keys", "list")[0]
    second = run("keys", "rotate", old.id, "--overlap-hours", "1")[0].strip()
    new = store.find(second)
    assert new is not None
    rows = [line for line in run("keys", "list")[0].splitlines() if "ak-" in line]
    assert [re.findall(r"ak-[0-9a-f]{8}", row) for row in rows] == [[old.id], [new.id, old.id]]
    # The gateway reserves for the account.
    ledger = SqliteLedger(home / LEDGER_FILE)
    for key in (old, new):
        ledger.reserve(
            Reservation(key.account, f"request of {key.id}", 1, 1, 1),
            Limits.of(Tier()),
            owner="o",
            lease_s=10.0,
        )
    for table in (run("usage")[0], run("usage", "--key", new.id)[0]):
        [row] = [line for line in table.splitlines() if "ak-" in line]
        assert old.id in row
    out, _ = run("keys", "revoke", new.id, "--all")
    assert [line.split()[0] for line in out.splitlines()] == [old.id, new.id]
    assert store.find(first) is store.find(second) is None


def test_no_command_shows_the_secret(home: Path) -> None:
    output = "".join(run("keys", "create", "ada"))
    store = SqliteKeyStore(home / KEYS_FILE)
    output += "".join(
        run("keys", "list") + run("usage") + run("keys", "rotate", store.list()[0].id)
    )
    assert store.secret().hex() not in output
    assert repr(store.secret()) not in output


@pytest.mark.usefixtures("no_cache")
def test_commands_find_keys_in_redis(
    home: Path, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    redis.Redis.from_url(redis_url).flushall()
    result = CliRunner().invoke(cli.app, ["keys", "list", "--redis", redis_url])
    assert "no keys in this Redis" in str(result.exception)
    token = run("keys", "create", "ada", "--redis", redis_url)[0].strip()
    store = RedisKeyStore(redis_url, must_exist=True)
    record = store.find(token)
    assert record is not None
    monkeypatch.setenv("AZEOTROPE_REDIS_URL", redis_url)
    assert record.id in run("keys", "list")[0]
    RedisLedger(redis_url).reserve(
        Reservation(record.account, "a", 1, 1, 1), Limits.of(Tier()), owner="o", lease_s=10.0
    )
    new = store.find(run("keys", "rotate", record.id)[0].strip())
    assert new is not None
    [row] = [line for line in run("usage", "--key", new.id)[0].splitlines() if "ak-" in line]
    assert record.id in row
    run("keys", "revoke", new.id)
    assert store.find(token) is None
    assert not home.exists()


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
