-- STATS of one channel's partition, at one moment. Pending is walked, not computed by subtraction, so that the ledger can fail.
-- KEYS: stream, meta, groups
-- → {published, dup, entries, {{group, before, handled, dead, retried, suppressed, dropped, pending, lag, consumers,
--    oldest ms, paused}…}}
local stream = KEYS[1]
local function number(v) return tonumber(v or '0') or 0 end
local published = number(redis.call('HGET', KEYS[2], 'published'))
local groups, last, consumers = {}, {}, {}
local exists = redis.call('TYPE', stream).ok == 'stream'
if exists then
  for _, info in ipairs(redis.call('XINFO', 'GROUPS', stream)) do
    local name, position, many = group_of(info)
    last[name], consumers[name] = position, many
  end
end
for _, group in ipairs(redis.call('SMEMBERS', KEYS[3])) do
  local base = KEYS[3] .. ':' .. group
  local h = redis.call('HMGET', base .. ':h', 'before', 'handled', 'dead', 'retried', 'suppressed', 'dropped', 'extra',
    'paused')
  local pending = redis.call('ZCARD', base .. ':due') + number(h[7])
  local lag, oldest = 0, 0
  if last[group] then
    lag = published - math.max(number(h[1]), offset_of(last[group]))
    local from = '-'
    while true do
      local held = redis.call('XPENDING', stream, group, from, '+', 1000)
      for _, entry in ipairs(held) do
        if oldest == 0 then oldest = now_ms() - tonumber(string.match(entry[1], '^(%d+)')) end
        local frame = redis.call('XRANGE', stream, entry[1], entry[1])[1]
        if frame then
          pending = pending + events_in(frame[2])
          local done = redis.call('HGET', base .. ':prog', entry[1])
          if done then
            local _, marked = string.gsub(done, '1', '')
            pending = pending - marked
          end
        end
        from = '(' .. entry[1]
      end
      if #held < 1000 then break end
    end
  end
  groups[#groups + 1] = {group, number(h[1]), number(h[2]), number(h[3]), number(h[4]), number(h[5]), number(h[6]),
    pending, lag, consumers[group] or 0, oldest, number(h[8])}
end
return {published, number(redis.call('HGET', KEYS[2], 'dup')), exists and redis.call('XLEN', stream) or 0, groups}
