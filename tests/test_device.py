"""Devices and numbers: one word means the same in every command, and what is spread over devices answers the same."""

from __future__ import annotations

import json
from collections import namedtuple

import pytest
import torch

from glue import cli
from glue.errors import GlueError, MethodError
from glue.evaluate.lm_eval import evaluate
from glue.evaluate.suite import Suite, Task, write_tasks
from glue.kinds import Place, device, load
from glue.kinds.batches import NOTES, Room
from glue.kinds.device import device_of, footprint, loading, named, settled, spread, usable
from glue.kinds.mixture import register
from glue.member import Member, Table
from glue.plan import _origin, make_plan
from glue.recipe import read_recipe
from glue.run import run
from glue.steps import Measured, steps, wide
from glue.workers import Workers
from glue.zoo import Zoo
from tests import test_block_mixture, test_mixture_model
from tests.test_kinds import WORDS  # noqa: F401 - the words of the tiny tokenizer
