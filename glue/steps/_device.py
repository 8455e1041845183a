"""The device of a proxy: its pair here, its large member wherever it is, and a way of asking between them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal

from glue.errors import MethodError, did_you_mean
from glue.kinds import Place
from glue.member import Member, with_article

if TYPE_CHECKING:
    from glue.kinds.link import Traffic
    from glue.kinds.local_source import Local
    from glue.kinds.source import Source
    from glue.proxy.writing import Written


TAKES = (0.003, 0.001, 0.012)  # seconds, by which `draft: auto` reckons: a draft's token, a place more, a call
TRIP = 0.004  # to a server next door and back


@dataclass(frozen=True)
class Way:
    """How a device asks the large member.

    draft   tokens that the tuned small model writes ahead before it asks; 0: none, and a call for every token; auto: 1
            to 8, by how many stay
    bits    of each log-probability on its way: 32, 16 or 8
    top_k   tokens that are told of a place; 0: all
    extra   tokens beside them that the device names, at each place
    budget  how far, in total variation, leaving out the others may carry a place; more is asked for where it does
    """

    draft: int | Literal["auto"] = "auto"
    bits: Literal[32, 16, 8] = 16
    top_k: int = 0
    extra: int = 0
    budget: float = 1e-3

    @staticmethod
    def of(told: dict[str, Any]) -> Way:
        """The way that a recipe tells. Raises MethodError for other words."""
        known = [field.name for field in fields(Way)]
        for word in told:
            if word not in known:
                raise MethodError(f"a way of asking has no '{word}'{did_you_mean(word, known)}")
        way = Way(**told)
        right = (way.draft == "auto" or (type(way.draft) is int and 0 <= way.draft <= 64), way.bits in (32, 16, 8),
                 *(type(count) is int and count >= 0 for count in (way.top_k, way.extra)),
                 isinstance(way.budget, int | float) and 0 <= way.budget <= 1)
        if not all(right):
            wrong = known[right.index(False)]
            raise MethodError(f"a way of asking has  {wrong}: {getattr(way, wrong)}",
                              fix="draft: 0 to 64, or auto; bits: 32, 16 or 8; top_k and extra: 0 or more; budget: "
                                  "0 to 1")
        if way.extra and not way.top_k:
            raise MethodError(f"extra: {way.extra} names tokens beside the likeliest, and all are told anyway",
                              fix="add  top_k: 20,  or leave extra out")
        return way

    def __str__(self) -> str:
        told = "all" if not self.top_k else f"top {self.top_k}" + f" + {self.extra}" * bool(self.extra)
        return f"draft {self.draft}, {told}, {self.bits} bits"


class Device:
    """A proxy that writes: the pair is loaded, the large member asked.

    distance  seconds that every call takes longer
    traffic   counts what goes over the network, where the large member is an endpoint
    place     where whatever is loaded here runs
    """

    def __init__(self, proxy: Member, large: Member, way: Way, *, distance: float = 0.0, traffic: Traffic | None = None,
                 place: Place = Place(), pair: tuple[Local, Local] | None = None):  # noqa: B008 - a value
        from glue.hub import locate
        from glue.kinds.pair import pair_sources
        from glue.kinds.proxy import Pair

        self.alpha = Pair.read(locate(proxy.path), proxy.name).alpha
        self.tuned, self.small = pair or pair_sources(proxy, device=place.device, dtype=place.dtype)
        self.large = _source(large, way, distance, traffic, place)
        self.tokenizer, self.way = self.tuned.running.tokenizer, way
        self.ends, self.distance = _ends(self.tuned.running), distance

    def write(self, prompt: str, new: int, stops: Sequence[str] = ()) -> tuple[str, Written]:
        """What follows a prompt, greedily, and what it took; up to `new` tokens, the end of text or one of `stops`."""
        from glue.proxy.asking import Truncation
        from glue.proxy.lengths import Costs
        from glue.proxy.speculative import generate, opened

        way, tokenizer = self.way, self.tokenizer
        most = self.large.most if self.large.tells != "full" else 0
        asking = Truncation(way.top_k or most, way.extra if self.large.tells != "given" else 0, way.budget, most) \
            if way.top_k or most else None
        with opened(self.large, self.tuned, self.small) as sessions:
            done = generate(tokenizer(prompt)["input_ids"], **sessions, alpha=self.alpha, gamma=way.draft, new=new,
                            longest=min(each.longest for each in (self.large, self.tuned, self.small)), ends=self.ends,
                            stop=lambda ids: any(stop in self._text(ids) for stop in stops), truncation=asking,
                            bits=way.bits, costs=Costs(*TAKES, trip=self.distance + TRIP))
        return self._text(done.tokens), done

    def _text(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))


def drafting(proxy: Member, way: Way, place: Place) -> Device:
    """The device of a proxy, wherever its large member is. Raises MethodError for other members."""
    if proxy.kind != "proxy" or proxy.base is None:
        raise MethodError(f"'{proxy.name}' is {with_article(proxy.kind)}: it has no small model that could draft",
                          fix="name a proxy, or leave --draft out")
    return Device(proxy, proxy.base, way, place=place)


def _source(large: Member, way: Way, distance: float, traffic: Traffic | None, place: Place) -> Source:
    from glue.kinds.endpoint import asked
    from glue.kinds.local_source import Local

    if large.kind == "endpoint":
        return asked(large, bits=way.bits, distance=distance, traffic=traffic)
    return Local(place.load(large))


def _ends(running: Any) -> set[int]:
    told = running.model.generation_config.eos_token_id if running.model.generation_config else None
    told = running.tokenizer.eos_token_id if told is None else told
    return set(told) if isinstance(told, list) else {told}


@contextmanager
def served(member: Member, place: Place) -> Iterator[str]:
    """A member behind `/v1/score` in a process of its own on this machine; where it listens."""
    from multiprocessing import get_context

    context = get_context("spawn")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_serve, args=(member, there, place), daemon=True)
    process.start()
    there.close()
    try:
        try:
            yield here.recv()
        except EOFError:
            raise MethodError(f"the server of '{member.name}' ended before it listened",
                              fix=f"see what  glue serve {member.name}  says") from None
    finally:
        process.terminate()
        process.join(30)
        if process.is_alive():
            process.kill()
            process.join()


def _serve(member: Member, ready: Any, place: Place) -> None:
    """In the server's process."""
    import torch

    from glue.serve.served import Limits, Served
    from glue.serve.server import listen, run

    torch.set_num_threads(1)
    run(Served(place.load(member), Limits(grace=1.0)), listen("127.0.0.1", 0), None, ready.send)
