-- REFUSE an entry that the pipeline did not write.  KEYS: stream   ARGV: group, id
pass_over(KEYS[1], ARGV[1], ARGV[2])
return 1
