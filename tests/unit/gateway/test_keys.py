"""API keys: what is kept, who is let in, and the commands that make and end keys.

The contract runs over SQLite, over an imitation of Redis, and over a real `redis-server` if there
is one on the PATH.
"""

import hashlib
import os
import re
import sqlite3
import subprocess
import sys
import time
from base64 import urlsafe_b64decode
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import fakeredis
import pytest
import redis
from typer.testing import CliRunner

from azeotrope.config import ConfigError
from gateway.accounts import keys
from gateway.accounts.database import StoreError
from gateway.accounts.key_records import UNDEFENDED
from gateway.accounts.keys import KeyStore
from gateway.accounts.ledger import Reservation
from gateway.accounts.quotas import Limits
from gateway.accounts.redis_keys import RedisKeyStore
from gateway.accounts.redis_ledger import RedisLedger
from gateway.accounts.sqlite_keys import KEYS_FILE, SqliteKeyStore
from gateway.accounts.sqlite_ledger import LEDGER_FILE, SqliteLedger
from gateway.accounts.stores import default_store
from gateway.policy import Tier
from workflows import cli

ROOT = Path(__file__).parents[3]


class Clock:
    """Seconds since 1970, moved by hand."""

    def __init__(self, now: float) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock(1_800_000_000.0)


Opener = Callable[..., KeyStore]


@pytest.fixture(params=["sqlite", "imitation", "redis"])
def opener(request: pytest.FixtureRequest, tmp_path: Path, clock: Clock) -> Opener:
    """Opens one store again and again, as other processes would."""
    if request.param == "sqlite":
        return partial(SqliteKeyStore, tmp_path / "home" / KEYS_FILE, clock=clock)
    if request.param == "imitation":
        return partial(RedisKeyStore, imitation(), clock=clock)
    url = request.getfixturevalue("redis_url")
    redis.Redis.from_url(url).flushall()
    return partial(RedisKeyStore, url, clock=clock)


@pytest.fixture
def no_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every `find` asks the store."""
    monkeypatch.setattr(keys, "CACHE_S", 0.0)


@pytest.fixture
def store(opener: Opener) -> KeyStore:
    return opener()


@pytest.fixture
def file_store(tmp_path: Path, clock: Clock) -> SqliteKeyStore:
    return SqliteKeyStore(tmp_path / "home" / KEYS_FILE, clock=clock)


def imitation() -> fakeredis.FakeStrictRedis:
    return fakeredis.FakeStrictRedis(server=fakeredis.FakeServer())


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


def test_the_files_hold_no_token(file_store: SqliteKeyStore, tmp_path: Path) -> None:
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
    opener: Opener, store: KeyStore, clock: Clock
) -> None:
    record, token = store.create("ada")
    gateway = opener(must_exist=True)
    assert gateway.find(token) == record
    revoked = store.revoke(record.id)
    assert revoked.revoked == clock.now
    assert store.find(token) is None
    time.sleep(1.0)
    assert gateway.find(token) is None
    clock.now += 5
    assert store.revoke(record.id) == revoked


def test_rotation_keeps_rights_and_watermark(store: KeyStore, clock: Clock) -> None:
    old, old_token = store.create("ada", tier="trusted", models=("m",), expires_in_s=1000.0)
    clock.now += 100
    new, new_token = store.rotate(old.id)
    assert store.find(old_token) is None
    assert store.find(new_token) == new
    assert new.id != old.id
    assert new.created == clock.now
    assert new.account == old.account == old.id
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
    whole = path.read_bytes()
    broken = tmp_path / "broken.sqlite"
    broken.touch(mode=0o600)
    assert len(whole) > 5 * 4096
    for start in range(4096, len(whole), 4096):
        broken.write_bytes(whole[:start] + os.urandom(4096) + whole[start + 4096 :])
        with pytest.raises(StoreError, match=r"damaged|malformed"):
            SqliteKeyStore(broken, must_exist=True)


def test_a_store_that_others_may_open_is_refused(tmp_path: Path) -> None:
    path = tmp_path / KEYS_FILE
    SqliteKeyStore(path).create("ada")
    path.chmod(0o604)
    with pytest.raises(StoreError, match=r"mode 0604.*chmod 600"):
        SqliteKeyStore(path, must_exist=True)


@pytest.mark.usefixtures("no_cache")
def test_a_store_that_goes_away_lets_nobody_in(tmp_path: Path) -> None:
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


def test_a_gateway_cannot_write_keys(opener: Opener, store: KeyStore) -> None:
    record, _ = store.create("ada")
    gateway = opener(must_exist=True)
    with pytest.raises(StoreError, match="readonly"):
        gateway.create("bob")
    with pytest.raises(StoreError, match="readonly"):
        gateway.revoke(record.id)
    assert store.list() == [record]


# The customer, over rotations -----------------------------------------------------------------


def test_all_keys_of_an_account_end_together(store: KeyStore, clock: Clock) -> None:
    first, first_token = store.create("ada")
    clock.now += 1
    second, second_token = store.rotate(first.id, overlap_s=60.0)
    clock.now += 1
    third, third_token = store.rotate(second.id, overlap_s=60.0)
    other, other_token = store.create("bob")
    assert {key.account for key in (first, second, third)} == {first.id}
    assert store.revoke(second.id).account == first.id
    ended = clock.now
    clock.now += 1
    # Any key of the account names it, and the time of the first revocation stays.
    gone = store.revoke_account(third.id)
    assert [key.id for key in gone] == [first.id, second.id, third.id]
    assert [key.revoked for key in gone] == [clock.now, ended, clock.now]
    for token in (first_token, second_token, third_token):
        assert store.find(token) is None
    assert store.find(other_token) == other
    with pytest.raises(ConfigError, match="no key has the id 'ak-0'"):
        store.revoke_account("ak-0")


# The secret of the store ----------------------------------------------------------------------


def test_a_store_has_one_secret(opener: Opener, store: KeyStore, tmp_path: Path) -> None:
    secret = store.secret()
    assert len(secret) == 32
    assert len(set(secret)) > 8
    store.create("ada")
    assert opener().secret() == opener(must_exist=True).secret() == secret
    for other in (SqliteKeyStore(tmp_path / "other" / KEYS_FILE), RedisKeyStore(imitation())):
        assert other.secret() != secret
    assert secret.hex() not in repr(vars(store.list()[0]))


def test_processes_that_begin_a_store_together_agree_on_its_secret(tmp_path: Path) -> None:
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
    found = {worker.communicate(timeout=60)[0].strip() for worker in workers}
    assert found == {SqliteKeyStore(path).secret().hex()}


def test_a_store_without_its_secret_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / KEYS_FILE
    SqliteKeyStore(path).create("ada")
    with sqlite3.connect(path) as connection:
        connection.execute("DELETE FROM secrets")
    with pytest.raises(StoreError, match="has no secret"):
        SqliteKeyStore(path, must_exist=True)
    assert len(SqliteKeyStore(path).secret()) == 32


# Redis ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decodes", [False, True])
def test_redis_holds_digests_and_no_token(decodes: bool) -> None:
    server = fakeredis.FakeServer()
    client = fakeredis.FakeStrictRedis(server=server, decode_responses=decodes)
    store = RedisKeyStore(client)
    made = [store.create(f"customer {i}") for i in range(3)]
    assert [store.find(token) for _, token in made] == [record for record, _ in made]
    plain = fakeredis.FakeStrictRedis(server=server, decode_responses=True)
    names = set(plain.keys("*"))
    assert names == {f"{{azeotrope}}:api-{kind}" for kind in ("keys", "ids", "secret")}
    hashes = [plain.hgetall(name) for name in names if plain.type(name) == "hash"]
    content = repr(hashes)
    for record, token in made:
        assert record.name in content
        assert token[3:] not in content
        assert urlsafe_b64decode(token[3:] + "=").hex() not in content


def test_a_gateway_does_not_start_on_a_redis_without_keys(opener: Opener) -> None:
    with pytest.raises(StoreError, match=r"no store at|no keys in this Redis"):
        opener(must_exist=True)
    opener()
    assert opener(must_exist=True).list() == []


@pytest.mark.usefixtures("no_cache")
def test_a_redis_that_goes_away_lets_nobody_in() -> None:
    server = fakeredis.FakeServer()
    store = RedisKeyStore(fakeredis.FakeStrictRedis(server=server))
    record, token = store.create("ada")
    server.connected = False
    for act in (
        lambda: store.find(token),
        store.list,
        lambda: store.create("bob"),
        lambda: store.revoke(record.id),
    ):
        with pytest.raises(StoreError, match="the keys in Redis cannot be used"):
            act()
    server.connected = True
    assert store.find(token) == record
    fakeredis.FakeStrictRedis(server=server).flushall()
    assert store.find(token) is None


@pytest.mark.usefixtures("no_cache")
def test_half_a_record_opens_nothing() -> None:
    client = imitation()
    store = RedisKeyStore(client)
    _, token = store.create("ada")
    for wrong in ("{", "{}", '{"models": "[]", "features": "[]"}'):
        client.hset("{azeotrope}:api-keys", hashlib.sha256(token.encode()).hexdigest(), wrong)
        with pytest.raises(StoreError, match="cannot be read"):
            store.find(token)


def test_changes_at_once_are_all_kept(opener: Opener, store: KeyStore) -> None:
    first, _ = store.create("ada")

    def rotated(_: int) -> str:
        return opener().rotate(first.id, overlap_s=60.0)[0].id

    with ThreadPoolExecutor(4) as pool:
        made = set(pool.map(rotated, range(12)))
    assert {key.id for key in store.list()} == {first.id} | made
    assert {key.account for key in store.list()} == {first.id}


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
    record = SqliteKeyStore(home / KEYS_FILE).find(out.strip())
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
    record = SqliteKeyStore(home / KEYS_FILE).find(out.strip())
    assert record is not None
    assert record.licence == "distillation"
    assert record.expires == pytest.approx(record.created + 2 * 86_400)
    assert "undefended teacher" in notes
    assert "It ends on" in notes


@pytest.mark.usefixtures("no_cache")
def test_keys_are_revoked_and_rotated_by_their_ids(tmp_path: Path) -> None:
    folder = tmp_path / "elsewhere"
    place = ("--store", str(folder))
    first = run("keys", "create", "ada", *place)[0].strip()
    store = SqliteKeyStore(folder / KEYS_FILE)
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
    [record] = SqliteKeyStore(home / KEYS_FILE).list()
    ledger = SqliteLedger(home / LEDGER_FILE, clock=Clock(1_700_000_000.0))
    limits = Limits.of(Tier())
    for name in ("a", "b"):
        ledger.reserve(Reservation(record.id, name, 1000, 500, 1), limits, owner="o", lease_s=10.0)
    ledger.settle("a", 234)
    # b's lease ran out long ago, so the table settles it at its prompt.
    for shown in (run("usage")[0], run("usage", "--key", record.id)[0]):
        [row] = [line for line in shown.splitlines() if record.id in line]
        cells = [cell.strip() for cell in row.strip("│").split("│")]
        assert cells == ["2023-11-14", record.id, "ada [bold]", "2", "2,000", "234", "0"]
    # What a licence takes of the undefended teacher stands apart, under the same name.
    licensed = record.id + UNDEFENDED
    ledger.reserve(Reservation(licensed, "c", 7, 5, 1), limits, owner="o", lease_s=10.0)
    ledger.settle("c", 5)
    shown = run("usage", "--key", record.id)[0]
    [row] = [line for line in shown.splitlines() if licensed in line]
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
    for shown in (run("usage")[0], run("usage", "--key", new.id)[0]):
        [row] = [line for line in shown.splitlines() if "ak-" in line]
        assert old.id in row
    out, _ = run("keys", "revoke", new.id, "--all")
    assert [line.split()[0] for line in out.splitlines()] == [old.id, new.id]
    assert store.find(first) is store.find(second) is None


def test_no_command_shows_the_secret(home: Path) -> None:
    said = "".join(run("keys", "create", "ada"))
    store = SqliteKeyStore(home / KEYS_FILE)
    said += "".join(run("keys", "list") + run("usage") + run("keys", "rotate", store.list()[0].id))
    assert store.secret().hex() not in said
    assert repr(store.secret()) not in said


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
