"""Proxies: large models that are only asked, steered by small ones that were tuned."""
