"""A writer that stops in the middle, for tests of what a kill leaves behind."""

from __future__ import annotations

import os


class Crash(BaseException):
    """Nobody catches it."""


def crashing(after: int):
    """os.pwrite that writes this many bytes in all, and then there is no more."""
    left, pwrite = after, os.pwrite

    def write_some(file: int, data, at: int) -> int:
        nonlocal left
        if left < len(data):
            pwrite(file, data[:left], at)
            raise Crash
        left -= len(data)
        return pwrite(file, data, at)

    return write_some
