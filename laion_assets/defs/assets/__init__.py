"""The asset graph: an asset reads, calls one function of the library, writes its table and reports."""
