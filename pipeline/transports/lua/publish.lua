-- PUBLISH a frame once.  KEYS: stream, meta, source, groups   ARGV: first, n, body, ttl ms, force, capacity, drop
-- → {status, detail}: 1 written (id) · 0 seen before (last) · -1 gap (last sequence seen) · -2 full (outstanding)
-- Each call from a script costs more than the command itself, so the usual way has four of them.
local first, n, capacity = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[6])
local stream, meta, source = KEYS[1], KEYS[2], KEYS[3]
local before = redis.call('SET', source, first + n - 1, 'PX', ARGV[4], 'GET')
local last = tonumber(before or '0')
local function put_back()
  if before then redis.call('SET', source, before, 'PX', ARGV[4]) else redis.call('DEL', source) end
end
if last >= first + n - 1 then
  put_back()
  redis.call('HINCRBY', meta, 'dup', n)
  return {0, last}
end
if last + 1 ~= first and ARGV[5] ~= '1' then
  put_back()
  return {-1, last}
end

local function position(group)
  for _, info in ipairs(redis.call('XINFO', 'GROUPS', stream)) do
    local name, id
    for i = 1, #info, 2 do
      if info[i] == 'name' then name = info[i + 1] end
      if info[i] == 'last-delivered-id' then id = info[i + 1] end
    end
    if name == group then return id end
  end
end

-- Skip a group's oldest unread frames until there is room. What workers already hold is theirs.
local function drop_oldest(group)
  local h = KEYS[4] .. ':' .. group .. ':h'
  while true do
    local counts = redis.call('HMGET', h, 'before', 'handled', 'dead', 'dropped')
    local left = tonumber(redis.call('HGET', meta, 'published') or '0')
    for i = 1, 4 do left = left - tonumber(counts[i] or '0') end
    if left + n <= capacity then return end
    local id = position(group)
    local entry = id and redis.call('XRANGE', stream, '(' .. id, '+', 'COUNT', 1)[1]
    if not entry then return end
    redis.call('XGROUP', 'SETID', stream, group, entry[1])
    redis.call('HINCRBY', h, 'dropped', entry[2][2])
  end
end

if capacity > 0 then
  if ARGV[7] == '1' then
    for _, group in ipairs(redis.call('SMEMBERS', KEYS[4])) do drop_oldest(group) end
  else
    local held = outstanding(meta, KEYS[4])
    if held > 0 and held + n > capacity then
      put_back()
      return {-2, held}
    end
  end
end
local id = add(stream, meta, n, ARGV[3])
if type(id) == 'table' then
  put_back()
  return id
end
return {1, id}
