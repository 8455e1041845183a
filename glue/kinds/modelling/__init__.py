"""Modelling files: each imports torch and transformers only, and is also copied next to the weights it runs."""
