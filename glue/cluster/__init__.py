"""Clustering: which members of a zoo belong together, by the similarity of their weights."""
