-- TRIM what every group is past and what is older than `keep`; never the newest entry. A group that nobody has served for
-- `expire` would hold everything for ever: it ends here, and what it had not settled with it.
-- KEYS: stream, groups, meta   ARGV: keep ms, expire ms   → {entries removed, {group, unsettled}…}
local stream = KEYS[1]
if redis.call('EXISTS', stream) == 0 then return {0} end
local expired = {}
local published = tonumber(redis.call('HGET', KEYS[3], 'published') or '0')
local function parts(id)
  local ms, seq = string.match(id, '^(%d+)%-(%d+)$')
  return tonumber(ms), tonumber(seq)
end
local info = redis.call('XINFO', 'STREAM', stream)
local low
for i = 1, #info, 2 do
  if info[i] == 'last-generated-id' then low = info[i + 1] end
end
local ms, seq = parts(low)
local function lower(m, s)
  if m < ms or (m == ms and s < seq) then ms, seq = m, s end
end
lower(now_ms() - tonumber(ARGV[1]), 0)
for _, group in ipairs(redis.call('XINFO', 'GROUPS', stream)) do
  local name, last = group_of(group)
  local h = KEYS[2] .. ':' .. name .. ':h'
  local seen = tonumber(redis.call('HGET', h, 'seen') or '0')
  if seen > 0 and now_ms() - seen > tonumber(ARGV[2]) then
    local counts = redis.call('HMGET', h, 'before', 'handled', 'dead', 'dropped')
    local left = published
    for i = 1, 4 do left = left - tonumber(counts[i] or '0') end
    expired[#expired + 1] = {name, left}
    redis.call('XGROUP', 'DESTROY', stream, name)
    redis.call('SREM', KEYS[2], name)
    for _, part in ipairs({'h', 'prog', 'due', 'bod', 'takes', 'settled'}) do
      redis.call('DEL', KEYS[2] .. ':' .. name .. ':' .. part)
    end
    last = low
  end
  local pending = redis.pcall('XPENDING', stream, name)
  if pending.err then pending = {0} end
  if pending[1] > 0 then
    lower(parts(pending[2]))
  else
    local m, s = parts(last)
    lower(m, s + 1)
  end
end
return {redis.call('XTRIM', stream, 'MINID', string.format('%.0f-%.0f', ms, seq)), unpack(expired)}
