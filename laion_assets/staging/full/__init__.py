"""Full copies of files.

Files are copied to `.incoming/` in chunks, and each chunk is recorded in a journal once it is on the
disk. A killed copy resumes with the missing chunks.
"""
