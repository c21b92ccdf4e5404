"""The asset graph: an asset reads, calls one library function, writes its table, and reports it."""

from collections.abc import Sequence

import dagster as dg

from laion_assets.defs.assets.seed_embeddings import centroid_vector_asset, seed_embeddings_asset
from laion_assets.defs.assets.staged_laion_index import staged_laion_index_asset
from laion_assets.defs.assets.url_sets import centroid_urls_asset, combined_urls_asset, knn_urls_asset
from laion_assets.defs.kubernetes.placement import Placement


def build_assets(placement: Placement) -> Sequence[dg.AssetsDefinition]:
    """Define all assets, for where they run."""
    return [
        staged_laion_index_asset(placement),
        seed_embeddings_asset(placement),
        centroid_vector_asset(placement),
        knn_urls_asset(placement),
        centroid_urls_asset(placement),
        combined_urls_asset(placement),
    ]
