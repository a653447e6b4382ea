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
local before, at = published, '$'
if ARGV[2] == 'oldest' and exists then
  local entry, previous = first_readable(stream, meta)
  if entry then
    before = offset_of(entry[1]) - tonumber(entry[2][2])
    at = previous or string.format('0-%.0f', before)
  end
end
redis.call('XGROUP', 'CREATE', stream, ARGV[1], at, 'MKSTREAM')
redis.call('DEL', h)
redis.call('HSET', h, 'before', before, 'seen', string.format('%.0f', now_ms()))
redis.call('SADD', KEYS[4], ARGV[1])
return 1
