-- COLLECT payloads that every group is past: their tensors lie beside the stream and can go before their entries do.
-- Blobs stay for two more seconds: who watches is no group, and nobody waits for him.
-- KEYS: stream, meta, groups, an owner's payloads, blobs   ARGV: key prefix of blobs, references the owner asks for…
-- → the references its owner may use again: those every group is past, and those asked for that are nowhere
local stream, meta = KEYS[1], KEYS[2]
local low = tonumber(redis.call('HGET', meta, 'published') or '0') + 1
if redis.call('EXISTS', stream) == 1 then
  local groups = redis.call('XINFO', 'GROUPS', stream)
  if #groups == 0 then
    -- A group may yet begin at the oldest entry.
    local first = nearest(stream, 'XRANGE', '-', '+')
    if first then low = offset_of(first[1]) end
  end
  for _, group in ipairs(groups) do
    local name, last = group_of(group)
    -- A group made at 0-0 has read nothing, wherever it begins.
    low = math.min(low, offset_of(last) + 1)
    local pending = redis.call('XPENDING', stream, name)
    if pending[1] > 0 then low = math.min(low, offset_of(pending[2])) end
  end
end
local freed, gone = {}, 0
local function past(key)
  local found = redis.call('ZRANGEBYSCORE', key, '-inf', '(' .. string.format('%.0f', low), 'WITHSCORES', 'LIMIT', 0, 512)
  if #found == 0 then return {} end
  local references = {}
  for i = 1, #found, 2 do
    references[#references + 1] = found[i]
    gone = math.max(gone, tonumber(found[i + 1]))
  end
  redis.call('ZREM', key, unpack(references))
  return references
end
freed = past(KEYS[4])
for _, reference in ipairs(past(KEYS[5])) do
  local name, chunks = string.match(reference, '^blob (%x+) (%d+)$')
  for i = 1, tonumber(chunks) do redis.call('EXPIRE', ARGV[1] .. name .. ':' .. i, 2) end
end
for i = 2, #ARGV do
  if not redis.call('ZSCORE', KEYS[4], ARGV[i]) then freed[#freed + 1] = ARGV[i] end
end
-- A later group, or a rewind, begins after what is gone.
if gone > tonumber(redis.call('HGET', meta, 'gone') or '0') then redis.call('HSET', meta, 'gone', string.format('%.0f', gone)) end
return freed
