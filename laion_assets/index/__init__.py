"""A LAION-style index on disk: the faiss file, its inverted lists, its metadata."""
