-- REGISTER a channel's description.  KEYS: registry   ARGV: name, record   → what was known of it before, or nil
local before = redis.call('HGET', KEYS[1], ARGV[1])
redis.call('HDEL', KEYS[1], '')  -- a server out of memory lets pass what does not begin with adding something
redis.call('HSET', KEYS[1], ARGV[1], ARGV[2])
return before
