"""Merging: many checkpoints of one shape into one. A merge method is a function of one Leaf; see `methods/`.

The traits that a merge method may declare:

    space       "weight": weights in, weights out;  "delta": differences to the base in, one difference out;  "factors":
                low-rank changes in, one Factors out, or several that are meant side by side; see `adapters.py`
    base        "optional": a method on differences that works on the weights themselves where no base is given
    glance      a function of the Pieces of a whole tensor: what to learn of it before it is merged; the method finds it
                in `leaf.seen`. Where a parameter `scope` is "model", it looks at the pieces of all tensors at once
    sees        "pieces" (default), "rows" or "whole": how the method wants to see a tensor; or a function of the
                tensor's name, its shape and the parameters -> one of these
    members     (fewest, most) members; None for no limit
    symmetric   True: the order of the members means nothing
    idempotent  settings under which copies of X, with weights that sum to 1, give X
    unbiased    settings under which the mean over seeds, of copies of X, is X
    why_not     for a method that is none of the last three: the reason
"""

from glue.family import Family

merging = Family("merging", "merge method", "glue.merge.methods", first="Leaf -> Tensor or Factors",
                 traits=("space", "base", "glance", "sees", "members", "symmetric", "idempotent", "unbiased",
                         "why_not"))
