"""The index on the local disk: copied from a folder or a URL or used in place, verified, and opened.

`stage` mirrors the source to a cache directory, in full or sparse, and `open_staged` opens it. A manifest
records the contents of the directory. It is marked incomplete before the first byte changes, and complete
after the last one; `verified_manifest` compares it with the disk cheaply, and `scrub` reads every byte.
Readers hold a shared lock from verification to close. Stagers take the lock exclusively, but only while
they change files that readers could read.

The layers, from the top: `scrubber`; `stager` and `opening`; `plan` and `verify`; `manifest`, `full` and
`sparse` on one level; `transfer`. Modules import only from lower layers.
"""

from laion_assets.staging.manifest import Manifest, NotStagedError, StagedFile
from laion_assets.staging.opening import OpenIndex, is_staged, open_staged
from laion_assets.staging.scrubber import Scrubbed, scrub
from laion_assets.staging.sparse.budget import DEFAULT_BUDGET, parse_size
from laion_assets.staging.stager import Staged, stage
from laion_assets.staging.transfer.fetch import TransferOptions, TransferStats
from laion_assets.staging.transfer.files import version_of
from laion_assets.staging.transfer.source import Source
from laion_assets.staging.verify import sample_damage, verified_manifest

__all__ = [
    "DEFAULT_BUDGET",
    "Manifest",
    "NotStagedError",
    "OpenIndex",
    "Scrubbed",
    "Source",
    "Staged",
    "StagedFile",
    "TransferOptions",
    "TransferStats",
    "is_staged",
    "open_staged",
    "parse_size",
    "sample_damage",
    "scrub",
    "stage",
    "verified_manifest",
    "version_of",
]
