-- TRIM what every group is past and what is older than `keep`; never the newest entry.  KEYS: stream   ARGV: keep ms
local stream = KEYS[1]
if redis.call('EXISTS', stream) == 0 then return 0 end
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
  local name, last
  for i = 1, #group, 2 do
    if group[i] == 'name' then name = group[i + 1] end
    if group[i] == 'last-delivered-id' then last = group[i + 1] end
  end
  local pending = redis.call('XPENDING', stream, name)
  if pending[1] > 0 then
    lower(parts(pending[2]))
  else
    local m, s = parts(last)
    lower(m, s + 1)
  end
end
return redis.call('XTRIM', stream, 'MINID', string.format('%.0f-%.0f', ms, seq))
