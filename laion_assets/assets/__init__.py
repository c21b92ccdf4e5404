"""The asset graph, thin: an asset reads, calls one function of the library, and reports."""
