-- REGISTER a channel's description, unless it is in use as another: live or durable, or of so many partitions.
-- KEYS: registry   ARGV: name, record   → what was known of it before, or nil
local before = redis.call('HGET', KEYS[1], ARGV[1])
if before then
  local old, new = cjson.decode(before), cjson.decode(ARGV[2])
  if old.durable ~= new.durable or old.limits.partitions ~= new.limits.partitions then
    return before
  end
end
redis.call('HDEL', KEYS[1], '')  -- a server out of memory lets pass what does not begin with adding something
redis.call('HSET', KEYS[1], ARGV[1], ARGV[2])
return before
