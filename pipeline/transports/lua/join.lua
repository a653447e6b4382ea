-- JOIN a group, making it where there is none.  KEYS: stream, meta, h, groups   ARGV: group, oldest|latest
-- → 1 when it was made. `before` is what preceded the group: events already trimmed, or whose
-- payload has been released (see collect.lua), or all of them.
local stream, meta, h = KEYS[1], KEYS[2], KEYS[3]
redis.call('HDEL', h, '')  -- so that a server out of memory lets it pass
local exists = redis.call('EXISTS', stream) == 1
if exists and positions(stream)[ARGV[1]] then
  redis.call('SADD', KEYS[4], ARGV[1])
  return 0
end
local published = tonumber(redis.call('HGET', meta, 'published') or '0')
local before, at = published, exists and '$' or string.format('0-%.0f', published)
if ARGV[2] == 'oldest' and exists then
  local entry, previous = first_readable(stream, meta)
  if entry then
    before = offset_of(entry[1]) - events_in(entry[2])
    at = previous or string.format('0-%.0f', before)
  end
end
redis.call('XGROUP', 'CREATE', stream, ARGV[1], at, 'MKSTREAM')
-- Somebody may have deleted a group of this name, or its stream: what waits apart of it is still to be handled, unless it is
-- in the stream and so read again.
local keys, kept, extra = string.sub(h, 1, -2), 0, 0
for _, rid in ipairs(redis.call('ZRANGE', keys .. 'due', 0, -1)) do
  local count, origin = string.match(rid, 'x(%d+)@(%d+)$')
  if tonumber(origin) <= before then
    kept, extra = kept + count, extra + count - 1
  else
    forget(h, keys .. 'due', keys .. 'bod', keys .. 'takes', rid)
  end
end
local rid = redis.call('HGET', h, 'rid') or '0'
redis.call('DEL', h, keys .. 'prog')
redis.call('HSET', h, 'before', string.format('%.0f', math.max(0, before - kept)), 'extra', extra, 'rid', rid,
  'seen', string.format('%.0f', now_ms()))
redis.call('SADD', KEYS[4], ARGV[1])
return 1
