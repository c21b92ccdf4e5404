"""Indices built from published embeddings."""
