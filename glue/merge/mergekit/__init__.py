"""The dialect of mergekit: its YAML read and planned by ourselves, and mergekit itself for what we do not do."""
