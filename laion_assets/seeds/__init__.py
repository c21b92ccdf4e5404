"""Seed sets on disk or in a bucket, and their vectors.

A seed set is a folder of seed files. Listing it returns a `SeedSet` with a fingerprint; reading it
returns `Seeds`, which are unit vectors. `read_settings` reads the set's own settings.
"""

from laion_assets.seeds.embeddings import (
    PROMPT,
    KnownImages,
    Seeds,
    centroid,
    count_seeds,
    embeddings_of,
    read_seeds,
)
from laion_assets.seeds.folder import Listing, SeedSet, check_name, find_seed_set, list_folder
from laion_assets.seeds.model import Model
from laion_assets.seeds.model_staging import stage_model
from laion_assets.seeds.settings_file import read_settings
from laion_assets.seeds.unfinished import UnfinishedImages

__all__ = [
    "PROMPT",
    "KnownImages",
    "Listing",
    "Model",
    "SeedSet",
    "Seeds",
    "UnfinishedImages",
    "centroid",
    "check_name",
    "count_seeds",
    "embeddings_of",
    "find_seed_set",
    "list_folder",
    "read_seeds",
    "read_settings",
    "stage_model",
]
