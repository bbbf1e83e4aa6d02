"""The ledger in Redis: the names that it uses."""

from datetime import date

from store_kinds import Clock, reserve

from gateway.accounts.ledger import Usage
from gateway.accounts.redis_ledger import RedisLedger


def test_all_names_in_redis_share_one_hash_tag(clock: Clock) -> None:
    import fakeredis

    server = fakeredis.FakeServer()
    # This client returns text; the other tests have one that returns bytes.
    client = fakeredis.FakeStrictRedis(server=server, decode_responses=True)
    ledger = RedisLedger(client, clock)
    reserve(ledger, "a")
    kinds = ("request:a", "window:ak-1", "minute:ak-1", "usage:ak-1", "leases", "keys")
    assert set(client.keys("*")) == {f"{{azeotrope}}:{kind}" for kind in kinds}
    # After a minute, names that grow with the number of requests are gone.
    ledger.settle("a", 5)
    clock.now += 61
    ledger.sweep()
    assert ledger.usage("ak-1") == [Usage("ak-1", date(2024, 10, 4), 1, 10, 5, 0)]
    assert set(client.keys("*")) == {
        f"{{azeotrope}}:{kind}" for kind in ("minute:ak-1", "usage:ak-1", "keys")
    }
