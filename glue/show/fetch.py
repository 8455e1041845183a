"""What is fetched from the hub: told before, while it comes, and after."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from glue.fetch import Asked, Bundle, check_room
from glue.room import human
from glue.show.terminal import bar


def print_bundles(asked: Sequence[Asked], bundles: Sequence[Bundle], *, error: bool) -> None:
    """Every file that will come, and how much there is room for; to standard error where results follow."""
    stream = sys.stderr if error else sys.stdout
    if not asked:
        print("everything is on this machine", file=stream)
    elif not bundles:
        print("everything is on this machine; HF_HUB_OFFLINE is set, so nobody looked for newer commits", file=stream)
    for one in bundles:
        print("\n".join(one.lines()), file=stream)
    if bundles:
        free, coming = check_room(bundles), sum(one.coming for one in bundles)
        print(f"{sum(len(one.files) for one in bundles)} files, {human(sum(one.size for one in bundles))}; "
              f"{human(coming)} to download, {human(free)} are free", file=stream)


def print_fetched(bundles: Sequence[Bundle], dry_run: bool, as_json: bool, *, error: bool = False) -> None:
    """Which commit lies where, and how it is kept where its branch may move."""
    stream = sys.stderr if error else sys.stdout
    if as_json:
        print(json.dumps({"bytes_to_download": sum(one.coming for one in bundles), "fetched": not dry_run,
                          "repositories": [one.as_data() for one in bundles]}, indent=1), file=stream)
        return
    for one in bundles:
        if not dry_run:
            print(f"{one.asked.called}: commit {one.listing.commit} in {one.listing.folder}", file=stream)
        if one.asked.address.moves:
            print(f"  it is what '{one.asked.address.revision or 'main'}' is now; to stay with it:  path: {one.pin}",
                  file=stream)


@contextmanager
def fetching(quiet: bool) -> Iterator[Callable[[int, int], None]]:
    """One bar on standard error for all that comes."""
    with bar(quiet) as report:
        yield lambda done, total: report("fetching", done, total)
