"""Mixing: several models joined into one by a router. A router is a function of one Site; see `routers/`.

Traits of a router:
needs   what it looks at when it is made: none, hidden (states of dev prompts), text (of prompts), scores (of experts)
form    what it leaves: linear (one map of states), module (with a hidden layer), text (asks every expert to read)
blends  it always lets several experts answer together
"""

from __future__ import annotations

from typing import Literal

from glue.family import Choice, Family

routing = Family("routing", "router", "glue.mix.routers", first="Site -> Gate", traits=("needs", "form", "blends"))

Level = Literal["ffn", "block", "model", "text"]
Unit = Literal["token", "sentence"]  # what is routed: each token by itself, or a whole prompt
PLACES: dict[tuple[Level, Unit], tuple[str, ...]] = {  # level, what is routed -> the forms it holds
    ("ffn", "token"): ("linear",),  # a stock architecture has one matrix a layer, without bias
    ("ffn", "sentence"): ("linear", "module"),
    ("block", "sentence"): ("linear", "module"),
    ("model", "sentence"): ("linear", "module"),
    ("text", "sentence"): ("linear", "module", "text"),
}


def why_not(level: Level, unit: Unit, router: Choice) -> str:
    """Why a mixture of this level cannot have this router, with what would work; empty where it can."""
    if (level, unit) not in PLACES:
        return f"a mixture of level {level} routes whole prompts; only level ffn can route token by token"
    name, form, others = router.method.name, router.method.traits["form"], fitting(level, unit)
    instead = f"{', '.join(others[:-1])} or {others[-1]}"
    if name not in others:
        if form == "text":
            return (f"router '{name}' lets every expert read the prompt before one of them answers, which only level "
                    f"text does; use {instead}, or level: text")
        if form == "module" and level == "ffn":
            return (f"router '{name}' has a hidden layer, and a stock architecture has room for one matrix a layer; "
                    f"use {instead}, or route by sentence")
    if level == "text" and (name not in others or router.params.get("top_k", 1) > 1):
        return (f"router '{name}' lets several experts answer together, and experts of level text write different "
                f"tokens, so that one has to answer alone; use {instead}, with top_k 1")
    assert name in others, f"router '{name}' has a form or trait that no reason is given for"
    return ""


def fitting(level: Level, unit: Unit) -> list[str]:
    """The routers that a mixture of this level can have, by name."""
    return [method.name for method in routing if method.traits["form"] in PLACES[level, unit]
            and not (level == "text" and method.traits.get("blends"))]
