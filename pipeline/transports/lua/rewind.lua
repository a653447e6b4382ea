-- REWIND a group to a position: what it handled since then is unread again.
-- KEYS: stream, meta, h, prog, due, bod, takes   ARGV: group, position id (entries after it are read again)   → events now unread
local stream, h, prog = KEYS[1], KEYS[3], KEYS[4]
local function after(one, other)
  local ms, offset = string.match(one, '^(%d+)%-(%d+)$')
  local other_ms, other_offset = string.match(other, '^(%d+)%-(%d+)$')
  ms, other_ms = tonumber(ms), tonumber(other_ms)
  return ms > other_ms or (ms == other_ms and tonumber(offset) > tonumber(other_offset))
end
local published = tonumber(redis.call('HGET', KEYS[2], 'published') or '0')
local last = positions(stream)[ARGV[1]]
if not last then return redis.error_reply('NOGROUP ' .. ARGV[1]) end
-- The first entry to be read again tells how many events lie before it. What lost its payload cannot be read.
local to = ARGV[2]
local _, previous = first_readable(stream, KEYS[2])
if previous and after(previous, to) then to = previous end
local entry = nearest(stream, 'XRANGE', '(' .. to, '+')
local target = published
if entry then target = offset_of(entry[1]) - events_in(entry[2]) end
local before = tonumber(redis.call('HGET', h, 'before') or '0')
local current = math.max(before, offset_of(last))
-- Never forwards: what is unread stays so.
if target >= current then return published - current end
-- Held frames in the range are read again whole: forget who holds them and how far they came.
local undone = 0
while true do
  local held = redis.call('XPENDING', stream, ARGV[1], '(' .. to, '+', 500)
  for _, p in ipairs(held) do
    local frame = redis.call('XRANGE', stream, p[1], p[1])[1]
    if frame then
      undone = undone + events_in(frame[2])
      local done = redis.call('HGET', prog, p[1])
      if done then
        local _, marked = string.gsub(done, '1', '')
        undone = undone - marked
      end
    end
    redis.call('XACK', stream, ARGV[1], p[1])
    redis.call('HDEL', prog, p[1])
  end
  if #held < 500 then break end
end
-- So do those of its events that wait apart.
for _, rid in ipairs(redis.call('ZRANGE', KEYS[5], 0, -1)) do
  if tonumber(string.match(rid, '@(%d+)$')) > target then
    undone = undone + forget(h, KEYS[5], KEYS[6], KEYS[7], rid)
  end
end
local last_kept = nearest(stream, 'XREVRANGE', to, '-')
redis.call('XGROUP', 'SETID', stream, ARGV[1], last_kept and last_kept[1] or string.format('0-%.0f', target))
local back = current - math.max(before, target) - undone
if target < before then redis.call('HSET', h, 'before', target) end
-- Take from `handled` first, then from `dead`, then from `dropped`: an event that died or was dropped is tried again too.
for _, from in ipairs({'handled', 'dead', 'dropped'}) do
  local taken = math.min(back, tonumber(redis.call('HGET', h, from) or '0'))
  if taken > 0 then redis.call('HINCRBY', h, from, -taken) end
  back = back - taken
end
return published - target
