"""One router a file; the file registers it."""
