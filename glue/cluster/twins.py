"""Twins hidden by permutation: the same model with its neurons and heads in another order; found, and put in order.

A Llama computes the same when the neurons of an MLP, the key-value groups of an attention layer, the heads inside a
group, the value channels of a group, or the channels of the residual stream change their order, as long as every tensor
along which they lie follows. Query and key channels keep theirs, since rotary embedding gives each its frequency.

    found = best_match(a, b)              does b have the neurons of a anywhere?
    order = alignment(a, b, heads)        axis -> which of b's entries goes where
    Permuted(b, order, heads)             b in the order of a: the same bits in other places, the same function

Sorted norms, the usual statistic without an order, do not tell here: the norms of two models initialised apart are
drawn from one distribution, and sorted they coincide. So some neurons of one are looked for among all of the other.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from glue.checkpoint import Header, Weights, fingerprint
from glue.errors import CheckpointError

LAYER = re.compile(r"(?P<before>.*\blayers\.(?P<layer>\d+)\.)(?P<rest>.+)")
STREAM = "stream"
# of a layer: where in it a tensor is -> what lies along its axes, "" for nothing that may be permuted
AXES = {"mlp.gate_proj.weight": ("mlp", STREAM), "mlp.up_proj.weight": ("mlp", STREAM),
        "mlp.down_proj.weight": (STREAM, "mlp"), "mlp.gate_proj.bias": ("mlp",), "mlp.up_proj.bias": ("mlp",),
        "mlp.down_proj.bias": (STREAM,),
        "self_attn.q_proj.weight": ("query", STREAM), "self_attn.k_proj.weight": ("key", STREAM),
        "self_attn.v_proj.weight": ("value", STREAM), "self_attn.o_proj.weight": (STREAM, "output"),
        "self_attn.q_proj.bias": ("query",), "self_attn.k_proj.bias": ("key",), "self_attn.v_proj.bias": ("value",),
        "self_attn.o_proj.bias": (STREAM,),
        "self_attn.q_norm.weight": ("query",), "self_attn.k_norm.weight": ("key",),
        "input_layernorm.weight": (STREAM,), "post_attention_layernorm.weight": (STREAM,),
        "pre_feedforward_layernorm.weight": (STREAM,), "post_feedforward_layernorm.weight": (STREAM,)}
EMBEDDING = "embed_tokens.weight"
OUTSIDE = {EMBEDDING: ("", STREAM), "lm_head.weight": ("", STREAM), "norm.weight": (STREAM,)}
SILENT = "inv_freq"  # a table that older files carry and nobody reads
SAMPLE = 64       # neurons of one model that are looked for in the other
FOUND = 0.5       # mean cosine of the best matches; among strangers it is about sqrt(2 log(neurons) / (3 hidden))
ROWS = 4096       # tokens, or up to twice as many, by which channels of the residual stream are told apart
BLOCK = 1 << 22   # entries of a table of cosines that are there at a time
SLACK = 1e-3      # by which another order must be better than the given one to be taken: rounding is no permutation
Order = Mapping[str, Tensor]


@dataclass(frozen=True)
class Heads:
    """Numbers of query heads and of key-value heads."""

    query: int
    key: int

    @property
    def group(self) -> int:
        """Query heads that share a key."""
        return self.query // self.key


def best_match(a: Weights, b: Weights, *, sample: int = SAMPLE) -> float:
    """How well some neurons of a are found in b, in any order: the mean over them of their highest cosine.

    A neuron is its rows of gate and up beside its column of down, in the middle layer. The residual streams are put
    in one order first. 1 for twins, above FOUND for twins that were tuned since, little more than 0 for strangers.
    Raises CheckpointError where the names are not those of a Llama, or the shapes differ.
    """
    layers = _layers(a, b)
    before = layers[len(layers) // 2]
    stream = _stream(a, b)
    order = {} if stream is None else {STREAM: stream}
    theirs = Permuted(b, order)
    one, other = _neurons(a, before), _neurons(theirs, before)
    step = max(1, len(one) // sample)
    return float((_unit(one[::step][:sample]) @ _unit(other).T).amax(1).mean())


def alignment(a: Weights, b: Weights, heads: Heads) -> Order:
    """The order that puts b beside a: axis -> index into b's entries along it; axes that are in order are left out.

    Neurons are matched by the cosine of their rows and columns, so that its sum is highest (an assignment problem
    for each layer); key-value groups by the cosine of their keys and of the heads that share them.
    """
    layers = _layers(a, b)
    order: dict[str, Tensor] = {}
    stream = _stream(a, b)
    if stream is not None:
        order[STREAM] = stream
    for before in layers:
        theirs = Permuted(b, order)
        found = {"mlp": assigned(_neurons(a, before), _neurons(theirs, before)),
                 **_attention(a, theirs, before, heads)}
        order |= {f"{before}{axis}": index for axis, index in found.items() if index is not None}
    return order


class Permuted(Mapping[str, Tensor]):
    """Weights in another order: every tensor is permuted when it is asked for."""

    def __init__(self, weights: Weights, order: Order):
        self._weights, self.order = weights, dict(order)

    @cached_property
    def headers(self) -> Mapping[str, Header]:
        """Types and shapes, which an order leaves as they are; no file, since none holds this order."""
        return {name: Header(header.dtype, header.shape) for name, header in self._weights.headers.items()}

    @cached_property
    def fingerprint(self) -> str:
        """Of the weights as they are now."""
        return fingerprint(self)

    def __getitem__(self, name: str) -> Tensor:
        tensor = self._weights[name]
        for dim, axis in enumerate(_axes(name)):
            index = self.order.get(axis)
            if index is not None and len(index) == tensor.shape[dim]:  # norms of one head's size stay as they are
                tensor = tensor.index_select(dim, index)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)


def assigned(ours: Tensor, theirs: Tensor) -> Tensor | None:
    """Which row of `theirs` belongs beside each of `ours`, so that the sum of cosines is highest.

    ours, theirs  [n, features]
    returns       [n] a permutation; None where no order is better than the given one
    """
    ours, theirs = _unit(ours), _unit(theirs)
    given = (ours * theirs).sum(1)
    nearest, best = _nearest(ours, theirs)
    if len(nearest.unique()) < len(nearest):  # two want the same row
        from scipy.optimize import linear_sum_assignment

        cosines = ours @ theirs.T
        nearest = torch.from_numpy(linear_sum_assignment(cosines.numpy(), maximize=True)[1])
        best = cosines.gather(1, nearest[:, None])[:, 0]
    return nearest if float(best.sum() - given.sum()) > SLACK else None


def _nearest(ours: Tensor, theirs: Tensor) -> tuple[Tensor, Tensor]:
    """(index, cosine) of the nearest row for each of ours; where all differ, that is the best assignment."""
    found = [(block @ theirs.T).max(1) for block in ours.split(max(1, BLOCK // len(theirs)))]
    return torch.cat([each.indices for each in found]), torch.cat([each.values for each in found])


def _stream(a: Weights, b: Weights) -> Tensor | None:
    """The order of the residual stream, by the columns of the embedding; None where it is the same, or none is found.

    Most pairs have one order, and a sample of channels tells.
    """
    name = next(name for name in a.headers if name.endswith(EMBEDDING))
    rows = min(a.headers[name].shape[0], b.headers[name].shape[0])
    some = max(1, rows // ROWS)
    ours, theirs = (_unit(each[name][:rows:some].to(torch.float32).T) for each in (a, b))
    step = max(1, len(ours) // SAMPLE)
    nearest, best = _nearest(ours[::step], theirs)
    there = torch.arange(len(ours))[::step]
    if not float(best.mean()) > FOUND or torch.equal(nearest, there):
        return None
    return assigned(ours, theirs)


def _neurons(weights: Weights, before: str) -> Tensor:
    """[neurons, 3 hidden] fp32: row of gate, row of up, column of down."""
    parts = [weights[f"{before}mlp.{word}_proj.weight"].to(torch.float32) for word in ("gate", "up", "down")]
    return torch.cat([parts[0], parts[1], parts[2].T], 1)


def _attention(a: Weights, b: Weights, before: str, heads: Heads) -> dict[str, Tensor | None]:
    """The order of query, key, value and output channels that puts the groups and heads of b beside those of a."""
    ours, theirs = _Attention(a, before, heads), _Attention(b, before, heads)
    size, wide = ours.head, ours.value
    keys = _unit(ours.k.flatten(1)) @ _unit(theirs.k.flatten(1)).T
    one, other = _unit(ours.q.flatten(2)), _unit(theirs.q.flatten(2))
    inner: dict[tuple[int, int], Tensor] = {}
    fit = torch.empty(heads.key, heads.key)
    for i in range(heads.key):
        for j in range(heads.key):
            cosines = one[i] @ other[j].T
            inner[i, j] = _solved(cosines)
            fit[i, j] = keys[i, j] + cosines.gather(1, inner[i, j][:, None]).mean()
    groups = _solved(fit)
    query, key, value, output = [], [], [], []
    for i, j in enumerate(groups.tolist()):
        turned = inner[i, j]
        # a value channel is its row of v beside its columns of o, in the heads' new order
        channels = assigned(torch.cat([ours.v[i], *ours.o[i].transpose(1, 2)], 1),
                            torch.cat([theirs.v[j], *theirs.o[j][turned].transpose(1, 2)], 1))
        channels = torch.arange(wide) if channels is None else channels
        places = j * heads.group + turned
        key.append(j * size + torch.arange(size))
        query.append((places[:, None] * size + torch.arange(size)).flatten())
        value.append(j * wide + channels)
        output.append((places[:, None] * wide + channels).flatten())
    found = {"query": torch.cat(query), "key": torch.cat(key), "value": torch.cat(value), "output": torch.cat(output)}
    return {axis: None if torch.equal(index, torch.arange(len(index))) else index for axis, index in found.items()}


class _Attention:
    """The matrices of one attention layer by key-value group, in fp32.

    q  [groups, heads in a group, head, hidden]      k  [groups, head, hidden]      v  [groups, value, hidden]
    o  [groups, heads in a group, hidden, value]
    """

    def __init__(self, weights: Weights, before: str, heads: Heads):
        q, k, v, o = (weights[f"{before}self_attn.{word}_proj.weight"].to(torch.float32) for word in "qkvo")
        hidden = q.shape[1]
        if any(len(each) % heads.key for each in (q, k, v)) or heads.query % heads.key:
            raise CheckpointError(f"'{before}self_attn' does not have {heads.query} heads over {heads.key} keys",
                                  fix="see num_attention_heads and num_key_value_heads in config.json")
        self.head, self.value = len(k) // heads.key, len(v) // heads.key
        self.q = q.reshape(heads.key, heads.group, self.head, hidden)
        self.k, self.v = k.reshape(heads.key, self.head, hidden), v.reshape(heads.key, self.value, hidden)
        self.o = o.T.reshape(heads.key, heads.group, self.value, hidden).transpose(2, 3)


def _solved(scores: Tensor) -> Tensor:
    """The assignment of columns to rows with the highest sum."""
    if len(scores) == 1:
        return torch.zeros(1, dtype=torch.int64)
    from scipy.optimize import linear_sum_assignment

    return torch.from_numpy(linear_sum_assignment(scores.numpy(), maximize=True)[1])


def _unit(rows: Tensor) -> Tensor:
    return torch.nn.functional.normalize(rows, dim=-1)


def _layers(a: Weights, b: Weights) -> list[str]:
    """What the names of each layer begin with, in order. Raises CheckpointError where a cannot be compared with b."""
    matches = filter(None, map(LAYER.fullmatch, a.headers))
    found = {int(match["layer"]): match["before"] for match in matches}
    layers = [found[k] for k in sorted(found)]
    strange = [name for name in b.headers if not _axes(name) and not name.endswith(SILENT)]
    needed = [f"{before}{rest}" for before in layers for rest in AXES if rest.endswith("_proj.weight")]
    lost = [name for name in needed if name not in a.headers or name not in b.headers]
    like = "only models whose parts are named and arranged as in Llama can be aligned"
    if not layers or lost or not any(name.endswith(EMBEDDING) for name in a.headers):
        what = f"'{lost[0]}'" if lost else "layers as in a Llama"
        raise CheckpointError(f"there are no {what} to look for neurons in", fix=like)
    if strange:
        raise CheckpointError(f"'{strange[0]}' is no part of a Llama, and may have an order of its own", fix=like)
    for name in needed:
        if a.headers[name].shape != b.headers[name].shape:
            raise CheckpointError(f"'{name}' is {list(a.headers[name].shape)} and {list(b.headers[name].shape)}",
                                  fix="only models of one shape can be twins")
    return layers


def _axes(name: str) -> tuple[str, ...]:
    """What lies along the axes of a tensor, by its name; () where nothing that may be permuted does."""
    match = LAYER.fullmatch(name)
    if match:
        return tuple(axis if axis in ("", STREAM) else f"{match['before']}{axis}"
                     for axis in AXES.get(match["rest"], ()))
    return next((axes for end, axes in OUTSIDE.items() if name.endswith(end)), ())
