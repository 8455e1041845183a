"""Mixing: several models joined into one by a router. A router is a function of one Site; see `routers/`."""

from glue.family import Family

routing = Family("routing", "router", "glue.mix.routers", first="Site -> Gate", traits=("needs", "form"))
