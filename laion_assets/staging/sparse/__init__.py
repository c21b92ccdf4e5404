"""Sparse files: only the parts of the index that requests read are on the disk.

Each is a file with holes, of its full size, and a page map beside it says which pages of 4 KiB hold data,
their checksums, and when each was last used. Before a request reads, the pages it needs are computed and
the missing ones fetched, made durable, and only then marked; a page that is not marked, or differs from
its checksum, is never read. Above the budget, the least recently used pages are evicted, except those
that a running request holds.
"""
