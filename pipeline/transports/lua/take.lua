-- TAKE due events: lease them by moving their time on, so no promotion step and no race between workers.
-- A suspect (taken often enough before without being settled) is taken alone, by a worker with nothing else in hand: should
-- it kill its worker, no other event is blamed.
-- KEYS: due, bod, takes, h   ARGV: lease ms, most, suspicion (takes that make a suspect), 1 when nothing is in hand
-- → {{rid, body, times taken}…, hand-backs so far, 1 when a suspect waits for an empty hand, 1 when the group is paused}
local now = now_ms()
redis.call('HDEL', KEYS[4], '')  -- a server out of memory lets pass what does not begin with adding something
redis.call('HSET', KEYS[4], 'seen', string.format('%.0f', now))
local h = redis.call('HMGET', KEYS[4], 'released', 'paused')
local released = tonumber(h[1] or '0')
if h[2] then return {{}, released, 0, 1} end
local suspicion, empty = tonumber(ARGV[3]), ARGV[4] == '1'
local taken, waiting = {}, 0
for _, rid in ipairs(redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', string.format('%.0f', now), 'LIMIT', 0, ARGV[2])) do
  local suspect = tonumber(redis.call('HGET', KEYS[3], rid) or '0') >= suspicion
  if suspect and not (empty and #taken == 0) then
    waiting = 1
  else
    redis.call('ZADD', KEYS[1], string.format('%.0f', now + tonumber(ARGV[1])), rid)
    local times = redis.call('HINCRBY', KEYS[3], rid, 1)
    taken[#taken + 1] = {rid, redis.call('HGET', KEYS[2], rid), times}
    if suspect then
      waiting = 1
      break
    end
  end
end
return {taken, released, waiting, 0}
