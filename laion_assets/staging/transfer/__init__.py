"""Files of a source: listed, read in ranges, with retries and locks."""
