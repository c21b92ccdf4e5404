"""An index on disk: the faiss file, its inverted lists, and the metadata of its rows.

`open_folder` opens a local folder in place. The index's `Decoder` turns codes of rows into vectors.
"""

from laion_assets.index.arrow_layout import read_table
from laion_assets.index.batch_tables import content_of, published_tables, table_as_parquet
from laion_assets.index.decoder import Decoder
from laion_assets.index.faiss_index import Index, nearest_centres, nprobe_rule, transformed
from laion_assets.index.in_place import open_folder
from laion_assets.index.inverted_lists import ID_SIZE
from laion_assets.index.layout import (
    INVERTED_LISTS,
    METADATA_FOLDER,
    POPULATED_INDEX,
    PUBLISHED_TABLES,
    PUBLISHING,
    SINGLE_INDEX,
)
from laion_assets.index.metadata import URL_COLUMNS, Metadata
from laion_assets.index.model_record import MODEL_RECORD, ModelRecord, read_model_record
from laion_assets.index.vectors import unit

__all__ = [
    "ID_SIZE",
    "INVERTED_LISTS",
    "METADATA_FOLDER",
    "MODEL_RECORD",
    "POPULATED_INDEX",
    "PUBLISHED_TABLES",
    "PUBLISHING",
    "SINGLE_INDEX",
    "URL_COLUMNS",
    "Decoder",
    "Index",
    "Metadata",
    "ModelRecord",
    "content_of",
    "nearest_centres",
    "nprobe_rule",
    "open_folder",
    "published_tables",
    "read_model_record",
    "read_table",
    "table_as_parquet",
    "transformed",
    "unit",
]
