"""Devices: the word of a recipe or an option, and what it means on this machine."""

from __future__ import annotations

import torch

from glue.errors import MethodError, one_line

AUTO = "auto"


def device_of(word: str) -> str:
    """What torch calls the device; `auto` is the first accelerator, or the processor where there is none.

    Raises MethodError where torch cannot calculate there.
    """
    if word == AUTO:
        found = torch.accelerator.current_accelerator(check_available=True)
        return str(found) if found is not None else "cpu"
    try:
        told = torch.device(word)
        if told.type == "cuda":  # asked without touching it: a process that has cannot be forked any more
            count = torch.cuda.device_count()
            if (told.index or 0) >= count:
                raise RuntimeError(f"torch finds {count or 'no'} CUDA devices")
        else:
            torch.empty(1, device=told)
    except (RuntimeError, AssertionError, NotImplementedError) as problem:
        raise MethodError(f"'{one_line(word)}' cannot be calculated on: {one_line(str(problem).splitlines()[0])}",
                          fix="say  cpu,  or  auto,  or install a torch for this device") from None
    return word
