"""Evaluating: suites, lm-eval, a fast scorer for search, and the statistics of a board."""
