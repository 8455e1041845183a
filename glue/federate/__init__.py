"""Federating: clients that keep their data teach one model in rounds. The loop takes functions and knows no network."""
