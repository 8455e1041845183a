"""Refining: what each part of a dataset is worth to a model, and which part of it to keep."""

from __future__ import annotations

from glue.family import Family

selecting = Family("selecting", "selector", "glue.refine.selectors", first="Pool -> indices [k]",
                   traits=("needs", "all"))
