-- REPLAY or DROP a dead letter, once.  KEYS: h, due, bod, settled   ARGV: letter id, body ('' = drop), count, ttl ms
-- → 1 when this call settled it
if redis.call('SADD', KEYS[4], ARGV[1]) == 0 then return 0 end
redis.call('PEXPIRE', KEYS[4], ARGV[4])
if ARGV[2] ~= '' then
  local count = tonumber(ARGV[3])
  redis.call('HINCRBY', KEYS[1], 'dead', -count)
  local rid = string.format(count > 1 and 'r%.0fx%.0f' or 'r%.0f', redis.call('HINCRBY', KEYS[1], 'rid', 1), count)
  redis.call('ZADD', KEYS[2], string.format('%.0f', now_ms()), rid)
  redis.call('HSET', KEYS[3], rid, ARGV[2])
  if count > 1 then redis.call('HINCRBY', KEYS[1], 'extra', count - 1) end
end
return 1
