"""The index on local disk: copied from any fsspec URL or used in place, verified, and opened.

A manifest beside the data says what is there. It is marked incomplete before the first byte changes and
complete after the last one. Files are copied to `.partial` files in chunks, each recorded in a journal
once it is on the disk, so that a copy that was killed goes on where it stopped; they take their names
when all of them are whole. Staged sparse, parts of files come when requests need them. Readers hold a
shared lock from verification to close; the stager takes the exclusive one only to change what they could
read.
"""

from laion_assets.staging.manifest import (
    STAGE_AGAIN,
    Manifest,
    NotStagedError,
    StagedFile,
    verified_manifest,
)
from laion_assets.staging.opening import OpenIndex, is_staged, open_staged
from laion_assets.staging.plan import Plan, SourceFile, Transfer, plan, version_of
from laion_assets.staging.sparse.budget import read_bytes
from laion_assets.staging.sparse.store import DEFAULT_BUDGET
from laion_assets.staging.stager import Staged, stage
from laion_assets.staging.transfer.source import Source

__all__ = [
    "DEFAULT_BUDGET",
    "STAGE_AGAIN",
    "Manifest",
    "NotStagedError",
    "OpenIndex",
    "Plan",
    "Source",
    "SourceFile",
    "Staged",
    "StagedFile",
    "Transfer",
    "is_staged",
    "open_staged",
    "plan",
    "read_bytes",
    "stage",
    "verified_manifest",
    "version_of",
]
