"""The command line's `glue serve`: a member behind HTTP until it is interrupted."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, get_args

import typer

from glue.cli_zoo import HERE, ZooFile, opened
from glue.errors import one_line

if TYPE_CHECKING:
    from glue.kinds import Place
    from glue.kinds.source import Session, Source
    from glue.serve.sessions import Judge


def serve(member: Annotated[str, typer.Argument(help="Who answers: any member that runs.")],
          host: Annotated[str, typer.Option(help="Where to listen; others than this machine need a key.")]
          = "127.0.0.1",
          port: Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free.")] = 8000,
          api_key: Annotated[str, typer.Option(envvar="GLUE_API_KEY", help="That requests must show.")] = "",
          device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps, or auto.")] = "cpu",
          dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16, nf4, int8, or auto.")] = "float32",
          max_batch: Annotated[int, typer.Option(min=1, help="Texts written at once.")] = 32,
          max_waiting: Annotated[int, typer.Option(min=1, help="Requests that may wait; more get 429.")] = 256,
          max_body: Annotated[int, typer.Option(min=1, help="Bytes of a request.")] = 4 * 2 ** 20,
          timeout: Annotated[float, typer.Option(min=0.001, help="Seconds of a request.")] = 300.0,
          sessions: Annotated[int, typer.Option(min=1, help="That /v1/score holds.")] = 64,
          session_tokens: Annotated[int, typer.Option(min=1, help="That they may hold together.")] = 262_144,
          session_idle: Annotated[float, typer.Option(min=0.001, help="Seconds until an unused one goes.")] = 600.0,
          max_top_k: Annotated[int, typer.Option(min=0, help="Tokens /v1/score tells of a place; 0: all.")] = 0,
          chat_template: Annotated[str, typer.Option(help="A Jinja file, or plain; default: the member's.")] = "",
          delay_ms: Annotated[float, typer.Option(min=0, help="Wait before each answer, for experiments.")] = 0.0,
          grace: Annotated[float, typer.Option(min=0, help="Seconds to finish in after SIGTERM.")] = 20.0,
          zoo: ZooFile = HERE) -> None:
    """Let everyone who speaks to OpenAI's API speak to a member; and answer /v1/score, for proxies.

    Says "listening on http://..." when it does.
    """
    from glue.errors import MethodError

    place = place_of(device, dtype)
    try:
        from glue.serve.served import Limits, Served
        from glue.serve.server import check, listen, run
    except ImportError as problem:
        raise MethodError(f"a server needs the packages fastapi and uvicorn ({problem})",
                          fix="pip install 'glue[serve]'") from None
    key, template = api_key or None, None
    check(host, key)
    if chat_template:
        file = Path(chat_template)
        if chat_template != "plain" and not file.is_file():
            raise MethodError(f"there is no chat template {chat_template}", fix="name a Jinja file, or say plain")
        template = chat_template if chat_template == "plain" else file.read_text()
    limits = Limits(max_batch, max_waiting, max_body, timeout, sessions, session_tokens, session_idle, max_top_k,
                    delay_ms / 1000, grace)
    bound = listen(host, port)  # before the member is loaded: that may take long
    known = opened(zoo)
    running = replace(place, notes=known.folder).load(known[member])
    if running.spread:
        print(f"{member} is spread over {running.spread}", flush=True)
    run(Served(running, limits, template, judging), bound, key, lambda url: print(f"listening on {url}", flush=True))


def place_of(device: str, dtype: str) -> Place:
    """Where a member runs, as options say it. Raises MethodError for what this machine does not calculate with."""
    from glue.errors import MethodError, did_you_mean
    from glue.kinds import Dtype, Place
    from glue.kinds.device import usable

    if dtype not in get_args(Dtype):
        raise MethodError(f"there is no dtype '{one_line(dtype, 40)}'{did_you_mean(dtype, get_args(Dtype))}",
                          fix=f"say one of {', '.join(get_args(Dtype))}")
    usable(device, dtype)  # type: ignore[arg-type]
    return Place(device, dtype)  # type: ignore[arg-type]


def judging(session: Session, source: Source, seed: int | None) -> Judge:
    """How /v1/verify judges: as glue.proxy does, with a stream of its own that a device of the same seed knows."""
    import numpy as np

    from glue.errors import GlueError
    from glue.proxy.mixing import GREEDY
    from glue.proxy.packed import pack_verdict, unpack
    from glue.proxy.protocol import Verifier
    from glue.proxy.speculative import streams
    from glue.serve.problems import Problem

    verifier = Verifier(session, streams(np.random.default_rng(seed), GREEDY)[1])

    def judge(data: bytes, held: int) -> bytes:
        try:
            proposal = unpack(data, source.vocabulary.size)
        except GlueError as wrong:
            raise Problem(400, wrong.what) from None
        if proposal.keep > held:
            raise Problem(409, f"{proposal.keep} tokens are to be kept, and {held} are held; send the whole text with "
                               "keep 0", param="session", code="session_lost")
        if not 1 <= proposal.keep + len(proposal.new) <= source.longest - len(proposal.ids):
            raise Problem(400, f"the member sees {source.longest} tokens, and at least one before a draft")
        return pack_verdict(verifier.verify(proposal))

    return judge
