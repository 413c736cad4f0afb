"""Data sets as uint8 canvases: one source a file, and the order in which a run sees them."""
