-- PUBLISH a frame once.
-- KEYS: stream, meta, source, groups
-- ARGV: the source's last sequence before it and with it, n, body, then where they matter: force, capacity, drop
-- → 1 written · {0, last} seen before · {-1, last} gap after the last sequence seen · {-2, outstanding} full
--   {-3, 0} its blob has expired
local stream, meta, source, n = KEYS[1], KEYS[2], KEYS[3], ARGV[3]
local TTL = '86400000'
local before = redis.call('SET', source, ARGV[2], 'PX', TTL, 'GET')
local function put_back()
  if before then redis.call('SET', source, before, 'PX', TTL) else redis.call('DEL', source) end
end
if (before or '0') ~= ARGV[1] then
  local last = tonumber(before or '0')
  if last >= tonumber(ARGV[2]) then
    put_back()
    redis.call('HINCRBY', meta, 'dup', n)
    return {0, last}
  end
  if ARGV[5] ~= '1' then
    put_back()
    return {-1, last}
  end
end
local reference
if string.byte(ARGV[4], 1) == 0 then
  -- here: beside
  reference = beside(ARGV[4])
end
if ARGV[6] and ARGV[7] ~= '1' then
  -- here: outstanding, in_events
  local held = outstanding(meta, KEYS[4])
  if held > 0 and held + tonumber(n) > in_events(meta, ARGV[6]) then
    put_back()
    return {-2, held}
  end
end
if reference then
  -- here: chunks_of, is_there
  if not is_there(stream, reference) then
    put_back()
    return {-3, 0}
  end
end
if ARGV[7] == '1' then
  -- here: events_in, nearest, group_of, positions, drop_oldest, in_events
  drop_oldest(stream, meta, KEYS[4], n, in_events(meta, ARGV[6]))
end
local id = add(stream, meta, n, ARGV[4])
if type(id) == 'table' then
  put_back()
  return id
end
if ARGV[6] then
  -- here: weigh
  weigh(meta, ARGV[6], n, ARGV[4])
end
if reference then
  -- here: chunks_of, refer
  refer(stream, id, reference)
end
return 1
