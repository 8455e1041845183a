"""The command line's `glue federate`: the two ends of a federation across machines; a run goes there by its recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

federate_app = typer.Typer(no_args_is_help=True, help="Start what a federation across machines needs (Flower).")


@federate_app.command()
def serve(host: Annotated[str, typer.Option(help="Where to listen; 0.0.0.0 for other machines.")] = "127.0.0.1",
          port: Annotated[int, typer.Option(help="Of everything: clients, runs and their processes.")] = 9190,
          certificate: Annotated[Path | None, typer.Option(help="For TLS; without it nothing is encrypted.")] = None,
          key: Annotated[Path | None, typer.Option(help="Of the certificate.")] = None,
          authority: Annotated[Path | None, typer.Option(help="Certificate of who signed it.")] = None,
          authenticate: Annotated[bool, typer.Option("--authenticate", help="Only nodes whose key is known.")] = False,
          database: Annotated[Path | None, typer.Option(help="Keep its state in this file.")] = None) -> None:
    """Run a SuperLink, to which clients and runs connect, until it is interrupted."""
    raise typer.Exit(_flower().serve(host, port, certificate=certificate, key=key, authority=authority,
                                     authenticate=authenticate, database=database))


@federate_app.command()
def join(superlink: Annotated[str, typer.Argument(help="Where the SuperLink is, host:port.")],
         client: Annotated[int, typer.Option(min=0, help="Which client this is, counted from 0.")],
         of: Annotated[int, typer.Option(min=1, help="How many there are.")],
         data: Annotated[Path | None, typer.Option(help="A dataset folder of this machine, which stays here.")] = None,
         base: Annotated[Path | None, typer.Option(help="Where the base lies on this machine.")] = None,
         root_certificate: Annotated[Path | None, typer.Option(help="Whom to trust; without it no TLS.")] = None,
         private_key: Annotated[Path | None, typer.Option(help="By which this node shows who it is.")] = None,
         port: Annotated[int, typer.Option(help="For its own processes; 0: any that is free.")] = 0,
         device: Annotated[str, typer.Option(help="Where it trains: cpu, cuda, cuda:1, mps, or auto.")] = "cpu",
         ) -> None:
    """Be one client of a federation until it is interrupted."""
    raise typer.Exit(_flower().join(superlink, client, of, data=data, base=base, root_certificate=root_certificate,
                                    private_key=private_key, port=port, device=device))


def _flower() -> Any:
    from glue.steps.federate import flower_app

    return flower_app()
