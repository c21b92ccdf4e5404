"""The asset graph: an asset reads inputs, calls one library function, and writes and reports a table."""

from collections.abc import Sequence

import dagster as dg

from laion_assets.defs.announcements import Unannounced, withdraw_unreached
from laion_assets.defs.assets.built_index import (
    index_shards_asset,
    laion_index_asset,
    trained_index_asset,
)
from laion_assets.defs.assets.combined_urls import combined_urls_asset
from laion_assets.defs.assets.knn_urls import knn_urls_asset
from laion_assets.defs.assets.seed_embeddings import centroid_vector_asset, seed_embeddings_asset
from laion_assets.defs.assets.staged_laion_index import staged_laion_index_asset
from laion_assets.defs.assets.url_sets import centroid_urls_asset
from laion_assets.defs.kubernetes.placement import Placement
from laion_assets.defs.sources import laion_index_source


def build_assets(
    placement: Placement, index: dg.AssetKey = laion_index_source.key
) -> Sequence[dg.AssetsDefinition]:
    """Define the assets of a seed set, given where they run and the index that they search."""
    return [
        Unannounced.of(asset.with_hooks({withdraw_unreached}))
        for asset in (
            staged_laion_index_asset(placement, index),
            seed_embeddings_asset(placement),
            centroid_vector_asset(placement),
            knn_urls_asset(placement),
            centroid_urls_asset(placement),
            combined_urls_asset(placement),
        )
    ]


def index_assets(placement: Placement) -> Sequence[dg.AssetsDefinition]:
    """Define the assets that build an index, in order."""
    return [
        trained_index_asset(placement),
        index_shards_asset(placement),
        Unannounced.of(laion_index_asset(placement)),
    ]
