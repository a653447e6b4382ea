-- CLAIM entries whose lease ended, from a kept cursor.  KEYS: stream, prog   ARGV: group, consumer, lease ms, cursor, most
-- → {next cursor, {{id, n, body, progress, deliveries}…}}
local got = redis.call('XAUTOCLAIM', KEYS[1], ARGV[1], ARGV[2], ARGV[3], ARGV[4], 'COUNT', ARGV[5])
local entries = {}
for _, entry in ipairs(got[2]) do
  local fields = entry and entry[2]
  if fields and events_in(fields) == 0 then
    pass_over(KEYS[1], ARGV[1], entry[1])  -- who read it has said so
  elseif fields then
    local pending = redis.call('XPENDING', KEYS[1], ARGV[1], entry[1], entry[1], 1)
    entries[#entries + 1] = {entry[1], fields[2], fields[4], redis.call('HGET', KEYS[2], entry[1]) or '',
      pending[1] and pending[1][4] or 1}
  end
end
return {got[1], entries}
