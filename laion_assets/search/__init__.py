"""Images around queries, near-duplicates removed, and two sets of them as one."""

from laion_assets.search.best import best_rows
from laion_assets.search.combined import Combined, CombinedFunnel, combine
from laion_assets.search.filters import BlockList, Condition, Filters, conditions_in, read_block_list
from laion_assets.search.notebook import search
from laion_assets.search.retrieval import Found, Funnel, Request, columns_found, retrieve, retrieve_table
from laion_assets.search.safety import marked_unsafe

__all__ = [
    "BlockList",
    "Combined",
    "CombinedFunnel",
    "Condition",
    "Filters",
    "Found",
    "Funnel",
    "Request",
    "best_rows",
    "columns_found",
    "combine",
    "conditions_in",
    "marked_unsafe",
    "read_block_list",
    "retrieve",
    "retrieve_table",
    "search",
]
