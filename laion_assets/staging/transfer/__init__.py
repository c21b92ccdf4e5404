"""Move bytes from a source to the local disk: listings, ranged reads, retries, locks.

This is the bottom layer of staging. It handles files and ranges, but neither manifests nor pages.
"""
