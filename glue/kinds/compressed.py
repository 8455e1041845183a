"""Weights of several experts stored as one base and what each changes of it, read as the dense experts they stand for.

A tensor of an expert is stored in one of three ways, told by the names that are there:

    base.NAME                                       the base's; an expert of which nothing else is stored has the same
    expert_K.NAME.svd_left, expert_K.NAME.svd_right two factors [rows, r] and [r, columns]; their product is added
    expert_K.NAME                                   the expert's own, whole

Everything else, such as a router, is stored as it is. This saves disk and what is sent over a network; in memory the
experts are dense again.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from functools import cached_property

import torch
from torch import Tensor

from glue.checkpoint import Header, Weights
from glue.errors import CheckpointError

LEFT, RIGHT = ".svd_left", ".svd_right"
PART = re.compile(r"(?P<owner>base|expert_(?P<number>\d+))\.(?P<name>.+?)(?P<side>\.svd_left|\.svd_right)?")
AGAIN = "make the mixture again"
AS_CHANGES = "glue_compressed_mixture"  # GlueCompressedMixtureConfig.model_type, without importing transformers


class Compressed(Mapping[str, Tensor]):
    """Dense tensors `expert_K.NAME` of so many experts, each made when it is asked for and not kept.

    Raises CheckpointError where parts are missing or do not fit each other.
    """

    def __init__(self, stored: Weights, experts: int):
        self._stored = stored
        base: dict[str, Header] = {}
        others: dict[str, Header] = {}
        factors: set[str] = set()  # expert_K.NAME of which there are factors
        whole: dict[str, Header] = {}
        names: dict[str, None] = {}
        for stored_name, header in stored.headers.items():
            match = PART.fullmatch(stored_name)
            if match is None:
                others[stored_name] = Header(header.dtype, header.shape)
                continue
            if match["number"] and int(match["number"]) >= experts:
                raise CheckpointError(f"'{stored_name}' is of expert {match['number']}, and there are {experts}",
                                      fix=AGAIN)
            names[match["name"]] = None
            if match["side"]:
                factors.add(f"{match['owner']}.{match['name']}")
            elif match["owner"] == "base":
                base[match["name"]] = header
            else:
                whole[stored_name] = header
        self._factors = factors
        self.headers: dict[str, Header] = {}
        for expert in range(experts):
            for name in names:
                dense = f"expert_{expert}.{name}"
                found = whole.get(dense) or base.get(name)
                if found is None:
                    raise CheckpointError(f"nothing is stored for '{dense}', and no base", fix=AGAIN)
                self.headers[dense] = Header(found.dtype, found.shape)
        for dense in sorted(factors):
            self._check(dense, base.get(dense.partition(".")[2]), dense in whole)
        self.headers |= others

    def _check(self, dense: str, base: Header | None, twice: bool) -> None:
        """Two factors that make a change of the base, and nothing stored beside them."""
        left, right = (self._stored.headers.get(dense + side) for side in (LEFT, RIGHT))
        if base is None or twice or left is None or right is None or len(left.shape) != 2 or len(right.shape) != 2 \
                or (left.shape[0], right.shape[1]) != base.shape or left.shape[1] != right.shape[0]:
            found = {side: header and header.shape for side, header in ((LEFT, left), (RIGHT, right))}
            raise CheckpointError(f"'{dense}': the factors {found} do not make a change of {base and base.shape}",
                                  fix=AGAIN)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.headers:
            raise CheckpointError(f"nothing is stored for '{name}'", fix=AGAIN)
        if name in self._stored.headers:
            return self._stored[name]
        base = self._stored[f"base.{name.partition('.')[2]}"]
        if name not in self._factors:
            return base
        return restored(base, self._stored[name + LEFT], self._stored[name + RIGHT])

    def __iter__(self) -> Iterator[str]:
        return iter(self.headers)

    def __len__(self) -> int:
        return len(self.headers)

    @cached_property
    def fingerprint(self) -> str:
        """That of what is stored; no product is computed for it."""
        return hashlib.sha256(f"compressed|{self._stored.fingerprint}".encode()).hexdigest()


def restored(base: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """base + left @ right, computed in fp32 or wider and rounded once to the base's type. [rows, columns]"""
    wide = torch.promote_types(base.dtype, torch.float32)
    return torch.addmm(base.to(wide), left.to(wide), right.to(wide)).to(base.dtype)
