"""Searching: which members to merge and how much of each. A strategy sees a Space, never a model.

A strategy that only picks a member as it is declares `merges=False`; then the merge method is not looked at.
"""

from glue.family import Family

searching = Family("searching", "search strategy", "glue.search.strategies", first="Space -> Found", traits=("merges",))
