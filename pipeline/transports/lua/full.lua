-- Whether a partition is FULL, so that who would make its events more must not.  KEYS: meta, groups   ARGV: capacity   → 1 or 0
return outstanding(KEYS[1], KEYS[2]) >= in_events(KEYS[1], ARGV[1]) and 1 or 0
