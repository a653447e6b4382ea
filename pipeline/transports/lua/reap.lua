-- REAP a consumer, only with nothing pending: deleting it otherwise would lose work.
-- KEYS: stream   ARGV: group, name ('' = all idle ones), idle ms
if redis.call('EXISTS', KEYS[1]) == 0 then return 0 end
local reaped = 0
local found = redis.pcall('XINFO', 'CONSUMERS', KEYS[1], ARGV[1])
if found.err then return 0 end
for _, consumer in ipairs(found) do
  local name, pending, idle
  for i = 1, #consumer, 2 do
    if consumer[i] == 'name' then name = consumer[i + 1] end
    if consumer[i] == 'pending' then pending = consumer[i + 1] end
    if consumer[i] == 'idle' then idle = consumer[i + 1] end
  end
  if pending == 0 and (name == ARGV[2] or (ARGV[2] == '' and idle >= tonumber(ARGV[3]))) then
    redis.call('XGROUP', 'DELCONSUMER', KEYS[1], ARGV[1], name)
    reaped = reaped + 1
  end
end
return reaped
