-- What scripts share. A script gets what it names, at its top or where it says "-- here: name, name": functions are made anew
-- at each call, which is not for nothing. Nor are other things (instructions, of some 15,000 for XADD): an argument 1,200,
-- tonumber 1,600, a table returned 6,000, '%.0f' 3,000.
local function now_ms()
  local t = redis.call('TIME')
  return t[1] * 1000 + math.floor(t[2] / 1000)
end

local function offset_of(id)
  return tonumber(string.match(id, '%-(%d+)$'))
end

-- Events of an entry, by its fields: 0 in what the pipeline did not write.
local function events_in(fields)
  local n = #fields == 4 and fields[1] == 'n' and fields[3] == 'b' and string.match(fields[2], '^%d%d?%d?%d?%d?$')
  n = tonumber(n or '0')
  return n <= 65536 and n or 0
end

-- The first entry of ours that XRANGE (or XREVRANGE) finds between two ids.
local function nearest(stream, command, from, to)
  while true do
    local entry = redis.call(command, stream, from, to, 'COUNT', 1)[1]
    if not entry or events_in(entry[2]) > 0 then return entry end
    from = '(' .. entry[1]
  end
end

-- Where the tensors of a frame lie that are beside it, which is what it ends with: "shm <owner> …" in shared memory, "blob
-- <name> <chunks>" in keys of their own. nil for other frames than those, "\0PLR".
local function beside(body)
  if string.byte(body, 4) ~= 82 then return nil end
  local _, length = struct.unpack('<I4I4', string.sub(body, 5, 12))
  return string.sub(body, 21 + length)
end

-- The keys of a blob's chunks; none for other references.
local function chunks_of(stream, reference)
  local keys = {}
  local name, chunks = string.match(reference, '^blob (%x+) (%d+)$')
  for i = 1, tonumber(chunks or '0') do keys[i] = string.sub(stream, 1, -2) .. 'b:' .. name .. ':' .. i end
  return keys
end

-- Whether a blob's chunks have not expired: they do while a publisher waits for long.
local function is_there(stream, reference)
  for _, key in ipairs(chunks_of(stream, reference)) do
    if redis.call('EXISTS', key) == 0 then return false end
  end
  return true
end

-- Until every group has settled the frame, what lies beside it is remembered by its position; see collect.lua.
local function refer(stream, id, reference)
  redis.call('ZADD', string.sub(stream, 1, -2) .. 'p:' .. (string.match(reference, '^shm (%x+) ') or 'blobs'),
    string.match(id, '%-(%d+)$'), reference)
  for _, key in ipairs(chunks_of(stream, reference)) do redis.call('PERSIST', key) end
end

local function foreign(stream, id)
  return redis.error_reply('FOREIGN ' .. stream .. ' holds entry ' .. id .. ' that the pipeline did not write')
end

-- Why `add` would refuse a frame at this moment (as TIME says it), if it would. One call, for a key that is right.
local function refusal(stream, meta, n, t)
  local after = '(' .. t[1] .. string.sub('00000' .. t[2], -6, -4) .. '-18446744073709551615'
  local later = redis.pcall('XREVRANGE', stream, '+', after, 'COUNT', 1)
  if later.err then return redis.error_reply('WRONGTYPE ' .. stream .. ' is a ' .. redis.call('TYPE', stream).ok) end
  if later[1] and offset_of(later[1][1]) >= tonumber(redis.call('HGET', meta, 'published') or '0') + n then
    return foreign(stream, later[1][1])
  end
end

-- Append a frame under the id ms-OFFSET, where OFFSET counts the channel's events up to and including it. Acknowledged
-- positions thereby tell how many events lie before them, without a look-up.
local function add(stream, meta, n, body, t)
  local offset = redis.call('HINCRBY', meta, 'published', n)
  t = t or redis.call('TIME')
  local id = t[1] .. string.sub('00000' .. t[2], -6, -4) .. string.format('-%d', offset)
  local done = redis.pcall('XADD', stream, id, 'n', n, 'b', body)
  if type(done) == 'table' and done.err then
    -- The clock went back: stay on the newest entry's millisecond. Or somebody else wrote in this one: take the next.
    local info = redis.call('XINFO', 'STREAM', stream)
    local last
    for i = 1, #info, 2 do
      if info[i] == 'last-generated-id' then last = info[i + 1] end
    end
    local ms = tonumber(string.match(last, '^(%d+)'))
    if offset_of(last) >= offset then
      if ms > t[1] * 1000 + math.floor(t[2] / 1000) then
        redis.call('HINCRBY', meta, 'published', -n)
        return foreign(stream, last)
      end
      ms = ms + 1
    end
    id = string.format('%.0f-%d', ms, offset)
    redis.call('XADD', stream, id, 'n', n, 'b', body)
  end
  return id
end

-- The oldest entry of ours whose payload, should it have one, has not been released; and the id of that before it, nil if
-- there is none.
local function first_readable(stream, meta)
  local gone = tonumber(redis.call('HGET', meta, 'gone') or '0')
  local most = gone > 0 and 100 or 1
  local from, previous = '-', nil
  while true do
    local entries = redis.call('XRANGE', stream, from, '+', 'COUNT', most)
    for _, entry in ipairs(entries) do
      from = '(' .. entry[1]
      if events_in(entry[2]) > 0 then
        if offset_of(entry[1]) > gone then return entry, previous end
        previous = entry[1]
      end
    end
    if #entries < most then return nil, previous end
  end
end

-- Let `count` events wait apart, as one frame: retries, replayed dead letters. The id tells all that others must know:
-- r<number>x<events>@<offset of the frame they came in, which a rewind goes by>. Digits are filled up: what is due at one
-- time comes in the order of its name.
local function set_apart(h, due, bod, takes, delay, count, taken, origin, body)
  local rid = string.format('r%015.0fx%.0f@%.0f', redis.call('HINCRBY', h, 'rid', 1), count, origin)
  redis.call('ZADD', due, string.format('%.0f', now_ms() + delay), rid)
  redis.call('HSET', bod, rid, body)
  if taken > 0 then redis.call('HSET', takes, rid, taken) end
  if count > 1 then redis.call('HINCRBY', h, 'extra', count - 1) end
end

-- They are settled, or undone.
local function forget(h, due, bod, takes, rid)
  redis.call('ZREM', due, rid)
  redis.call('HDEL', bod, rid)
  redis.call('HDEL', takes, rid)
  local count = tonumber(string.match(rid, 'x(%d+)@'))
  if count > 1 then redis.call('HINCRBY', h, 'extra', 1 - count) end
  return count
end

-- Events that the group furthest behind has not settled; without a group, all that were not dropped.
local function outstanding(meta, groups)
  local published = tonumber(redis.call('HGET', meta, 'published') or '0')
  local names = redis.call('SMEMBERS', groups)
  if #names == 0 then return published end
  local most = 0
  for _, group in ipairs(names) do
    local h = redis.call('HMGET', groups .. ':' .. group .. ':h', 'before', 'handled', 'dead', 'dropped')
    local left = published
    for i = 1, 4 do left = left - tonumber(h[i] or '0') end
    if left > most then most = left end
  end
  return most
end

-- What XINFO GROUPS says of one group: its name, its last-delivered id, how many consumers it has.
local function group_of(info)
  local name, last, consumers
  for i = 1, #info, 2 do
    local field = info[i]
    if field == 'name' then name = info[i + 1]
    elseif field == 'last-delivered-id' then last = info[i + 1]
    elseif field == 'consumers' then consumers = info[i + 1] end
  end
  return name, last, consumers
end

-- Each group's last-delivered id, by its name. The stream has to be there.
local function positions(stream)
  local found = {}
  for _, info in ipairs(redis.call('XINFO', 'GROUPS', stream)) do
    local name, last = group_of(info)
    found[name] = last
  end
  return found
end

-- Settle an entry that the pipeline did not write. Where the group has been given nothing after it, its position is set to
-- one that tells again how many events lie before it: at the last offset of ours, in this entry's millisecond or the next.
local function pass_over(stream, group, id)
  redis.call('XACK', stream, group, id)
  if positions(stream)[group] ~= id then return end
  local ms, sequence = string.match(id, '^(%d+)%-(%d+)$')
  local before, after = nearest(stream, 'XREVRANGE', id, '-'), nearest(stream, 'XRANGE', id, '+')
  local offset
  if before then
    offset = offset_of(before[1])
  elseif after then
    offset = offset_of(after[1]) - events_in(after[2])
  else
    offset = tonumber(redis.call('HGET', string.sub(stream, 1, -2) .. 'm', 'published') or '0')
  end
  if tonumber(sequence) >= offset then
    if after and string.match(after[1], '^(%d+)') == ms then return end
    ms = string.format('%.0f', tonumber(ms) + 1)
  end
  redis.call('XGROUP', 'SETID', stream, group, string.format('%s-%.0f', ms, offset))
end

-- Make room for `n` more events: skip the oldest unread frames of groups that are too far behind. What workers already hold
-- is theirs.
local function drop_oldest(stream, meta, groups, n, capacity)
  if redis.call('EXISTS', stream) == 0 then return end
  local last = positions(stream)
  for _, group in ipairs(redis.call('SMEMBERS', groups)) do
    local h = groups .. ':' .. group .. ':h'
    local counts = redis.call('HMGET', h, 'before', 'handled', 'dead', 'dropped')
    local left = tonumber(redis.call('HGET', meta, 'published') or '0') + tonumber(n)
    for i = 1, 4 do left = left - tonumber(counts[i] or '0') end
    local at = last[group]
    while left > capacity and at do
      local entry = nearest(stream, 'XRANGE', '(' .. at, '+')
      if not entry then break end
      at = entry[1]
      local count = events_in(entry[2])
      redis.call('XGROUP', 'SETID', stream, group, at)
      redis.call('HINCRBY', h, 'dropped', count)
      left = left - count
    end
  end
end

-- A capacity in events: as it is, or of "<n>B", bytes, by the mean size of the latest events.
local function in_events(meta, capacity)
  local bytes = string.match(capacity, '^(%d+)B$')
  if not bytes then return tonumber(capacity) end
  return math.max(1, math.floor(bytes / tonumber(redis.call('HGET', meta, 'size') or '1')))
end

-- Remember that size, where it matters: with what lies beside the frame.
local function weigh(meta, capacity, n, body)
  if not string.find(capacity, 'B', 1, true) then return end
  local nbytes = #body
  if string.byte(body, 1) == 0 and string.byte(body, 4) == 82 then
    nbytes = nbytes + struct.unpack('<I8', string.sub(body, 13, 20))
  end
  local size, mean = nbytes / tonumber(n), redis.call('HGET', meta, 'size')
  redis.call('HSET', meta, 'size', string.format('%.3f', mean and mean + (size - mean) / 16 or size))
end
