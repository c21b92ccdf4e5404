"""Seed sets on disk or in a bucket, and the vectors in them.

A seed set is a folder of seed files. Listing it gives a `SeedSet` with a fingerprint; reading it gives
`Seeds`, which are unit vectors, and the settings that the set brings along.
"""

from laion_assets.seeds.embeddings import (
    IMAGE,
    PROMPT,
    KnownImages,
    Seeds,
    centroid,
    count_seeds,
    embeddings_of,
    read_seeds,
)
from laion_assets.seeds.folder import (
    Listing,
    SeedSet,
    check_name,
    find_seed_set,
    list_folder,
    list_seed_sets,
)
from laion_assets.seeds.model import Model
from laion_assets.seeds.model_folder import stage_model
from laion_assets.seeds.seed_files import SeedFile
from laion_assets.seeds.settings_file import SETTINGS_FILE, read_settings

__all__ = [
    "IMAGE",
    "PROMPT",
    "SETTINGS_FILE",
    "KnownImages",
    "Listing",
    "Model",
    "SeedFile",
    "SeedSet",
    "Seeds",
    "centroid",
    "check_name",
    "count_seeds",
    "embeddings_of",
    "find_seed_set",
    "list_folder",
    "list_seed_sets",
    "read_seeds",
    "read_settings",
    "stage_model",
]
