-- ANNOUNCE that a host reads a channel.  KEYS: hosts   ARGV: now, until, host
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', ARGV[1])  -- first: so a server out of memory lets it pass
redis.call('ZADD', KEYS[1], ARGV[2], ARGV[3])
