"""mergekit's side of a pair, at the settings that were fastest for it; prints its seconds as one line of JSON.

    python -m benchmarks.speed.peer CONFIG OUT [--sync]

Writing in a thread beside the merge, into shards of 0.5 GB, is what helped; its other options do nothing for
safetensors on a CPU. There is no tokenizer to copy, and it is not made to look for one.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

SHARD = 500_000_000  # bytes


def main(config: str, out: str, *flags: str) -> None:
    """Merge as the file `config` says into the folder `out`; the stage is run_merge alone, with --sync also fsync."""
    import yaml
    from mergekit.config import MergeConfiguration
    from mergekit.merge import MergeOptions, run_merge

    text = Path(config).read_text()
    read = MergeConfiguration.model_validate(yaml.safe_load(text))
    options = MergeOptions(async_write=True, out_shard_size=SHARD, quiet=True, copy_tokenizer=False)
    start = time.perf_counter()
    run_merge(read, out, options, config_source=text)
    if "--sync" in flags:
        for file in Path(out).iterdir():
            with open(file, "rb") as stream:
                os.fsync(stream.fileno())
    print(json.dumps({"seconds": {"plan": 0.0, "merge": time.perf_counter() - start}}))


if __name__ == "__main__":
    main(*sys.argv[1:])
