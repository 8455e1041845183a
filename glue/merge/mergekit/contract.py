"""What a method asks of a config: how many models, a base, and the parameters that have no default."""

from __future__ import annotations

from glue.merge.mergekit.nouns import Config, Module, Slice, Source
from glue.merge.mergekit.reading import Reading
from glue.merge.mergekit.words import Dialect


def contract(reading: Reading, config: Config, method: Dialect) -> None:
    """Every set of models that the method cannot merge becomes a mistake of the reading."""
    name = method.method.name
    for sources, piece, module in config.groups():
        base = piece.base if piece and piece.base else config.base_model
        listed = [source.model for source in sources]
        loc = piece.loc if piece else module.loc if module else ("models",)
        if method.base == "needed" and base is None:
            reading.wrong(("merge_method",), f"merge method '{name}' needs a base_model, and none is given",
                          "add  base_model: <the model that the others were tuned from>")
            return
        if piece and method.base != "ignored" and base and base not in listed:
            reading.wrong(loc, f"the base_model '{base}' is no source of this slice", "add it to the sources, with its "
                          "layer_range")
            continue
        # mergekit adds the base to a list of models, even where the method takes it for one like all others
        extra = [base] if not piece and config.base_model and config.base_model not in listed else []
        all_count = method.base == "ignored" or method.peer.first
        others = [model for model in (*listed, *extra) if all_count or model != base]
        fewest, most = method.members
        if not others and method.base == "needed" and fewest <= 1:
            continue  # the base alone is the result
        if len(others) < fewest or (most is not None and len(others) > most):
            wanted = f"exactly {most}" if fewest == most else f"at least {fewest}" if len(others) < fewest \
                else f"at most {most}"
            counted = " with the base" if method.peer.first else " besides the base" if base and not all_count else \
                " with the base_model, which is merged like the others" if extra else ""
            reading.wrong(loc, f"merge method '{name}' takes {wanted} model{'s' * ((most or fewest) != 1)}{counted}; "
                          f"{len(others)} {'is' if len(others) == 1 else 'are'} given",
                          "change the models, or choose another method")
        else:
            _needs(reading, config, method, sources, piece, module, others)


def _needs(reading: Reading, config: Config, method: Dialect, sources: tuple[Source, ...], piece: Slice | None,
           module: Module | None, models: list) -> None:
    scopes = [config.settings, *([module.settings] if module else []), *([piece.settings] if piece else [])]
    name = method.method.name
    for word in method.peer.needs:
        if any(word in scope for scope in scopes):
            continue
        if word not in method.by_model:
            reading.wrong(piece.loc if piece else ("merge_method",),
                          f"merge method '{name}' needs the parameter '{word}'",
                          f"add  parameters: {{{word}: ...}}  to the top level")
            continue
        for model in models:
            source = next((source for source in sources if source.model == model), None)
            if source is None or word not in source.settings:
                why = "" if source else ", the base_model, which is merged like the others"
                reading.wrong(source.loc if source else ("base_model",), f"merge method '{name}' needs a '{word}' for "
                              f"'{model}'{why}", f"add  parameters: {{{word}: ...}}  to the model, or to the top level "
                              f"for all")
