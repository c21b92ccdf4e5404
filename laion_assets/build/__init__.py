"""Build an index from published embeddings: plan, train, encode shard by shard, merge, publish.

Every step stores its result in a workspace, a folder on a disk or in a bucket, and is skipped if the
result exists. So a killed build resumes, several machines can encode shards, and new input files cost
only their own shards and a merge.
"""

from laion_assets.build.builder import Build, Built, Request, Wanted, without_vector
from laion_assets.build.cost import Cost, cost_of, measured
from laion_assets.build.index_key import check_key, index_key_for
from laion_assets.build.own_images import embed_folder
from laion_assets.build.plan import SHARD_ROWS, Plan, Shard
from laion_assets.build.publish import BUILT

__all__ = [
    "BUILT",
    "SHARD_ROWS",
    "Build",
    "Built",
    "Cost",
    "Plan",
    "Request",
    "Shard",
    "Wanted",
    "check_key",
    "cost_of",
    "embed_folder",
    "index_key_for",
    "measured",
    "without_vector",
]
