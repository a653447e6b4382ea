-- COMMIT: outputs, retries, replies, ledger and acknowledgement, together, once.
-- KEYS: stream, h (the group's other keys differ in their last part), then (key, meta) an output
-- ARGV: group, fencing token ('' none: this group's partitions have no owner) or, without segments, the reader's name of 16
--       characters and the commit's own after it ('' none),
--       seven packed numbers: segments, handled, dead, retried, retries, outputs, replies
--       (id, packed n, low, high)… a segment    an id of an entry apart begins with r
--       (delay ms, count, times taken, origin, body)… a retry
--       (kind, n, body)… an output              kind: s stream · w<capacity> of one that is bounded · d<capacity> that drops
--                                               its oldest · p Pub/Sub
--       (address, body)… a reply
-- → {} when applied, else {status a segment}: 'ok', 'gone', or the progress string; an error when a blob of an output or a
-- reply has expired. Scripts do not roll back, so every check comes before the first write; what only removes comes first, so
-- that a server out of memory lets commits pass.
local stream, h, group = KEYS[1], KEYS[2], ARGV[1]
local keys = string.sub(h, 1, -2)
local prog = keys .. 'prog'
local n_segments, handled, dead, retried, n_retries, n_outputs, n_replies = struct.unpack('>I4I4I4I4I4I4I4', ARGV[3])
local retries_at = 4 + 2 * n_segments
local outputs_at = retries_at + 5 * n_retries
local replies_at = outputs_at + 3 * n_outputs

local references, now = {}, nil
for i = 0, n_outputs - 1 do
  if ARGV[outputs_at + 3 * i] ~= 'p' then
    local key = KEYS[3 + 2 * i]
    -- here: refusal
    now = now or redis.call('TIME')
    local refused = refusal(key, KEYS[4 + 2 * i], ARGV[outputs_at + 3 * i + 1], now)
    if refused then return refused end
    local body = ARGV[outputs_at + 3 * i + 2]
    if string.byte(body, 1) == 0 then
      -- here: beside, chunks_of, is_there
      references[i] = beside(body)
      if references[i] and not is_there(key, references[i]) then return redis.error_reply('EXPIRED a blob of ' .. key) end
    end
  end
end

local blobs = {}
for at = replies_at, replies_at + 2 * n_replies - 1, 2 do
  local body = ARGV[at + 1]
  if string.byte(body, 1) == 0 then
    -- here: beside, chunks_of, is_there
    local where, reference = ARGV[at] .. ':s', beside(body)
    if reference and not is_there(where, reference) then return redis.error_reply('EXPIRED a blob of ' .. ARGV[at]) end
    for _, key in ipairs(reference and chunks_of(where, reference) or {}) do blobs[#blobs + 1] = key end
  end
end

local segments, conflict, suppressed = {}, false, 0
local fenced = false
if ARGV[2] ~= '' and n_segments > 0 then
  -- Nobody's: its lease ran out while Redis or its owner was away, and no other's commits have overtaken this one's events.
  local owner = redis.call('GET', keys .. 'owner')
  fenced = owner and owner ~= ARGV[2]
end
for i = 1, n_segments do
  local id = ARGV[2 + 2 * i]
  local n, low, high = struct.unpack('>I4I4I4', ARGV[3 + 2 * i])
  local s = {id = id, n = n, low = low, high = high, status = 'ok', apart = string.byte(id) == 114}
  segments[i] = s
  if fenced then
    s.status, conflict = 'gone', true
  elseif s.apart then
    if not redis.call('ZSCORE', keys .. 'due', id) then
      s.status, conflict, suppressed = 'gone', true, suppressed + n
    end
  else
    s.done = redis.call('HGET', prog, id)
    local pending
    if n_segments == 1 and not s.done and high - low == n - 1 then
      -- The usual case, one frame as a whole: whether it was pending is what acknowledging it tells.
      pending = redis.call('XACK', stream, group, id) == 1
      s.settled = pending
    else
      local found = redis.pcall('XPENDING', stream, group, id, id, 1)
      pending = not found.err and #found > 0
    end
    if not pending then
      s.status, conflict, suppressed = 'gone', true, suppressed + high - low + 1
    elseif s.done and string.find(string.sub(s.done, low + 1, high + 1), '1', 1, true) then
      local _, marked = string.gsub(string.sub(s.done, low + 1, high + 1), '1', '')
      s.status, conflict, suppressed = s.done, true, suppressed + marked
    end
  end
end
if conflict then
  redis.call('HDEL', prog, '')
  redis.call('HINCRBY', h, 'suppressed', suppressed)
  local statuses = {}
  for i, s in ipairs(segments) do statuses[i] = s.status end
  return statuses
end

for _, s in ipairs(segments) do
  if s.apart then
    forget(h, keys .. 'due', keys .. 'bod', keys .. 'takes', s.id)
  elseif not s.settled then
    local done = redis.call('HGET', prog, s.id) -- two segments may be of one entry
    if not done and s.high - s.low == s.n - 1 then
      redis.call('XACK', stream, group, s.id)
    else
      done = done or string.rep('0', s.n)
      done = string.sub(done, 1, s.low) .. string.rep('1', s.high - s.low + 1) .. string.sub(done, s.high + 2)
      if string.find(done, '0', 1, true) then
        redis.call('HDEL', prog, '')
        redis.call('HSET', prog, s.id, done)
      else
        redis.call('XACK', stream, group, s.id)
        redis.call('HDEL', prog, s.id)
      end
    end
  end
end
if n_segments == 0 then
  redis.call('HDEL', h, '')
  -- Nothing tells a live group's commit from its repetition but its name.
  local name = ARGV[2]
  if name ~= '' and redis.call('SET', keys .. 'src:' .. string.sub(name, 1, 16), name, 'PX', '86400000', 'GET') == name then
    return {}
  end
end
-- A live group's first count is its first since it joined, or since the server lost its data and forgot the group.
local first = n_segments == 0
if handled ~= 0 then first = redis.call('HINCRBY', h, 'handled', handled) == handled and first end
if dead ~= 0 then first = redis.call('HINCRBY', h, 'dead', dead) == dead and first end
if retried ~= 0 then first = redis.call('HINCRBY', h, 'retried', retried) == retried and first end
if first then redis.call('SADD', string.sub(stream, 1, -2) .. 'g', group) end

for at = retries_at, outputs_at - 1, 5 do
  local delay, count, taken, origin = tonumber(ARGV[at]), tonumber(ARGV[at + 1]), tonumber(ARGV[at + 2]), tonumber(ARGV[at + 3])
  set_apart(h, keys .. 'due', keys .. 'bod', keys .. 'takes', delay, count, taken, origin, ARGV[at + 4])
end
for i = 0, n_outputs - 1 do
  local at = outputs_at + 3 * i
  local key, meta, kind, n, body = KEYS[3 + 2 * i], KEYS[4 + 2 * i], ARGV[at], ARGV[at + 1], ARGV[at + 2]
  if kind == 'p' then
    redis.call('PUBLISH', key, body)
    redis.call('HINCRBY', meta, 'published', n)
  else
    if kind ~= 's' then
      -- here: events_in, nearest, group_of, positions, drop_oldest, in_events, weigh
      local capacity = string.sub(kind, 2)
      if string.byte(kind) == 100 then drop_oldest(key, meta, string.sub(key, 1, -2) .. 'g', n, in_events(meta, capacity)) end
      weigh(meta, capacity, n, body)
    end
    local id = add(key, meta, n, body, now)
    if type(id) == 'table' then
      redis.log(redis.LOG_WARNING, id.err)
    elseif references[i] then
      -- here: chunks_of, refer
      refer(key, id, references[i])
    end
  end
end
for at = replies_at, replies_at + 2 * n_replies - 1, 2 do
  -- Nobody can wait at a key that holds something else.
  if type(redis.pcall('RPUSH', ARGV[at], ARGV[at + 1])) == 'number' then redis.call('PEXPIRE', ARGV[at], '60000') end
end
for _, key in ipairs(blobs) do redis.call('PEXPIRE', key, '60000') end
return {}
