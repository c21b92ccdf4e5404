"""Build an index from published embeddings: train on a sample, encode shard by shard, merge by list."""
