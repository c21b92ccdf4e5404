"""The library: staging, search, near-duplicates and metadata over a LAION index.

Plain functions on numpy, faiss, pyarrow and fsspec, usable from a notebook.
What must not live here: anything that imports dagster.
"""
