-- TAKE due events: lease them by moving their time on, so no promotion step and no race between workers.
-- KEYS: due, bod, takes, h   ARGV: lease ms, most
-- → {{rid, body, times taken}…, ms until the next is due (-1: none), hand-backs so far}
local now = now_ms()
local taken = {}
for _, rid in ipairs(redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', string.format('%.0f', now), 'LIMIT', 0, ARGV[2])) do
  redis.call('ZADD', KEYS[1], string.format('%.0f', now + tonumber(ARGV[1])), rid)
  local times = redis.call('HINCRBY', KEYS[3], rid, 1)
  taken[#taken + 1] = {rid, redis.call('HGET', KEYS[2], rid), times}
end
local nearest = redis.call('ZRANGE', KEYS[1], 0, 0, 'WITHSCORES')
local wait = -1
if nearest[2] then wait = math.max(0, tonumber(nearest[2]) - now) end
return {taken, wait, tonumber(redis.call('HGET', KEYS[4], 'released') or '0')}
