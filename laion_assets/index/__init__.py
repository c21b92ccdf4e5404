"""An index on disk: the faiss file, its inverted lists, and the metadata of its rows.

`open_folder` opens a local folder in place. Codes of rows become vectors with the index's `Decoder`.
"""

from laion_assets.index.decoder import Decoder
from laion_assets.index.faiss_index import Hits, Index
from laion_assets.index.in_place import open_folder
from laion_assets.index.inverted_lists import InvertedLists
from laion_assets.index.layout import index_files, metadata_files
from laion_assets.index.metadata import Metadata
from laion_assets.index.model_record import MODEL_RECORD, ModelRecord, read_model_record
from laion_assets.index.vectors import Vectors, decoded, unit

__all__ = [
    "MODEL_RECORD",
    "Decoder",
    "Hits",
    "Index",
    "InvertedLists",
    "Metadata",
    "ModelRecord",
    "Vectors",
    "decoded",
    "index_files",
    "metadata_files",
    "open_folder",
    "read_model_record",
    "unit",
]
