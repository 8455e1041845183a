"""One merge method a file; the file registers it."""
