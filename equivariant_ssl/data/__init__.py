"""Data sets as uint8 canvases, a file for each source, and the order in which a run reads them."""
