"""Devices: what the words `device` and `dtype` mean on this machine, and where the weights of a member go.

    auto      the first kind of accelerator that is here, or the processor where there is none
    cuda      a GPU; of several, each worker takes another
    cuda:1    that GPU and no other
    cpu, mps  what they say

Under `auto` and `cuda` a member that is too large for one GPU is spread over all of them by accelerate, layer after
layer; what they have no room for waits in the processor's memory and, last of all, on the disk.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Mapping
from importlib.util import find_spec
from itertools import chain
from typing import Any

import torch

from glue.checkpoint import Header
from glue.errors import MethodError, one_line
from glue.kinds import QUANTISED, Dtype

AUTO, ANY_GPU = "auto", "cuda"
GPU = re.compile(r"auto|cuda(:\d+)?")
WORKER = "GLUE_WORKER"  # in the environment of a worker process: which of them it is, counted from 0
ELSEWHERE = "GLUE_ELSEWHERE"  # in that of who plans for workers on other machines, whose devices nobody here can ask
ROOM = 0.85  # of what is free on a device, how much weights may take; activations and caches have the rest
BITS = {"nf4": 4.5, "int8": 8.25}  # of a weight of a linear layer, its share of the scales included
WHOLE = ["lm_head", "embed_out", ".*router"]  # modules that are not quantised: what writes, and what chooses
OUTSIDE = re.compile(r"embed|wte|wpe|lm_head|router|^(?!trunk\.).*\.experts\.\d")  # nor are these matrices: tables, and
# experts of architectures that are not ours, which become one tensor


def device_of(word: str) -> str:
    """What torch calls the device that a word means in this process.

    Raises MethodError where torch cannot calculate there.
    """
    if word == AUTO:
        found = torch.accelerator.current_accelerator(check_available=True)
        return "cpu" if found is None else _own() if found.type == ANY_GPU else str(found)
    try:
        told = torch.device(word)
        if told.type == "cuda":  # asked without touching it: a process that has cannot be forked any more
            count = torch.cuda.device_count()
            if (told.index or 0) >= count:
                raise RuntimeError(f"torch finds {count or 'no'} CUDA devices")
        elif told.type == "meta":
            raise RuntimeError("its tensors have a shape and no numbers")
        else:
            torch.empty(1, device=told)
    except (RuntimeError, AssertionError, NotImplementedError) as problem:
        raise MethodError(f"'{one_line(word)}' cannot be calculated on: {one_line(str(problem).splitlines()[0])}",
                          fix="say  cpu,  or  auto,  or install a torch for this device") from None
    return _own() if word == ANY_GPU else word


def _own() -> str:
    """The GPU of this worker: the first has the first, and where there are more workers than GPUs they share."""
    count = torch.cuda.device_count()
    return f"{ANY_GPU}:{int(os.environ.get(WORKER, 0)) % count}" if count > 1 else ANY_GPU


def usable(device: str, dtype: Dtype = "float32") -> None:
    """Raise MethodError, before anything runs, for a device or numbers that this machine cannot calculate with.

    Where work is sent to other machines, a GPU is one of theirs.
    """
    far = bool(os.environ.get(ELSEWHERE)) and GPU.fullmatch(device) is not None
    where = ANY_GPU if far else device_of(device)
    if dtype not in QUANTISED or far:
        return
    if find_spec("bitsandbytes") is None:
        raise MethodError(f"{dtype} needs the package bitsandbytes", fix="pip install 'glue[quantised]', or say  "
                                                                         "dtype: bfloat16")
    if torch.device(where).type not in ("cpu", "cuda", "xpu"):
        raise MethodError(f"bitsandbytes has no {dtype} on {where}", fix="say  dtype: bfloat16,  or another device")


def loading(word: str, dtype: Dtype, headers: Mapping[str, Header]) -> dict[str, Any]:
    """What transformers' `from_pretrained` is told, so that weights come to lie where they run and as they run.

    headers  of the weights that will be loaded
    Raises MethodError for quantised weights that are too large for all GPUs together: they cannot wait elsewhere; and
    for those that bitsandbytes does not calculate with on processors.
    """
    if dtype == "nf4" and device_of(word) == "cpu":
        _refuse_odd(headers)
    how = _numbers(dtype)
    how |= _placing(word, footprint(headers, dtype), stays=dtype in QUANTISED)
    return {**how, "device_map": {"": "cpu"}} if dtype in QUANTISED and "device_map" not in how else how


def settled(model: Any, word: str, times: int = 1) -> Any:
    """A model that is in the processor's memory, put where the word says; spread over GPUs where one is too small.

    times  how often there must be room for it: 4 for one whose gradient and two moments come to lie beside it
    Raises MethodError where all GPUs together are too small.
    """
    how = _placing(word, times * sum(part.nbytes for part in chain(model.parameters(), model.buffers())), stays=True)
    if not how:
        return model
    if "max_memory" not in how:
        return model.to(how["device_map"][""])
    from accelerate import dispatch_model, infer_auto_device_map

    room = {place: free // times for place, free in how["max_memory"].items() if place != "cpu"}
    found = infer_auto_device_map(model, room, no_split_module_classes=list(model._no_split_modules or ()))
    if "disk" in found.values():
        raise _too_large(times * sum(room.values()))
    return dispatch_model(model, found, skip_keys=getattr(model, "_skip_keys_device_placement", None))


def footprint(headers: Mapping[str, Header], dtype: Dtype) -> int:
    """Bytes that weights take once they are loaded."""
    def bits(name: str, header: Header) -> float:
        if dtype == "auto" or not header.dtype.is_floating_point:
            return 8 * header.dtype.itemsize
        linear = len(header.shape) == 2 and not OUTSIDE.search(name)
        return BITS[dtype] if linear and dtype in QUANTISED else 8 * as_torch(dtype).itemsize

    return int(sum(header.numel * bits(name, header) / 8 for name, header in headers.items()))


def as_torch(dtype: Dtype) -> torch.dtype:
    """What is calculated in. That of quantised weights is what they are widened to, one layer at a time."""
    return torch.float16 if dtype == "int8" else torch.bfloat16 if dtype == "nf4" else getattr(torch, dtype)


def _numbers(dtype: Dtype) -> dict[str, Any]:
    if dtype not in QUANTISED:
        return {"dtype": dtype if dtype == "auto" else as_torch(dtype)}
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_8bit=dtype == "int8", load_in_4bit=dtype == "nf4", llm_int8_skip_modules=WHOLE,
        bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=as_torch(dtype))
    return {"dtype": as_torch(dtype), "quantization_config": config}


def _refuse_odd(headers: Mapping[str, Header]) -> None:
    """Raise MethodError for sides that the 4-bit kernels of processors do not have."""
    for name, header in headers.items():
        if len(header.shape) == 2 and not OUTSIDE.search(name) and (header.shape[0] % 32 or header.shape[1] % 64):
            raise MethodError(f"nf4 on a processor is for matrices of 32 n x 64 m, and '{name}' is {header.shape[0]} x "
                              f"{header.shape[1]}", fix="say int8 or bfloat16, or a GPU")


def _placing(word: str, nbytes: int, stays: bool) -> dict[str, Any]:
    """Nothing for the processor; all on one device; or what each device may take.

    stays  nothing may wait in the processor's memory or on the disk
    """
    where = device_of(word)
    if where == "cpu":
        return {}
    if word not in (AUTO, ANY_GPU) or torch.device(where).type != ANY_GPU or nbytes <= ROOM * free_on(where):
        return {"device_map": {"": where}}
    room = {place: int(ROOM * free) for place, free in memory().items()}
    if stays and nbytes > (most := sum(free for place, free in room.items() if place != "cpu")):
        raise _too_large(most)
    return {"device_map": "auto", "max_memory": room}


def free_on(where: str) -> int:
    """Bytes that are free on a GPU, those that torch holds for nothing among them."""
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info(where)[0]


def memory() -> dict[int | str, int]:
    """Free bytes of each GPU, by its number, and of the processor's memory as `cpu`."""
    from accelerate.utils import get_max_memory

    return get_max_memory()


def _too_large(most: int) -> MethodError:
    return MethodError(f"the weights do not fit into the {most / 1e9:.3g} GB that are free on all GPUs",
                       fix="say a smaller dtype, such as nf4, or device: cpu")


def named(word: str) -> str:
    """What tells the device that a word means here from others: a GPU by its kind and how much memory it has."""
    where = device_of(word)
    if torch.device(where).type != ANY_GPU:
        return where
    about = torch.cuda.get_device_properties(where)
    return f"{about.name}, {about.total_memory} bytes"


def waits(model: Any) -> bool:
    """Whether weights of a model are not where they are calculated with, since there is no room for them there."""
    return any(each.device.type == "meta" for each in model.parameters())


def spread(model: Any) -> str:
    """In words, over what a model is spread: `cuda:0 (20 parts), cuda:1 (14 parts), cpu (3 parts)`; "" where it is
    in one place."""
    found = Counter(f"{ANY_GPU}:{place}" if isinstance(place, int) else str(place)
                    for place in (getattr(model, "hf_device_map", None) or {}).values())
    told = ", ".join(f"{place} ({count} part{'s' * (count > 1)})" for place, count in found.items())
    return told if len(found) > 1 else ""
