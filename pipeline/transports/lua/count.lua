-- COUNT what was published live, where memory is full.  KEYS: meta   ARGV: events
redis.call('HDEL', KEYS[1], '')  -- first: so a server out of memory lets it pass
return redis.call('HINCRBY', KEYS[1], 'published', ARGV[1])
