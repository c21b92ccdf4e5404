"""Search an index for images around queries, drop near-duplicates, and combine two result sets."""

from laion_assets.search.api import search

__all__ = ["search"]
