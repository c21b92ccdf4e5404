"""Select rows of a combined table, and print the command that downloads them with img2dataset.

Run `make demo` first, then `python examples/to_img2dataset.py`, or name a table and a number of rows:

    python examples/to_img2dataset.py data/output/combined_urls/interiors.parquet 100000
"""

import shlex
import sys
from pathlib import Path

import pyarrow.compute as pc
import pyarrow.parquet as pq

COLUMNS = ["id", "url", "caption", "similarity", "strategies"]


def main(table: str = "data/output/combined_urls/fruit.parquet", rows: str = "100") -> None:
    """Write the first rows that have a caption to `<table>.selected.parquet`."""
    combined = pq.read_table(table, columns=COLUMNS)  # sorted by rank
    captioned = combined.filter(pc.greater(pc.utf8_length(combined["caption"]), 0))
    selected = Path(table).with_suffix(".selected.parquet")
    pq.write_table(captioned.slice(0, int(rows)), selected)
    print(
        f"img2dataset --url_list {shlex.quote(str(selected))} --input_format parquet "
        "--url_col url --caption_col caption --save_additional_columns '[id,similarity,strategies]' "
        "--output_format webdataset --output_folder images"
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
