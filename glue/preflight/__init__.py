"""Preflight: what a plan would download, write, hold in memory and take, before it runs; and whether that fits here."""
