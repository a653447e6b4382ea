-- REPLAY or DROP a dead letter, once.
-- KEYS: h, due, bod, takes, settled   ARGV: letter id, ttl ms, count, origin, body ('' = drop)   → 1 when this call settled it
if redis.call('SISMEMBER', KEYS[5], ARGV[1]) == 1 then return 0 end
local function settle()
  redis.call('SADD', KEYS[5], ARGV[1])
  redis.call('PEXPIRE', KEYS[5], ARGV[2])
end
if ARGV[5] == '' then
  settle()
  return 1
end
local count = tonumber(ARGV[3])
-- A rewind may have undone this death: then the event was, or will be, handled again, and a replay repeats that.
local counts = redis.call('HMGET', KEYS[1], 'dead', 'handled')
local from
if tonumber(counts[1] or '0') >= count then
  from = 'dead'
elseif tonumber(counts[2] or '0') >= count then
  from = 'handled'
else
  return 0  -- it is of a group that was made anew, and has neither: the letter stays
end
settle()
redis.call('HINCRBY', KEYS[1], from, -count)
set_apart(KEYS[1], KEYS[2], KEYS[3], KEYS[4], 0, count, 0, tonumber(ARGV[4]), ARGV[5])
return 1
