"""The grammar of mergekit-moe: which models become experts of one, and how prompts are led to them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from glue import document
from glue.document import Document
from glue.errors import Place, RecipeError, did_you_mean, one_line
from glue.merge.mergekit.config import DTYPES, gathered
from glue.merge.mergekit.nouns import Loc, ModelRef
from glue.merge.mergekit.reading import Reading

TOP = ("base_model", "experts", "shared_experts", "gate_mode", "dtype", "experts_per_token", "architecture")
EXPERT = ("source_model", "positive_prompts", "negative_prompts", "noise_scale", "residual_scale")
GATES = ("hidden", "hidden_avg", "hidden_last", "cheap_embed", "random", "uniform_random")


@dataclass(frozen=True)
class Expert:
    """A model whose MLPs become experts, and the prompts that are to go there."""

    model: ModelRef
    positive_prompts: tuple[str, ...] = ()
    negative_prompts: tuple[str, ...] = ()
    noise_scale: float | None = None
    residual_scale: float | None = None
    loc: Loc = ()


@dataclass(frozen=True)
class MoeConfig:
    """A config of mergekit-moe.

    architecture  how the name of the output begins, or "" to leave the choice
    notes         what was accepted and means nothing here
    """

    document: Document = field(repr=False, compare=False)
    base_model: ModelRef
    experts: tuple[Expert, ...]
    shared_experts: tuple[Expert, ...] = ()
    gate_mode: str = "hidden"
    dtype: str = ""
    experts_per_token: int = 2
    architecture: str = ""
    notes: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """What was read, for the record."""
        return self.document.text

    def place(self, *loc: str | int) -> Place:
        """Where in the file a path of keys stands."""
        return self.document.place(*loc)

    def referenced(self) -> list[ModelRef]:
        """Every model that is needed, each once, the base first."""
        experts = (*self.experts, *self.shared_experts)
        return list(dict.fromkeys([self.base_model, *(expert.model for expert in experts)]))

    def place_of(self, model: ModelRef) -> Place:
        """Where a model is named first."""
        found = [expert.loc for expert in (*self.experts, *self.shared_experts) if expert.model == model]
        return self.place("base_model") if model == self.base_model else self.place(*found[0], "source_model")


def read_moe(file: Path, *, lenient: bool = False) -> MoeConfig:
    """Read a config of mergekit-moe.

    lenient  unknown words are notes and not mistakes
    Raises RecipeError for one mistake, and Mistakes for several; each has its place.
    """
    doc = document.read(file, RecipeError)
    reading = Reading(doc, lenient)
    value = doc.value
    if not isinstance(value, dict):
        raise RecipeError("a mixture is a mapping with the keys 'base_model' and 'experts'", place=doc.place(),
                          fix="write  base_model: ...  and  experts: [{source_model: ..., positive_prompts: [...]}]")
    _known(reading, value, (), TOP)
    config = MoeConfig(
        doc, _model(reading, value.get("base_model"), ("base_model",)), _experts(reading, value, "experts"),
        _experts(reading, value, "shared_experts") if value.get("shared_experts") else (),
        _word(reading, value, "gate_mode", GATES, "hidden"), _word(reading, value, "dtype", DTYPES, ""),
        value.get("experts_per_token", 2), reading.text(value, "architecture"))
    if not reading.mistakes:
        _sound(reading, config)
    if reading.mistakes:
        raise gathered(reading.mistakes)
    return MoeConfig(**{**config.__dict__, "notes": tuple(dict.fromkeys(reading.notes))})


def _known(reading: Reading, value: dict[str, Any], loc: Loc, words: tuple[str, ...]) -> None:
    for word in value:
        if word not in words:
            said = f"'{one_line(str(word), 60)}' is not known here"
            if reading.lenient:
                reading.note((*loc, word), f"{said} and is left out")
            else:
                reading.wrong((*loc, word), said + did_you_mean(word, words))


def _model(reading: Reading, value: Any, loc: Loc) -> ModelRef:
    found = reading.model(value, loc)
    if found and found.lora:
        reading.wrong(loc, f"'{found}' is an adapter on a model, and mergekit-moe takes whole models",
                      "merge the adapter into its model first")
    return found or ModelRef("")


def _word(reading: Reading, value: dict[str, Any], key: str, known: tuple[str, ...], default: str) -> str:
    word = reading.text(value, key).removeprefix("torch.") or default
    if word and word not in known:
        reading.wrong((key,), f"'{key}' cannot be '{one_line(word, 60)}'{did_you_mean(word, known)}")
    return word


def _experts(reading: Reading, value: dict[str, Any], key: str) -> tuple[Expert, ...]:
    entries = value.get(key)
    if not isinstance(entries, list) or not entries:
        reading.wrong((key,), f"'{key}' is a list of at least one expert",
                      f"write  {key}: [{{source_model: ..., positive_prompts: [...]}}, ...]")
        return ()
    return tuple(_expert(reading, entry, (key, k)) for k, entry in enumerate(entries))


def _expert(reading: Reading, entry: Any, loc: Loc) -> Expert:
    if not isinstance(entry, dict):
        reading.wrong(loc, "an expert is a mapping with the key 'source_model'", "write  - source_model: owner/name")
        return Expert(ModelRef(""))
    _known(reading, entry, loc, EXPERT)
    return Expert(_model(reading, entry.get("source_model"), (*loc, "source_model")),
                  _prompts(reading, entry, loc, "positive_prompts"), _prompts(reading, entry, loc, "negative_prompts"),
                  _scale(reading, entry, loc, "noise_scale"), _scale(reading, entry, loc, "residual_scale"), loc)


def _prompts(reading: Reading, entry: dict[str, Any], loc: Loc, key: str) -> tuple[str, ...]:
    prompts = entry.get(key) or []
    if not isinstance(prompts, list) or not all(isinstance(prompt, str) and prompt.strip() for prompt in prompts):
        reading.wrong((*loc, key), f"'{key}' is a list of texts, none of them empty",
                      f"write  {key}: [\"...\", \"...\"]; quotes make a text of a number")
        return ()
    return tuple(prompts)


def _scale(reading: Reading, entry: dict[str, Any], loc: Loc, key: str) -> float | None:
    scale = entry.get(key)
    if scale is not None and (type(scale) not in (int, float) or not 0 <= scale <= 1e4):  # NaN is refused as well
        reading.wrong((*loc, key), f"'{key}' is a number between 0 and 10000, not {one_line(repr(scale), 60)}")
        return None
    return scale


def _sound(reading: Reading, config: MoeConfig) -> None:
    """What mergekit-moe asks of a config as a whole."""
    count, chosen = len(config.experts), config.experts_per_token
    if type(chosen) is not int or not 1 <= chosen <= count:
        reading.wrong(("experts_per_token",), f"'experts_per_token' is a whole number from 1 to the number of experts, "
                      f"{count}, not {one_line(repr(chosen), 60)}", f"write  experts_per_token: {min(2, count)}")
    gated = [bool(expert.positive_prompts) for expert in config.shared_experts]
    if len(set(gated)) > 1:
        reading.wrong(("shared_experts",), "some shared experts have prompts and some have none",
                      "give positive_prompts to all of them or to none")
    if config.gate_mode == "random":
        return
    for expert in config.experts:
        if not expert.positive_prompts:
            reading.wrong(expert.loc, f"'{expert.model}' has no positive_prompts, from which its gate is made",
                          "add  positive_prompts: [...]  with texts it is good at, or write  gate_mode: random")
    prompts = [(expert.positive_prompts, expert.negative_prompts) for expert in config.experts]
    if count > 1 and len(set(prompts)) == 1 and all(prompts[0][:1]):
        reading.wrong(("experts",), "all experts have the same prompts, so nothing tells them apart",
                      "give each the prompts that are to go there, or write  gate_mode: random")
    if count > 1 and len({expert.model for expert in config.experts}) == 1:
        reading.wrong(("experts",), "all experts are the same model, so the mixture would answer as it does",
                      "name different models; write  gate_mode: random  if it is to be trained afterwards")
