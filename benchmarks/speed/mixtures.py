"""Mixtures beside the dense model of the same shape: tokens a second, in alternating rounds; and memory of building.

model, block, sentence   beside their first expert alone, which has the shape that one answer costs at top-1
ffn                      beside transformers' own Mixtral of the same shape with random numbers

Both sides read the same prompts (prefill) and then write greedily with their caches (decode), in one process, one after
the other, the order changing from round to round. Routes are what the router decides while it reads: it was taught that
each prompt of a batch is for the next expert, so batches are mixed. Such a batch has to read the weights of all its
experts, which no code can spare it; so the peer is also asked for the batch in as many parts as there are experts.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib import import_module
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks.speed import measure
from benchmarks.speed.machine import commit, machine
from benchmarks.speed.pairs import OURS, PEER, ROOT, environment, recorded
from benchmarks.speed.shapes import SHAPES, Shape, made
from glue.checkpoint import Checkpoint
from glue.errors import GlueError
from glue.files import write_aside
from glue.kinds import Dtype, load
from glue.member import Member

LEVELS: dict[str, tuple[str, dict[str, Any]]] = {  # row -> its module in glue/mix/levels, and what it is told besides
    "model": ("model", {}), "block": ("block", {}), "ffn": ("ffn", {}), "sentence": ("ffn", {"routing": "sentence"})}
BATCHES = (1, 8)
AIMS = {("model", 1): 0.9, ("model", 8): 0.8, ("block", 1): 0.9, ("block", 8): 0.8, ("ffn", 1): 1.0, ("ffn", 8): 1.0}
APART = "peer in parts"
ROOM = 500_000_000  # bytes that building may take besides its largest tensor
Round = dict[str, dict[str, float]]


def main(given: argparse.Namespace) -> int:
    """Measure row by row, write down each, and print the page."""
    shape, folder = SHAPES[given.shape], given.folder / given.shape
    names = _chosen(given.levels)
    results = recorded(given.json, {"shape": given.shape, "bytes": shape.nbytes, "experts": given.experts,
                                    "prompt": given.prompt, "new": given.new, "dtype": given.dtype,
                                    "threads": torch.get_num_threads(), "machine": machine(folder)})
    work = folder / "mixtures"
    shutil.rmtree(work, ignore_errors=True)
    places = furnished(made(folder, shape, given.experts, given.experts), work, shape)
    try:
        for level in names:
            out = work / level
            results["rows"][f"build {level}"] = {**built(level, places, out, given), **_made()}
            _keep(results, given.json)
            if not given.memory_only:
                for row, rounds in timed(level, places, out, given):
                    results["rows"][row] = rounds
                    _keep(results, given.json)
            shutil.rmtree(out, ignore_errors=True)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    print(page(results))
    return 0


def furnished(places: Mapping[str, Path], work: Path, shape: Shape) -> list[Path]:
    """The same models with a tokenizer of all their words, in folders of their own: the base, then the members."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<unk>": 0, **{f"w{k}": k for k in range(1, shape.words)}}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="<unk>")
    found = []
    for name, place in places.items():
        folder = work / name
        folder.mkdir(parents=True)
        for file in (*place.glob("*.safetensors"), *place.glob("*.index.json"), place / "config.json"):
            (folder / file.name).symlink_to(file.resolve())
        tokenizer.save_pretrained(folder)
        found.append(folder)
    return found


def prompts(shape: Shape, count: int, length: int) -> Tensor:
    """Random tokens, the same every time: [count, length]"""
    return torch.randint(3, shape.words, (count, length), generator=torch.Generator().manual_seed(0))


# --- building ---------------------------------------------------------------------------------------------------------

def built(level: str, places: Sequence[Path], out: Path, given: argparse.Namespace) -> dict[str, Any]:
    """Build a mixture in a process of its own, and watch its memory; what it takes to import everything is told too.

    What stays is a second one, whose router has read the prompts: reading is no part of building.
    """
    def ran(what: str) -> tuple[measure.Ran, dict[str, Any]]:
        command = [sys.executable, "-m", "benchmarks.speed.mixture_side", what, level, str(given.prompt), str(out),
                   *map(str, places)]
        done = measure.run(command, folder=ROOT, environment=environment(), closely=True)
        return done, json.loads(done.output.splitlines()[-1])

    empty, _ = ran("nothing")
    watched, told = ran("random")
    if not given.memory_only:
        shutil.rmtree(out)
        ran("taught")
    largest = max(header.nbytes for place in places[1:] for header in Checkpoint(place).headers.values())
    return {"seconds": told["seconds"], "bytes": told["bytes"], "private": watched.private, "empty": empty.private,
            "resident": watched.resident, "largest": largest}


# --- running ----------------------------------------------------------------------------------------------------------

def timed(level: str, places: Sequence[Path], out: Path, given: argparse.Namespace):
    """(name of the row, its rounds) for each size of batch."""
    from glue.kinds.mixture import register

    register()
    ours: Any = load(Member(level, "mixture", str(out)), dtype=given.dtype).model
    peer: Any = _mixtral(ours, given.dtype) if level == "ffn" else \
        load(Member("dense", "model", str(places[1])), dtype=given.dtype).model
    ids = prompts(SHAPES[given.shape], max(BATCHES), given.prompt)
    for batch in BATCHES:
        print(f"{level}, batch {batch} ...", file=sys.stderr, flush=True)
        parted = [APART] if batch > 1 and level != "ffn" else []
        found: list[Round] = []
        for k in range(given.rounds + 1):  # the first does not count: it finds memory and kernels
            order = [OURS, PEER, *parted] if k % 2 == 0 else [*parted, PEER, OURS]
            found.append({side: asked(ours if side == OURS else peer, ids[:batch], given.new,
                                      parts=given.experts if side == APART else 1) for side in order})
        yield f"{level}, batch {batch}", {"level": level, "batch": batch, "rounds": found[1:],
                                          "routes": routes(ours, ids[:batch]), **_made()}


def asked(model: Any, ids: Tensor, new: int, parts: int = 1) -> dict[str, float]:
    """Tokens a second of reading prompts [b, s] and of writing `new` tokens behind each, in so many parts."""
    b, s = ids.shape
    seconds = [_asked(model, some, new) for some in ids.tensor_split(parts) if len(some)]
    return {"prefill": b * s / sum(read for read, _ in seconds), "decode": b * new / sum(wrote for _, wrote in seconds)}


@torch.inference_mode()
def _asked(model: Any, ids: Tensor, new: int) -> tuple[float, float]:
    b, s = ids.shape
    mask = torch.ones(b, s + new, dtype=torch.long)
    began = time.perf_counter()
    output = model(input_ids=ids, attention_mask=mask[:, :s], use_cache=True, logits_to_keep=1)
    token = output.logits[:, -1].argmax(-1, keepdim=True)
    read = time.perf_counter()
    for k in range(new):
        where = torch.full((b, 1), s + k)
        output = model(input_ids=token, attention_mask=mask[:, :s + k + 1], position_ids=where,
                       past_key_values=output.past_key_values, use_cache=True)
        token = output.logits[:, -1].argmax(-1, keepdim=True)
    return read - began, time.perf_counter() - read


@torch.inference_mode()
def routes(model: Any, ids: Tensor) -> list[int] | None:
    """How many decisions for these prompts fell to each expert; None where every token decides for itself."""
    if not hasattr(model, "gate"):
        return None
    weights = model.gate(ids)
    return (weights > 0).flatten(0, -2).sum(0).tolist()


def _mixtral(ours: Any, dtype: Dtype) -> Any:
    """What transformers makes of the configuration that the mixture has."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    kind = ours.dtype if dtype == "auto" else getattr(torch, dtype)
    return AutoModelForCausalLM.from_config(ours.config, dtype=kind).eval()


# --- the page ---------------------------------------------------------------------------------------------------------

def page(results: Mapping[str, Any]) -> str:
    """Markdown of what was measured."""
    rows, made_on = results["rows"], results["machine"]
    lines = [f"Mixtures of {results['experts']} experts of shape {results['shape']}, top-1, type {results['dtype']}: "
             f"prompts of {results['prompt']} tokens, {results['new']} written; {made_on['cpu']}, {results['threads']} "
             f"of {made_on['cores']} cores. Medians; ratios are taken round by round.", "",
             "| | decisions by expert | prefill, tokens/s: mixture / peer | ratio (range) | decode, tokens/s | "
             "ratio (range) | aim | to the peer in parts: prefill, decode | rounds |",
             "|---|---|---|---|---|---|---|---|---|"]
    for name, row in rows.items():
        if "rounds" not in row:
            continue
        aim = AIMS.get((row["level"], row["batch"]))
        cells = [f"**{name}**", "by token" if row["routes"] is None else " + ".join(map(str, row["routes"]))]
        middles = []
        for what in ("prefill", "decode"):
            both = [median(one[side][what] for one in row["rounds"]) for side in (OURS, PEER)]
            ratios = [one[OURS][what] / one[PEER][what] for one in row["rounds"]]
            middles.append(median(ratios))
            cells += [f"{both[0]:.0f} / {both[1]:.0f}", f"{middles[-1]:.2f} ({min(ratios):.2f}-{max(ratios):.2f})"]
        cells += ["-" if aim is None else f"{aim:g}" + (" missed" if min(middles) < aim else ""),
                  ", ".join(f"{median(one[OURS][what] / one[APART][what] for one in row['rounds']):.2f}"
                            for what in ("prefill", "decode")) if APART in row["rounds"][0] else "-",
                  str(len(row["rounds"]))]
        lines.append(_line(cells))
    lines += ["", "| | written, GB | seconds | private memory at its peak, MB | of that imports | aim | resident with "
              "mapped files, MB |", "|---|---|---|---|---|---|---|"]
    for name, row in rows.items():
        if "largest" in row:
            aim = row["largest"] + ROOM
            lines.append(_line([f"**{name}**", f"{row['bytes'] / 1e9:.2f}", f"{row['seconds']:.1f}",
                                f"{row['private'] / 1e6:.0f}", f"{row['empty'] / 1e6:.0f}",
                                f"{aim / 1e6:.0f}" + (" missed" if row["private"] > aim else ""),
                                f"{row['resident'] / 1e6:.0f}"]))
    return "\n".join(lines)


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _chosen(words: str) -> list[str]:
    asked_for = [word.strip() for word in words.split(",")] if words else [*LEVELS]
    for word in asked_for:
        if word not in LEVELS:
            raise GlueError(f"there is no level '{word}'", fix=f"there are {', '.join(LEVELS)}")
    return asked_for


def _keep(results: Mapping[str, Any], file: Path | None) -> None:
    if file:
        write_aside(file, json.dumps(results, indent=1) + "\n")


def _made() -> dict[str, str]:
    return {"date": datetime.now(UTC).isoformat(timespec="seconds"), "commit": commit(ROOT)}


def level_of(row: str) -> tuple[Any, dict[str, Any]]:
    """The module of a row's level, and what it is told besides."""
    name, more = LEVELS[row]
    return import_module(f"glue.mix.levels.{name}"), more
