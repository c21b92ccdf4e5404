"""Moving bytes from a source to the local disk: listings, ranged reads, retries, locks.

The bottom layer of staging. It knows files and ranges, but neither manifests nor pages.
"""
