-- OUTSTANDING events of a partition, for who must not make them more.  KEYS: meta, groups
return outstanding(KEYS[1], KEYS[2])
