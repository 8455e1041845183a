"""What surrounds lm-eval while it works: its own seeds, no network and no chatter; all as it was, afterwards."""

from __future__ import annotations

import io
import logging
import random
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr

import numpy as np
import torch

SEED = 1234  # of lm-eval's command where it is told nothing; Python's own generator gets 0


@contextmanager
def seeded() -> Iterator[None]:
    """The seeds of lm-eval's command inside; some tasks shuffle their choices by them. As they were, afterwards."""
    before = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        random.seed(0)
        np.random.seed(SEED)
        torch.manual_seed(SEED)
        try:
            yield
        finally:
            random.setstate(before[0])
            np.random.set_state(before[1])


@contextmanager
def offline() -> Iterator[None]:
    """Data come from this machine only, so that they are what the plan has seen."""
    import datasets.config

    before, datasets.config.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE, True
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE = before


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars and no advice: bars go nowhere, loggers speak only of errors. Exceptions pass."""
    loggers = [logging.getLogger(name) for name in ("lm_eval", "transformers", "datasets")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
