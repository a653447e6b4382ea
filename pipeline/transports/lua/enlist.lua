-- ENLIST a live group, which has nothing but its name.  KEYS: groups   ARGV: group
redis.call('SREM', KEYS[1], '')  -- first: so a server out of memory lets it pass
return redis.call('SADD', KEYS[1], ARGV[1])
