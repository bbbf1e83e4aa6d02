"""Key stores of every kind: how keys are found, created, revoked and rotated."""

import re
import time
from base64 import urlsafe_b64decode
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from store_kinds import Clock, StoreOpener, redis_imitation

from azeotrope.config import ConfigError
from gateway.accounts.database import StoreError
from gateway.accounts.keys import KeyStore
from gateway.accounts.redis_keys import RedisKeyStore
from gateway.accounts.sqlite_keys import KEYS_FILE, SqliteKeyStore


def test_only_its_token_finds_a_record(store: KeyStore) -> None:
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
    for text in (
        "",
        "az-",
        token[:-1],
        token + "x",
        token.swapcase(),
        "Bearer é\udcff",
        record.id,
    ):
        assert store.find(text) is None


def test_the_repr_hides_the_watermark_key(store: KeyStore) -> None:
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


def test_a_revocation_holds_at_once_in_this_process_and_within_a_second_in_others(
    open_store: StoreOpener, store: KeyStore, clock: Clock
) -> None:
    record, token = store.create("ada")
    gateway = open_store(must_exist=True)
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


def test_messages_say_what_is_not_allowed(store: KeyStore) -> None:
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


def test_a_gateway_does_not_start_without_a_store(open_store: StoreOpener) -> None:
    with pytest.raises(StoreError, match=r"no store at|no keys in this Redis"):
        open_store(must_exist=True)
    open_store()
    assert open_store(must_exist=True).list() == []


def test_a_gateway_cannot_write_keys(open_store: StoreOpener, store: KeyStore) -> None:
    record, _ = store.create("ada")
    gateway = open_store(must_exist=True)
    with pytest.raises(StoreError, match="readonly"):
        gateway.create("bob")
    with pytest.raises(StoreError, match="readonly"):
        gateway.revoke(record.id)
    assert store.list() == [record]


def test_all_keys_of_an_account_end_together(store: KeyStore, clock: Clock) -> None:
    first, first_token = store.create("ada")
    clock.now += 1
    second, second_token = store.rotate(first.id, overlap_s=60.0)
    clock.now += 1
    third, third_token = store.rotate(second.id, overlap_s=60.0)
    stranger, stranger_token = store.create("bob")
    assert {key.account for key in (first, second, third)} == {first.id}
    assert store.revoke(second.id).account == first.id
    ended = clock.now
    clock.now += 1
    # Any key of the account names it, and the time of the first revocation stays.
    revoked = store.revoke_account(third.id)
    assert [key.id for key in revoked] == [first.id, second.id, third.id]
    assert [key.revoked for key in revoked] == [clock.now, ended, clock.now]
    for token in (first_token, second_token, third_token):
        assert store.find(token) is None
    assert store.find(stranger_token) == stranger
    with pytest.raises(ConfigError, match="no key has the id 'ak-0'"):
        store.revoke_account("ak-0")


def test_a_store_has_one_secret(open_store: StoreOpener, store: KeyStore, tmp_path: Path) -> None:
    secret = store.secret()
    assert len(secret) == 32
    assert len(set(secret)) > 8
    store.create("ada")
    assert open_store().secret() == open_store(must_exist=True).secret() == secret
    new_file = SqliteKeyStore(tmp_path / "second" / KEYS_FILE)
    for new_store in (new_file, RedisKeyStore(redis_imitation())):
        assert new_store.secret() != secret
    assert secret.hex() not in repr(vars(store.list()[0]))


def test_simultaneous_changes_are_all_kept(open_store: StoreOpener, store: KeyStore) -> None:
    first, _ = store.create("ada")

    def rotate(_: int) -> str:
        return open_store().rotate(first.id, overlap_s=60.0)[0].id

    with ThreadPoolExecutor(4) as pool:
        rotated_ids = set(pool.map(rotate, range(12)))
    assert {key.id for key in store.list()} == {first.id} | rotated_ids
    assert {key.account for key in store.list()} == {first.id}
