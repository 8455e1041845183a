"""glue side by side with its peers, in alternating pairs: merges, comparisons of weights, candidates of a search."""

import os

# before torch is imported: threads that spin while they wait slow down whatever else runs, the peer most of all
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
