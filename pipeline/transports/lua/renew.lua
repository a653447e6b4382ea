-- RENEW the leases a consumer still has, and say that its group is served; a bare XCLAIM would let a worker that was paused steal its work back.
-- KEYS: stream, due, owner ('' none)   ARGV: group, consumer, lease ms, #ids, ids…, rids…    → ids that are no longer ours
local n = tonumber(ARGV[4])
if KEYS[3] ~= '' and redis.call('GET', KEYS[3]) == ARGV[2] then redis.call('PEXPIRE', KEYS[3], ARGV[3]) end
local lost, mine = {}, {}
for i = 5, 4 + n do
  local pending = redis.call('XPENDING', KEYS[1], ARGV[1], ARGV[i], ARGV[i], 1, ARGV[2])
  if #pending == 0 then lost[#lost + 1] = ARGV[i] else mine[#mine + 1] = ARGV[i] end
end
for i = 1, #mine, 500 do
  local call = {'XCLAIM', KEYS[1], ARGV[1], ARGV[2], '0'}
  for j = i, math.min(i + 499, #mine) do call[#call + 1] = mine[j] end
  call[#call + 1] = 'JUSTID'
  redis.call(unpack(call))
end
redis.call('ZREM', KEYS[2], '')  -- so that a server out of memory lets it pass
local now, h = now_ms(), string.sub(KEYS[2], 1, -4) .. 'h'
-- Whose hands are full, or whose group is paused, does not look (take.lua), and serves it all the same.
if redis.call('HEXISTS', h, 'seen') == 1 then redis.call('HSET', h, 'seen', string.format('%.0f', now)) end
local until_ms = string.format('%.0f', now + tonumber(ARGV[3]))
for i = 5 + n, #ARGV do
  if redis.call('ZSCORE', KEYS[2], ARGV[i]) then
    redis.call('ZADD', KEYS[2], 'XX', until_ms, ARGV[i])
  else
    lost[#lost + 1] = ARGV[i]
  end
end
return lost
