"""The curve of a training: the loss of every step, how many tokens it read, and what became of an earlier run."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any

from glue.files import write_aside

NOTE = "training.json"  # beside the product, and no part of its digest


@dataclass
class Curve:
    """What a training tells of itself.

    loss      [steps], the weighted mean over the tokens of each batch
    tokens    [steps], how many the model read, padding left out
    left_out  items that were too long to be read
    cut       items of which only the beginning was read
    pieces    in how many a batch was read at the end, where memory ran out before
    resumed   after which step an earlier run's state was gone on with; 0 where none was
    unused    why the state that an earlier run had left was not gone on with
    seconds   that this process trained, and the tokens it read in them
    """

    loss: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    left_out: int = 0
    cut: int = 0
    pieces: int = 0
    resumed: int = 0
    unused: str = ""
    seconds: float = 0.0

    def figures(self) -> dict[str, Any]:
        """What a journal says: first, last and best loss, tokens, tokens a second, and what went otherwise."""
        read = sum(self.tokens[self.resumed:])
        told: dict[str, Any] = {
            "steps": len(self.loss), "first": _short(self.loss[0]), "last": _short(self.loss[-1]),
            "best": _short(min(self.loss)), "tokens": sum(self.tokens),
            "tokens_per_second": round(read / self.seconds, 1) if self.seconds > 0 else None} if self.loss else {}
        return told | {name: value for name in ("left_out", "cut", "pieces", "resumed", "unused")
                       if (value := getattr(self, name))}

    def sentence(self) -> str:
        """The figures in words; nothing where there was no step."""
        told = self.figures()
        if not self.loss:
            return ""
        return (f"{told['steps']:,} step{'s' * (told['steps'] > 1)}, {told['tokens']:,} tokens, "
                f"loss {told['first']:.4g} to {told['last']:.4g}, best {told['best']:.4g}")

    def write(self, folder: Path) -> None:
        """Put it beside the product: only what is the same every time."""
        write_aside(folder / NOTE, json.dumps({"loss": list(map(_short, self.loss)), "tokens": self.tokens,
                                               "left_out": self.left_out, "cut": self.cut}))


def read_curve(folder: Path) -> Curve | None:
    """The curve beside a product; None where there is none, or it was changed by hand to something else."""
    try:
        told = json.loads((folder / NOTE).read_bytes())
        curve = Curve([float(one) for one in told["loss"]], [int(one) for one in told["tokens"]],
                      int(told["left_out"]), int(told["cut"]))
        return curve if all(map(isfinite, curve.loss)) and len(curve.loss) == len(curve.tokens) else None
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None


def _short(loss: float) -> float:
    return float(f"{loss:.6g}")
