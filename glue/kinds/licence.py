"""Licences of models, by the words that the hub has for them: what a card says, and which of them bind together."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

LICENCE = re.compile(r"[a-z0-9][a-z0-9.+-]*")  # as the hub names them: apache-2.0
FREE = {"apache-2.0", "mit", "mit-0", "bsd", "bsd-2-clause", "bsd-3-clause", "isc", "zlib", "cc0-1.0", "unlicense",
        "wtfpl", "cc-by-2.0", "cc-by-3.0", "cc-by-4.0", "odc-by", "pddl"}  # ask for no more than to be named
OTHER = {"other", "unknown"}  # say nothing about what is allowed, so two of them need not be the same
# What the hub takes as  license:  of a card; all else is  license: other  with a name of its own.
KNOWN = OTHER | (FREE - {"mit-0"}) | {
    "afl-3.0", "agpl-3.0", "apple-amlr", "apple-ascl", "artistic-2.0", "bigcode-openrail-m",
    "bigscience-bloom-rail-1.0", "bigscience-openrail-m", "bsd-3-clause-clear", "bsl-1.0", "c-uda", "cc",
    "cc-by-2.5", "cc-by-nc-2.0", "cc-by-nc-3.0", "cc-by-nc-4.0", "cc-by-nc-nd-3.0", "cc-by-nc-nd-4.0",
    "cc-by-nc-sa-2.0", "cc-by-nc-sa-3.0", "cc-by-nc-sa-4.0", "cc-by-nd-4.0", "cc-by-sa-3.0", "cc-by-sa-4.0",
    "cdla-permissive-1.0", "cdla-permissive-2.0", "cdla-sharing-1.0", "creativeml-openrail-m",
    "deepfloyd-if-license", "ecl-2.0", "epl-1.0", "epl-2.0", "etalab-2.0", "eupl-1.1", "eupl-1.2", "gemma", "gfdl",
    "gpl", "gpl-2.0", "gpl-3.0", "h-research", "intel-research", "lgpl", "lgpl-2.1", "lgpl-3.0", "lgpl-lr",
    "llama2", "llama3", "llama3.1", "llama3.2", "llama3.3", "llama4", "lppl-1.3c", "mpl-2.0", "ms-pl", "ncsa",
    "odbl", "ofl-1.1", "openrail", "openrail++", "osl-3.0", "postgresql"}
_HEAD = 65536  # bytes of a card in which its front matter is looked for


def agreed(licences: Sequence[str]) -> str:
    """The licence that all models have; nothing where they differ, or where one does not say."""
    found = {licence.lower() for licence in licences}
    one = found.pop() if len(found) == 1 else ""
    return one if LICENCE.fullmatch(one) and (one not in OTHER or len(licences) == 1) else ""


def clashing(licences: Iterable[str]) -> list[str]:
    """Different licences that each bind what is made, so that somebody has to read them; sorted. One alone is none."""
    binding = [licence.lower() for licence in licences if licence and licence.lower() not in FREE]
    found = sorted(set(binding))
    return found if len(found) > 1 or any(binding.count(word) > 1 for word in OTHER) else []


def licence_of(folder: Path) -> str:
    """The licence that the card in a model folder names; nothing where there is none, or several.

    Of `license: other` it is the name that stands beside it, where there is one.
    """
    try:
        with open(folder / "README.md", "rb") as stream:
            text = stream.read(_HEAD).decode(errors="replace")
    except OSError:
        return ""
    front = re.match(r"\s*---\r?\n(.*?)\r?\n---", text, re.DOTALL)
    found = _value("license", front[1]) if front else ""
    return (_value("license_name", front[1]) or found) if front and found.lower() == "other" else found


def front_matter(licence: str) -> list[str]:
    """The lines of a card's front matter that say it in the words of the hub; none where nothing is said."""
    if not licence or licence in KNOWN:
        return [f'license: "{licence}"'] if licence else []
    return ['license: "other"', f'license_name: "{licence}"']


def _value(key: str, front: str) -> str:
    found = re.search(rf"^{key}:[ \t]*[\"']?([\w.+-]+)[\"']?[ \t\r]*$", front, re.MULTILINE)
    return found[1] if found else ""
