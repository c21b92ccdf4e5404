"""Full copies of files.

Files are copied to `.incoming/` in chunks, and each chunk is recorded in a journal once it is on the
disk. A copy that was killed resumes with the chunks that are missing.
"""
