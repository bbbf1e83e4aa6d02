"""The Lua scripts of the ledger in Redis.

Redis runs one script at a time, so each is a transaction. The names, all of them with the prefix
`{azeotrope}`:

    :request:ID   hash: key, day, prompt, charged, written, slots, owner, open, inside
    :window:KEY   sorted set: requests of the last minute by arrival
    :minute:KEY   hash: tokens of that window, slots of open requests
    :usage:KEY    hash: DAY:requests, DAY:prompt, DAY:completion, DAY:open, DAY:reserved
    :leases       sorted set: open requests by the end of their lease
    :keys         set: all keys

Times are milliseconds. The first argument of each script is the time, or "" for that of Redis.
"""

from gateway.accounts.quotas import DAY_MS, WINDOW_MS

# Three invariants hold between scripts:
# - :minute:KEY tokens = the sum of `charged` over the requests in :window:KEY.
# - :usage:KEY DAY:reserved = the sum of `charged` over the open requests of that day.
# - a :request:ID exists while it is open or `inside` the window, and no longer.
_SHARED = f"""
local P = KEYS[1]
local WINDOW, DAY = {WINDOW_MS}, {DAY_MS}
local NOW = tonumber(ARGV[1])
if not NOW then
  -- The clock of Redis is the same for all nodes; their own clocks may differ by seconds.
  local t = redis.call('TIME')
  NOW = tonumber(t[1]) * 1000 + math.floor(tonumber(t[2]) / 1000)
end
-- Lua's numbers are floats, and as text the time would be 1.8e+12.
local function int(x) return string.format('%d', x) end
local function add(hash, field, x) redis.call('HINCRBY', hash, field, int(x)) end
local function get(hash, field) return tonumber(redis.call('HGET', hash, field) or 0) end

local function settle(id, completion)
  local name = P .. ':request:' .. id
  local row = redis.call('HMGET', name,
    'open', 'inside', 'key', 'day', 'prompt', 'charged', 'slots')
  -- Unknown or settled before: only the first settlement counts.
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
    -- Still in the window: it now counts what it used, and `forget` needs that number later.
    add(minute, 'tokens', prompt + completion - charged)
    redis.call('HSET', name, 'open', 0, 'charged', int(prompt + completion))
  else
    redis.call('DEL', name)
  end
end

local function settle_expired()
  local expired = redis.call('ZRANGEBYSCORE', P .. ':leases', '-inf', int(NOW))
  for _, id in ipairs(expired) do settle(id, get(P .. ':request:' .. id, 'written')) end
  return #expired
end

-- Take the requests that have left the last minute out of a key's window.
local function forget(key)
  local window = P .. ':window:' .. key
  for _, id in ipairs(redis.call('ZRANGEBYSCORE', window, '-inf', int(NOW - WINDOW))) do
    local name = P .. ':request:' .. id
    local row = redis.call('HMGET', name, 'open', 'charged')
    add(P .. ':minute:' .. key, 'tokens', 0 - tonumber(row[2]))
    redis.call('ZREM', window, id)
    -- An open request still has to be settled; a settled one is in the sums of its day.
    if row[1] == '1' then redis.call('HSET', name, 'inside', 0) else redis.call('DEL', name) end
  end
end
"""

# Arguments: time, key, request, owner, prompt, prompt + completion, slots, the four limits, lease.
# Reply: a verdict, the six fields of `Minute` before the request, and for a refusal the arrivals
# whose leaving makes room for the request and for its tokens.
RESERVE = (
    _SHARED
    + """
local key, id, owner = ARGV[2], ARGV[3], ARGV[4]
local prompt, tokens, slots = tonumber(ARGV[5]), tonumber(ARGV[6]), tonumber(ARGV[7])
local window, minute = P .. ':window:' .. key, P .. ':minute:' .. key
local usage, name = P .. ':usage:' .. key, P .. ':request:' .. id
local day = int(math.floor(NOW / DAY))
-- A second reservation of an id would overwrite the first, whose tokens would stay reserved.
if redis.call('EXISTS', name) == 1 then return {'taken'} end
-- First give back what dead replicas hold: it may be what this request needs.
settle_expired()
forget(key)

local last = redis.call('ZRANGE', window, -1, -1, 'WITHSCORES')
local requests, used = redis.call('ZCARD', window), get(minute, 'tokens')
local under_way = get(minute, 'slots')
local today = get(usage, day .. ':prompt') + get(usage, day .. ':completion')
  + get(usage, day .. ':reserved')

-- Arrival of the request whose leaving removes the excess, or of the last one if that is too
-- little. `weight` is what a request contributes to the limit.
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
)

# Arguments: time, owner, lease, then pairs of a request and the tokens it has written.
PROGRESS = (
    _SHARED
    + """
for i = 4, #ARGV, 2 do
  local id, written = ARGV[i], tonumber(ARGV[i + 1])
  local name = P .. ':request:' .. id
  local row = redis.call('HMGET', name, 'open', 'owner', 'written')
  -- A request that was settled after its lease ran out has its bill: a late report changes nothing.
  if row[1] == '1' and row[2] == ARGV[2] then
    -- The greater number, because a report may arrive after a later one.
    redis.call('HSET', name, 'written', int(math.max(written, tonumber(row[3]))))
    redis.call('ZADD', P .. ':leases', int(NOW + tonumber(ARGV[3])), id)
  end
end
"""
)

# Arguments: time, request, tokens of its completions.
SETTLE = _SHARED + "settle(ARGV[2], tonumber(ARGV[3]))"

# Argument: time. Reply: how many requests were settled.
SWEEP = (
    _SHARED
    + """
local count = settle_expired()
for _, key in ipairs(redis.call('SMEMBERS', P .. ':keys')) do forget(key) end
return count
"""
)

# Arguments: time, key or "" for all. Reply: pairs of a key and its `:usage:` hash.
USAGE = (
    _SHARED
    + """
local keys = ARGV[2] ~= '' and {ARGV[2]} or redis.call('SMEMBERS', P .. ':keys')
local usage = {}
for i, key in ipairs(keys) do usage[i] = {key, redis.call('HGETALL', P .. ':usage:' .. key)} end
return usage
"""
)
