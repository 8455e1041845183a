"""Racing against the grid, on zoos that are trained for it: does it choose the same for a fifth of the answers?"""
