"""glue: a workbench for people who have many language models and want one better one."""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOMES = {"Checkpoint": "checkpoint", "Member": "member", "Origin": "member", "Score": "member", "Table": "member",
          "Zoo": "zoo", "Recipe": "recipe", "read_recipe": "recipe", "Plan": "plan", "make_plan": "plan",
          "Workers": "workers", "GlueError": "errors"}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    """Public names are imported when they are first used, so that `import glue` costs nothing."""
    if name not in _HOMES:
        raise AttributeError(f"module 'glue' has no attribute '{name}'")
    return getattr(import_module(f"glue.{_HOMES[name]}"), name)
