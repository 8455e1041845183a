"""One search strategy a file; the file registers it."""
