"""Files of which only the parts that were asked for are on the disk.

Each is a sparse file of its full size, with a page map beside it that says which pages of 4 KiB hold data
and when each was last used. What a request is about to read is planned in whole pages, what is missing
is fetched, made durable, and only then marked; nothing that is not marked is ever read. Where the budget
would be exceeded, the pages that have been idle for longest are given back to the disk, but for those
that a request at work holds.
"""
