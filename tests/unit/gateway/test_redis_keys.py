"""A key store in Redis: what it contains, and failures of the server."""

import hashlib
from base64 import urlsafe_b64decode

import fakeredis
import pytest
from store_kinds import redis_imitation

from gateway.accounts.database import StoreError
from gateway.accounts.redis_keys import RedisKeyStore


@pytest.mark.parametrize("decodes", [False, True])
def test_redis_contains_digests_and_no_token(decodes: bool) -> None:
    server = fakeredis.FakeServer()
    client = fakeredis.FakeStrictRedis(server=server, decode_responses=decodes)
    store = RedisKeyStore(client)
    created = [store.create(f"customer {i}") for i in range(3)]
    assert [store.find(token) for _, token in created] == [record for record, _ in created]
    reader = fakeredis.FakeStrictRedis(server=server, decode_responses=True)
    names = set(reader.keys("*"))
    assert names == {f"{{azeotrope}}:api-{kind}" for kind in ("keys", "ids", "secret")}
    hashes = [reader.hgetall(name) for name in names if reader.type(name) == "hash"]
    content = repr(hashes)
    for record, token in created:
        assert record.name in content
        assert token[3:] not in content
        assert urlsafe_b64decode(token[3:] + "=").hex() not in content


@pytest.mark.usefixtures("no_cache")
def test_a_redis_that_fails_admits_no_token() -> None:
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
def test_a_partial_record_grants_nothing() -> None:
    client = redis_imitation()
    store = RedisKeyStore(client)
    _, token = store.create("ada")
    for wrong in ("{", "{}", '{"models": "[]", "features": "[]"}'):
        client.hset("{azeotrope}:api-keys", hashlib.sha256(token.encode()).hexdigest(), wrong)
        with pytest.raises(StoreError, match="cannot be read"):
            store.find(token)
