"""Seed sets on disk or in a bucket, and the vectors in them."""
