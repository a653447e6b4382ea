-- PUBLISH a frame once.
-- KEYS: stream, meta, source, groups
-- ARGV: the source's last sequence before it and with it, n, body, then where they matter: force, capacity, drop
-- → 1 written · {0, last} seen before · {-1, last} gap after the last sequence seen · {-2, outstanding} full
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
if ARGV[6] then
  local capacity = tonumber(ARGV[6])

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
      if left + tonumber(n) <= capacity then return end
      local id = position(group)
      local entry = id and redis.call('XRANGE', stream, '(' .. id, '+', 'COUNT', 1)[1]
      if not entry then return end
      redis.call('XGROUP', 'SETID', stream, group, entry[1])
      redis.call('HINCRBY', h, 'dropped', entry[2][2])
    end
  end

  if ARGV[7] == '1' then
    for _, group in ipairs(redis.call('SMEMBERS', KEYS[4])) do drop_oldest(group) end
  else
    local held = outstanding(meta, KEYS[4])
    if held > 0 and held + tonumber(n) > capacity then
      put_back()
      return {-2, held}
    end
  end
end
local id = add(stream, meta, n, ARGV[4])
if type(id) == 'table' then
  put_back()
  return id
end
return 1
