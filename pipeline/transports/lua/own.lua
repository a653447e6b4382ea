-- OWN a partition, or give it up: only its owner's commits count, so a successor may take what is pending at once.
-- KEYS: owner   ARGV: consumer, lease ms ('0' gives it up)   → 0 somebody else's · 1 ours, as before (or, giving up, until now)
-- 2 ours now, and nobody's before: whose lease ran out may have been followed by others meanwhile
local owner = redis.call('GET', KEYS[1])
if ARGV[2] == '0' then
  if owner ~= ARGV[1] then return 0 end
  redis.call('DEL', KEYS[1])
  return 1
end
if owner and owner ~= ARGV[1] then return 0 end
redis.call('PEXPIRE', KEYS[1], ARGV[2])  -- so that a server out of memory lets it pass
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
return owner and 1 or 2
