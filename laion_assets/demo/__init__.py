"""Where the demo lives: real clip art in LAION's real on-disk layout."""
