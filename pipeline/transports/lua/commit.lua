-- COMMIT: outputs, retries, replies, ledger and acknowledgement, together, once.
-- KEYS: stream, h, prog, due, bod, takes, owner, then (key, meta) an output
-- ARGV: group, fencing token ('' none: this group's partitions have no owner),
--       #segments, (id, n, low, high)…          low = '' settles an entry apart (a retry id)
--       handled, dead, retried,
--       #retries, (delay ms, count, times taken, origin, body)…
--       #outputs, (kind, n, body)…              kind: s stream · p Pub/Sub
--       #replies, (address, ttl ms, body)…
-- → {} when applied, else {status a segment}: 'ok', 'gone', or the progress string. Scripts do not roll back, so every
-- check comes before the first write; acknowledgements come first, so that a server out of memory lets commits pass.
local stream, h, prog, due, bod, takes = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5], KEYS[6]
local group = ARGV[1]
local at = 3
local function take()
  at = at + 1
  return ARGV[at - 1]
end

local segments, statuses, conflict, suppressed = {}, {}, false, 0
local fenced = ARGV[2] ~= '' and redis.call('GET', KEYS[7]) ~= ARGV[2]
for i = 1, tonumber(take()) do
  local s = {id = take(), n = tonumber(take()), low = take(), high = tonumber(take())}
  segments[i], statuses[i] = s, 'ok'
  if fenced then
    statuses[i], conflict = 'gone', true
  elseif s.low == '' then
    if not redis.call('ZSCORE', due, s.id) then
      statuses[i], conflict, suppressed = 'gone', true, suppressed + s.n
    end
  else
    s.low = tonumber(s.low)
    local pending = redis.pcall('XPENDING', stream, group, s.id, s.id, 1)
    if pending.err or #pending == 0 then
      statuses[i], conflict, suppressed = 'gone', true, suppressed + s.high - s.low + 1
    else
      local done = redis.call('HGET', prog, s.id)
      if done and string.find(string.sub(done, s.low + 1, s.high + 1), '1', 1, true) then
        local _, marked = string.gsub(string.sub(done, s.low + 1, s.high + 1), '1', '')
        statuses[i], conflict, suppressed = done, true, suppressed + marked
      end
    end
  end
end
if conflict then
  redis.call('HINCRBY', h, 'suppressed', suppressed)
  return statuses
end

local handled, dead, retried = tonumber(take()), tonumber(take()), tonumber(take())
local retries_at = at
at = at + 1 + 5 * tonumber(ARGV[at])
local outputs_at = at
for i = 1, tonumber(take()) do
  local kind = take()
  at = at + 2
  if kind == 's' then
    local t = redis.call('TYPE', KEYS[6 + 2 * i]).ok
    if t ~= 'stream' and t ~= 'none' then return redis.error_reply('WRONGTYPE ' .. KEYS[6 + 2 * i] .. ' is a ' .. t) end
  end
end

for _, s in ipairs(segments) do
  if s.low == '' then
    forget(h, due, bod, takes, s.id)
  else
    local done = redis.call('HGET', prog, s.id)
    if not done and s.low == 0 and s.high == s.n - 1 then
      redis.call('XACK', stream, group, s.id)
    else
      done = done or string.rep('0', s.n)
      done = string.sub(done, 1, s.low) .. string.rep('1', s.high - s.low + 1) .. string.sub(done, s.high + 2)
      if string.find(done, '0', 1, true) then
        redis.call('HSET', prog, s.id, done)
      else
        redis.call('XACK', stream, group, s.id)
        redis.call('HDEL', prog, s.id)
      end
    end
  end
end
if handled ~= 0 then redis.call('HINCRBY', h, 'handled', handled) end
if dead ~= 0 then redis.call('HINCRBY', h, 'dead', dead) end
if retried ~= 0 then redis.call('HINCRBY', h, 'retried', retried) end

at = retries_at
for _ = 1, tonumber(take()) do
  local delay, count, taken, origin = tonumber(take()), tonumber(take()), tonumber(take()), tonumber(take())
  set_apart(h, due, bod, takes, delay, count, taken, origin, take())
end

at = outputs_at
for i = 1, tonumber(take()) do
  local kind, n, body = take(), tonumber(take()), take()
  local key, meta = KEYS[6 + 2 * i], KEYS[7 + 2 * i]
  if kind == 's' then
    local id = add(key, meta, n, body)
    if type(id) == 'table' then redis.log(redis.LOG_WARNING, id.err) end
  else
    redis.call('PUBLISH', key, body)
    redis.call('HINCRBY', meta, 'published', n)
  end
end
for _ = 1, tonumber(take()) do
  local address, ttl, body = take(), take(), take()
  redis.call('RPUSH', address, body)
  redis.call('PEXPIRE', address, ttl)
end
return {}
