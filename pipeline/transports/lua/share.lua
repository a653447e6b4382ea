-- SHARE the partitions of an ordered group among its workers.
-- KEYS: members, owner of partition 0, 1, …   ARGV: consumer, lease ms ('0' leaves)
-- → {workers, owner of each partition ('' none)}. Being here is renewed; who was not is forgotten.
local now = now_ms()
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', string.format('%.0f', now))
if ARGV[2] == '0' then
  redis.call('ZREM', KEYS[1], ARGV[1])
else
  redis.call('ZADD', KEYS[1], string.format('%.0f', now + tonumber(ARGV[2])), ARGV[1])
  redis.call('PEXPIRE', KEYS[1], 10 * tonumber(ARGV[2]))
end
local owners = {}
for i = 2, #KEYS do owners[i - 1] = redis.call('GET', KEYS[i]) or '' end
return {redis.call('ZCARD', KEYS[1]), owners}
