"""glue side by side with its peers: merges, comparisons and candidates, in pairs, with times, memory and bits compared."""

import os

# before torch is imported: threads that spin while they wait slow down whatever else runs, the peer most of all
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
