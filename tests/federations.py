"""What goes wrong in a federation, on purpose: one that is cut off in a round, and a client that breaks."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest


def cut_off(monkeypatch: pytest.MonkeyPatch, step: ModuleType, calls: int) -> list[str]:
    """Let a step be interrupted at its so-manieth question to a client. Returns whom it has asked, which goes on."""
    answer, asked = step.answer, []

    def cut(errand: Any, message: bytes) -> bytes | str:
        asked.append(errand.client)
        if len(asked) == calls:
            raise KeyboardInterrupt
        return answer(errand, message)

    monkeypatch.setattr(step, "answer", cut)
    return asked


def breaking(monkeypatch: pytest.MonkeyPatch, module: ModuleType, function: str, client: str) -> None:
    """Let a function that works on a client's data have no room at one of them."""
    works = getattr(module, function)

    def breaks(*given: Any, **more: Any) -> Any:
        if Path(more["data"][0][0]).parent.name == client:
            raise MemoryError("no room")
        return works(*given, **more)

    monkeypatch.setattr(module, function, breaks)
