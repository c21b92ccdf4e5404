"""Images around queries, near-duplicates removed, and two sets of them as one."""

from laion_assets.search.api import search

__all__ = ["search"]
