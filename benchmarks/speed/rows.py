"""The rows of the table of merges: what is merged how, as a mergekit configuration that both sides read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

WEIGHTS = (0.1, 0.2, 0.3, 0.4)


@dataclass(frozen=True)
class Row:
    """One method with its settings.

    own       parameters of every member, beside its weight
    shared    parameters of the whole merge
    n         members; None: as many as are asked for
    base      what the method calls its base: none, a model beside the members, or the first of them
    weighted  whether members have weights
    passes    how often the inputs must be read at least, by a merge that holds no whole tensor
    floor     what is aimed at, at the shape 1b1: the ratios of stage and process at least
    near      and the ratio of our stage to the physical limit at most
    random    whether entries are dropped at random, so that two tools cannot agree entry by entry
    """

    method: str
    own: Mapping[str, float] | None = None
    shared: Mapping[str, float | bool] | None = None
    n: int | None = None
    base: str = "beside"
    weighted: bool = True
    passes: int = 2
    floor: tuple[float, float] | None = None
    near: float | None = None
    random: bool = False

    def members(self, asked: int) -> list[str]:
        """Names of the checkpoints that are merged, without the base."""
        return [f"m{k}" for k in range(self.n or asked)]

    def inputs(self, asked: int) -> list[str]:
        """Names of all checkpoints that are read."""
        return [*(["base"] if self.base == "beside" else []), *self.members(asked)]

    def settings(self) -> str:
        """The parameters in a few words; weights are left out."""
        return ", ".join(f"{key} {value}" for key, value in {**(self.own or {}), **(self.shared or {})}.items())

    def config(self, places: Mapping[str, Path], asked: int) -> str:
        """The text of a mergekit configuration over the folders `places`."""
        lines = [f"merge_method: {self.method}", "dtype: bfloat16"]
        if self.base != "none":
            lines.append(f"base_model: {places['base' if self.base == 'beside' else 'm0']}")
        lines.append("models:")
        for k, name in enumerate(self.members(asked)):
            own = {"weight": WEIGHTS[k % len(WEIGHTS)]} if self.weighted else {}
            lines.append(f"  - model: {places[name]}")
            if own := own | dict(self.own or {}):
                lines.append("    parameters: " + _flow(own))
        if self.shared:
            lines.append("parameters: " + _flow(self.shared))
        return "\n".join(lines) + "\n"


def _flow(values: Mapping[str, float | bool]) -> str:
    return "{" + ", ".join(f"{key}: {str(value).lower()}" for key, value in values.items()) + "}"


_QUICK, _SPHERE, _DARE = (6.0, 4.0), (5.0, 4.0), (10.0, 8.0)
ROWS = {row.method: row for row in (
    Row("linear", base="none", passes=1, floor=_QUICK, near=1.7),
    Row("slerp", shared={"t": 0.3}, n=2, base="first", weighted=False, floor=_SPHERE),
    Row("nuslerp", n=2, base="none", floor=_SPHERE),
    Row("task_arithmetic", passes=1, floor=(4.5, 3.5)),
    Row("ties", own={"density": 0.2}, floor=(25.0, 20.0), near=8.0),
    Row("breadcrumbs", own={"density": 0.2, "gamma": 0.01}, floor=(10.0, 8.0)),
    Row("dare_linear", own={"density": 0.5}, floor=_DARE, near=8.0, random=True),
    Row("dare_ties", own={"density": 0.5}, floor=_DARE, near=8.0, random=True),
    Row("della", own={"density": 0.5, "epsilon": 0.15}, random=True),
    Row("sce", shared={"select_topk": 0.2}, weighted=False),
    Row("karcher", base="none", weighted=False),
    Row("model_stock", weighted=False),
    Row("ram", weighted=False, passes=1),
)}
SYNCED = "linear + fsync"  # the row of `linear` where both outputs are on the disk before the clock stops
