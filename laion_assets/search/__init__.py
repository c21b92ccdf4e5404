"""Images around queries, near-duplicates removed, two sets as one."""
