"""One selector a file; the file registers it."""
