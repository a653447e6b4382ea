-- PAUSE a group, or let it go on.  KEYS: groups, h   ARGV: group, 1|0   → 1 when that changed anything
-- Its readers look at it with every look for due events (take.lua); it is a field of the group's counters, so that it lives
-- as long as the group.
if redis.call('SISMEMBER', KEYS[1], ARGV[1]) == 0 then return redis.error_reply('NOGROUP ' .. ARGV[1]) end
redis.call('HDEL', KEYS[2], '')  -- so that a server out of memory lets it pass
if ARGV[2] == '1' then return redis.call('HSETNX', KEYS[2], 'paused', 1) end
return redis.call('HDEL', KEYS[2], 'paused')
