-- RELEASE entries unhandled: their idle time is set so that anyone may claim them now, and the count of hand-backs tells
-- other workers to look.  KEYS: stream, due, h, takes   ARGV: group, consumer, #ids, ids…, rids…
local n = tonumber(ARGV[3])
local any = false
for i = 4, 3 + n do
  local pending = redis.call('XPENDING', KEYS[1], ARGV[1], ARGV[i], ARGV[i], 1, ARGV[2])
  if #pending > 0 then
    -- A delivery that was handed back does not count: it killed nobody.
    local deliveries = string.format('%.0f', math.max(0, pending[1][4] - 1))
    redis.call('XCLAIM', KEYS[1], ARGV[1], ARGV[2], '0', ARGV[i], 'IDLE', '86400000', 'RETRYCOUNT', deliveries, 'JUSTID')
    any = true
  end
end
redis.call('ZREM', KEYS[2], '')  -- so that a server out of memory lets it pass
local now = string.format('%.0f', now_ms())
for i = 4 + n, #ARGV do
  redis.call('ZADD', KEYS[2], 'XX', now, ARGV[i])
  if redis.call('HEXISTS', KEYS[4], ARGV[i]) == 1 then redis.call('HINCRBY', KEYS[4], ARGV[i], -1) end
end
if any then redis.call('HINCRBY', KEYS[3], 'released', 1) end
return 1
