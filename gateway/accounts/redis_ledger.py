"""The quota ledger for gateways on several nodes: one Lua script in Redis for each operation.

All names share the hash tag `{azeotrope}`, so that a Redis cluster keeps them on one node, where a
script may change them together:

    :request:ID   hash: key, day, prompt, charged, written, slots, owner, open, inside
    :window:KEY   sorted set: requests of the last minute by arrival
    :minute:KEY   hash: tokens of that window, slots of open requests
    :usage:KEY    hash: DAY:requests, DAY:prompt, DAY:completion, DAY:open, DAY:reserved
    :leases       sorted set: open requests by the end of their lease
    :keys         set: all keys
"""

from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from gateway.accounts.database import StoreError
from gateway.accounts.ledger import Usage, check_reservation, day_of
from gateway.accounts.quotas import DAY_MS, WINDOW_MS, Limits, Minute, Refusal, Standing
from gateway.accounts.redis_connection import TAG, RedisConnection, text

if TYPE_CHECKING:
    from redis import Redis

# Numbers go back to Redis through `%d`: Lua would write the time as 1.8e+12.
_SHARED = f"""
local P = KEYS[1]
local WINDOW, DAY = {WINDOW_MS}, {DAY_MS}
local NOW = tonumber(ARGV[1])
if not NOW then
  local t = redis.call('TIME')
  NOW = tonumber(t[1]) * 1000 + math.floor(tonumber(t[2]) / 1000)
end
local function int(x) return string.format('%d', x) end
local function add(hash, field, x) redis.call('HINCRBY', hash, field, int(x)) end
local function get(hash, field) return tonumber(redis.call('HGET', hash, field) or 0) end

local function settle(id, completion)
  local name = P .. ':request:' .. id
  local row = redis.call('HMGET', name,
    'open', 'inside', 'key', 'day', 'prompt', 'charged', 'slots')
  if row[1] ~= '1' then return end
  local key, day, prompt, charged = row[3], row[4], tonumber(row[5]), tonumber(row[6])
  local usage, minute = P .. ':usage:' .. key, P .. ':minute:' .. key
  redis.call('ZREM', P .. ':leases', id)
  add(usage, day .. ':open', -1)
  add(usage, day .. ':reserved', 0 - charged)
  add(usage, day .. ':requests', 1)
  add(usage, day .. ':prompt', prompt)
  add(usage, day .. ':completion', completion)
  add(minute, 'slots', 0 - tonumber(row[7]))
  if row[2] == '1' then
    add(minute, 'tokens', prompt + completion - charged)
    redis.call('HSET', name, 'open', 0, 'charged', int(prompt + completion))
  else
    redis.call('DEL', name)
  end
end

local function settle_lapsed()
  local lapsed = redis.call('ZRANGEBYSCORE', P .. ':leases', '-inf', int(NOW))
  for _, id in ipairs(lapsed) do settle(id, get(P .. ':request:' .. id, 'written')) end
  return #lapsed
end

local function forget(key)
  local window = P .. ':window:' .. key
  for _, id in ipairs(redis.call('ZRANGEBYSCORE', window, '-inf', int(NOW - WINDOW))) do
    local name = P .. ':request:' .. id
    local row = redis.call('HMGET', name, 'open', 'charged')
    add(P .. ':minute:' .. key, 'tokens', 0 - tonumber(row[2]))
    redis.call('ZREM', window, id)
    if row[1] == '1' then redis.call('HSET', name, 'inside', 0) else redis.call('DEL', name) end
  end
end
"""

_RESERVE = """
local key, id, owner = ARGV[2], ARGV[3], ARGV[4]
local prompt, tokens, slots = tonumber(ARGV[5]), tonumber(ARGV[6]), tonumber(ARGV[7])
local window, minute = P .. ':window:' .. key, P .. ':minute:' .. key
local usage, name = P .. ':usage:' .. key, P .. ':request:' .. id
local day = int(math.floor(NOW / DAY))
if redis.call('EXISTS', name) == 1 then return {'taken'} end
settle_lapsed()
forget(key)

local last = redis.call('ZRANGE', window, -1, -1, 'WITHSCORES')
local requests, used = redis.call('ZCARD', window), get(minute, 'tokens')
local under_way = get(minute, 'slots')
local today = get(usage, day .. ':prompt') + get(usage, day .. ':completion')
  + get(usage, day .. ':reserved')

-- Arrival of the request with which enough has left; of the last one if that is too little.
local function leaving(excess, weight)
  local arrived = 0
  if excess <= 0 then return arrived end
  local rows = redis.call('ZRANGE', window, 0, -1, 'WITHSCORES')
  for i = 1, #rows, 2 do
    arrived = tonumber(rows[i + 1])
    excess = excess - weight(rows[i])
    if excess <= 0 then break end
  end
  return arrived
end
local requests_over = requests + 1 - tonumber(ARGV[8])
local tokens_over = used + tokens - tonumber(ARGV[9])
local fits = requests_over <= 0 and tokens_over <= 0
  and today + tokens <= tonumber(ARGV[10]) and under_way + slots <= tonumber(ARGV[11])
local verdict, first, second = 'refused', 0, 0
if fits then
  verdict = 'reserved'
  redis.call('HSET', name, 'key', key, 'day', day, 'prompt', int(prompt), 'charged', int(tokens),
    'written', 0, 'slots', int(slots), 'owner', owner, 'open', 1, 'inside', 1)
  redis.call('ZADD', window, int(NOW), id)
  redis.call('ZADD', P .. ':leases', int(NOW + tonumber(ARGV[12])), id)
  redis.call('SADD', P .. ':keys', key)
  add(minute, 'tokens', tokens)
  add(minute, 'slots', slots)
  add(usage, day .. ':open', 1)
  add(usage, day .. ':reserved', tokens)
else
  first = leaving(requests_over, function(_) return 1 end)
  second = leaving(tokens_over, function(r) return get(P .. ':request:' .. r, 'charged') end)
end
return {verdict, int(NOW), requests, int(used), last[2] or '0', int(today), int(under_way),
  int(first), int(second)}
"""

_PROGRESS = """
for i = 4, #ARGV, 2 do
  local id, written = ARGV[i], tonumber(ARGV[i + 1])
  local name = P .. ':request:' .. id
  local row = redis.call('HMGET', name, 'open', 'owner', 'written')
  if row[1] == '1' and row[2] == ARGV[2] then
    redis.call('HSET', name, 'written', int(math.max(written, tonumber(row[3]))))
    redis.call('ZADD', P .. ':leases', int(NOW + tonumber(ARGV[3])), id)
  end
end
"""

_SETTLE = "settle(ARGV[2], tonumber(ARGV[3]))"

_SWEEP = """
local count = settle_lapsed()
for _, key in ipairs(redis.call('SMEMBERS', P .. ':keys')) do forget(key) end
return count
"""

_USAGE = """
local keys = ARGV[2] ~= '' and {ARGV[2]} or redis.call('SMEMBERS', P .. ':keys')
local found = {}
for i, key in ipairs(keys) do found[i] = {key, redis.call('HGETALL', P .. ':usage:' .. key)} end
return found
"""


class RedisLedger:
    """A ledger that gateways on several nodes share; needs the extra `redis`."""

    def __init__(
        self, url_or_client: "str | Redis", clock: Callable[[], float] | None = None
    ) -> None:
        """Connect and see whether Redis answers.

        Args:
            clock: seconds since 1970; None takes Redis's own, which is one for all nodes.

        Raises:
            ConfigError: if the package is not installed or the URL is not one.
            StoreError: if Redis does not answer.
        """
        self._redis, self._clock = RedisConnection(url_or_client, "the quotas"), clock
        register = self._redis.client.register_script
        self._reserve = register(_SHARED + _RESERVE)
        self._progress = register(_SHARED + _PROGRESS)
        self._settle = register(_SHARED + _SETTLE)
        self._sweep = register(_SHARED + _SWEEP)
        self._usage = register(_SHARED + _USAGE)
        self._run(self._progress, "", 0)

    def reserve(
        self,
        key: str,
        request: str,
        *,
        prompt: int,
        completion: int,
        slots: int,
        limits: Limits,
        owner: str,
        lease_s: float,
    ) -> Standing | Refusal:
        check_reservation(prompt, completion, slots, lease_s)
        tokens = prompt + completion
        verdict, *numbers = self._run(
            self._reserve,
            *(key, request, owner, prompt, tokens, slots),
            *(limits.requests_per_minute, limits.tokens_per_minute),
            *(limits.tokens_per_day, limits.concurrency, _ms(lease_s)),
        )
        if text(verdict) == "taken":
            raise StoreError(f"the request {request!r} was reserved before; ids are used once")
        *facts, first, second = map(int, numbers)
        minute = Minute(*facts)
        if text(verdict) == "reserved":
            return minute.after(tokens, slots).standing(limits)
        return minute.refusal(limits, tokens, slots, {"requests": first, "tokens": second})

    def progress(self, owner: str, written: Mapping[str, int], *, lease_s: float) -> None:
        pairs = [part for pair in written.items() for part in pair]
        self._run(self._progress, owner, _ms(lease_s), *pairs)

    def settle(self, request: str, completion: int) -> None:
        if completion < 0:
            raise ValueError(f"a completion has 0 tokens or more, got {completion}")
        self._run(self._settle, request, completion)

    def sweep(self) -> int:
        return int(self._run(self._sweep))

    def usage(self, key: str | None = None) -> list[Usage]:
        days: dict[tuple[int, str], dict[str, int]] = defaultdict(dict)
        for name, flat in self._run(self._usage, key or ""):
            for field, count in zip(flat[::2], flat[1::2], strict=True):
                day, _, what = text(field).partition(":")
                days[int(day), text(name)][what] = int(count)
        return [
            Usage(
                key=name,
                day=day_of(day),
                requests=counts.get("requests", 0),
                prompt_tokens=counts.get("prompt", 0),
                completion_tokens=counts.get("completion", 0),
                open_requests=counts["open"],
            )
            for (day, name), counts in sorted(days.items())
        ]

    def _run(self, script: Any, *values: str | int) -> Any:
        now = "" if self._clock is None else _ms(self._clock())
        with self._redis.asked():
            return script(keys=[TAG], args=[now, *values])


def _ms(seconds: float) -> int:
    return round(seconds * 1000)
