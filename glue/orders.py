"""Orders: what a merge config asks for, planned from headers alone, and how it is put into a folder."""

from __future__ import annotations

import json
import re
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glue.checkpoint import Checkpoint, Header, Weights, weights_digest
from glue.errors import CheckpointError, GlueError, MethodError, RecipeError, did_you_mean, one_line
from glue.hub import HUB
from glue.kinds.card import Card, Source
from glue.kinds.device import device_of
from glue.kinds.frame import config_json
from glue.kinds.furnish import furnish
from glue.kinds.licence import licence_of
from glue.member import FOLDER_NOTE, canonical
from glue.merge.engine import OUTPUTS, Merge
from glue.merge.mergekit.config import read_configs
from glue.merge.mergekit.moe import build_moe, check_moe, read_moe
from glue.merge.mergekit.moe_words import MoeConfig
from glue.merge.mergekit.nouns import Config, ModelRef
from glue.merge.mergekit.targets import Model, Planned, merge_of, planned
from glue.merge.write import resume_key
from glue.snapshot import whole
from glue.steps.merge import spread
from glue.writer import SHARD

if TYPE_CHECKING:
    from glue.workers import Workers
    from glue.zoo import Zoo

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")  # of a document, which becomes that of a folder
EXPERTS = re.compile(r"^experts\s*:", re.MULTILINE)
Report = Callable[[int, int], None]
Folders = dict[ModelRef, tuple[Path, ...]]


@dataclass(frozen=True)
class Settings:
    """What the command line may say of a merge, beside its config.

    dtype, out_dtype  replace those of the config      untie   read a missing head from the embedding
    overwrite         a folder that is there is set aside, not refused
    """

    seed: int = 0
    dtype: str = ""
    out_dtype: str = ""
    shard_size: int = SHARD
    device: str = "cpu"
    allow_nan: bool = False
    lenient: bool = False
    untie: bool = False
    overwrite: bool = False

    @property
    def kept(self) -> tuple[Any, ...]:
        """What the result depends on."""
        return self.seed, self.dtype, self.out_dtype, self.shard_size, self.allow_nan, self.untie


@dataclass(frozen=True)
class Order(ABC):
    """Something to be made from a config, in a folder of its own.

    text     of the config
    method   in one word
    folders  a model, as the config names it, -> its folder, and that of its adapter
    notes    what was accepted and means nothing here, and what people should know
    """

    text: str
    method: str
    out: Path
    settings: Settings
    folders: Folders
    notes: tuple[str, ...]

    @property
    def key(self) -> str:
        """Of everything that the result depends on; files count by their size and time."""
        files = [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for paths in self.folders.values()
                 for path in paths for file in sorted(path.glob("*.safetensors"))]
        return canonical([self.text, repr(self.settings.kept), files])

    @property
    def done(self) -> bool:
        """Whether the folder holds the result of just this order."""
        try:
            told = json.loads((self.out / FOLDER_NOTE).read_bytes())
            return told.get("order") == self.key and len(Checkpoint(self.out)) > 0
        except (OSError, ValueError, AttributeError, GlueError):
            return False

    @property
    @abstractmethod
    def through(self) -> str:
        """Why mergekit itself does the work, or nothing."""

    @abstractmethod
    def into(self, folder: Path, workers: Workers, report: Report) -> str:
        """Put weights and all that belongs to them into a folder; returns the digest of the weights."""


@dataclass(frozen=True)
class Dense(Order):
    """A merge. `merge` is None where mergekit itself does the work."""

    config: Config
    plan: Planned
    merge: Merge | None

    @property
    def key(self) -> str:
        """See Order."""
        return resume_key(self.merge, self.settings.shard_size) if self.merge is not None else super().key

    @property
    def through(self) -> str:
        """See Order."""
        return self.plan.through

    def into(self, folder: Path, workers: Workers, report: Report) -> str:
        """See Order."""
        if self.merge is not None:
            digest = spread(self.merge, folder, workers, shard_size=self.settings.shard_size, report=report)
        else:
            digest = self._through_mergekit(folder)
        keep: Sequence[Any] = ()
        if self.merge is None:  # mergekit has written a configuration, and where it was to make one, a tokenizer
            keep = ("config", "tokenizer") if self.config.tokenizer else ("config",)
        base = self.config.base_model
        furnish(folder, self.folders[self.plan.donor][0], _card(self, base), changes={} if keep else self.plan.config,
                chat_template=self.config.chat_template or None, keep=keep,
                members=[paths[0] for paths in self.folders.values()])
        return digest

    def _through_mergekit(self, folder: Path) -> str:
        from glue.merge.mergekit.peer import run_through_mergekit

        shutil.rmtree(folder)
        folder.mkdir()
        run_through_mergekit(self.text, folder, models=_by_path(self.folders), seed=self.settings.seed,
                             shard_size=self.settings.shard_size, dtype=self.config.dtype,
                             out_dtype=self.config.out_dtype, device=self.settings.device)
        return weights_digest(Checkpoint(folder))


@dataclass(frozen=True)
class Mixture(Order):
    """A mixture by mergekit-moe."""

    config: MoeConfig

    @property
    def through(self) -> str:
        """See Order."""
        return "it is a config of mergekit-moe"

    def into(self, folder: Path, workers: Workers, report: Report) -> str:
        """See Order."""
        shutil.rmtree(folder)
        folder.mkdir()
        card = replace(_card(self, self.config.base_model), config_file="mergekit_moe_config.yml",
                       command="glue merge mergekit_moe_config.yml out", tags=("moe", "mergekit", "merge"))
        digest, _ = build_moe(self.config, _by_path(self.folders), folder, card, seed=self.settings.seed,
                              shard_size=self.settings.shard_size, device=self.settings.device)
        return digest


def _card(order: Order, base: ModelRef | None) -> Card:
    cards = {ref: _source(ref, paths) for ref, paths in order.folders.items()}
    return Card(order.out.resolve().name, order.method, tuple(card for ref, card in cards.items() if ref != base),
                order.text, base=cards.get(base) if base else None, seed=order.settings.seed)


def _source(ref: ModelRef, paths: Sequence[Path]) -> Source:
    hub = not Path(ref.path).expanduser().exists()
    name = str(ref) if hub else paths[0].resolve().name
    return Source(name, hub, ref.revision, licence=licence_of(paths[0]))


def _by_path(folders: Folders) -> dict[str, Path]:
    """Each path of a config, with its revision, -> its folder."""
    found: dict[str, Path] = {}
    for ref, paths in folders.items():
        for (path, revision), folder in zip(((ref.path, ref.revision), (ref.lora, ref.lora_revision)), paths,
                                            strict=False):
            found[f"{path}@{revision}" if revision else path] = folder
    return found


class Promised:
    """The weights of a merge that has yet to be made, as far as they are known: their headers."""

    def __init__(self, headers: Mapping[str, Header], key: str):
        self.headers, self.fingerprint = dict(headers), key

    def __getitem__(self, name: str) -> Any:
        raise CheckpointError(f"'{name}' has not been merged yet")

    def __iter__(self):
        return iter(self.headers)

    def __len__(self) -> int:
        return len(self.headers)


def orders(file: Path, out: Path, settings: Settings, zoo: Zoo | None = None) -> list[Order]:
    """Read a config file and plan every document of it. Reads headers and no weights, and writes nothing.

    Documents with a name go into folders beside `out`, and later ones may use them. Raises Mistakes, or what is wrong
    with the first model that cannot be used.
    """
    for word in (settings.dtype, settings.out_dtype):
        if word and word not in OUTPUTS:
            raise MethodError(f"'{one_line(word)}' is no type of numbers{did_you_mean(word, OUTPUTS)}")
    settings = replace(settings, device=device_of(settings.device))
    if file.is_file() and EXPERTS.search(file.read_text(errors="replace")):
        return [_mixture(read_moe(file, lenient=settings.lenient), out, settings, zoo)]
    made: dict[str, Dense] = {}
    for config in read_configs(file, lenient=settings.lenient):
        place = out
        if config.name:
            if not NAME.fullmatch(config.name):
                raise RecipeError(f"'{one_line(config.name, 60)}' cannot be the name of a folder",
                                  fix="use letters, digits, '.', '_' and '-'", place=config.place("name"))
            place = out.with_name(f"{out.name}.stages") / config.name
        made[config.name] = _dense(config, place, settings, made, zoo)
    return list(made.values())


def _dense(config: Config, out: Path, settings: Settings, made: Mapping[str, Dense], zoo: Zoo | None) -> Dense:
    config = replace(config, dtype=settings.dtype or config.dtype, out_dtype=settings.out_dtype or config.out_dtype)
    models: dict[ModelRef, Model] = {}
    folders: Folders = {}

    def opened(ref: ModelRef) -> Model:
        if ref not in models:
            try:
                models[ref], folders[ref] = _opened(ref, made, zoo)
            except GlueError as error:
                locs = [(*source.loc, "model") for sources, _, _ in config.groups() for source in sources
                        if source.model == ref]
                raise error.at(config.place(*(locs[0] if locs else ("base_model",)))) from None
        return models[ref]

    plan = planned(config, opened, untie=settings.untie)
    merge = None
    if not plan.through:
        merge = merge_of(plan, seed=settings.seed, device=settings.device, allow_nan=settings.allow_nan)
    notes = tuple(dict.fromkeys([*config.notes, *plan.notes]))
    return Dense(config.text, config.merge_method, out, settings, folders, notes, config, plan, merge)


def _mixture(config: MoeConfig, out: Path, settings: Settings, zoo: Zoo | None) -> Mixture:
    folders: Folders = {ref: (found(ref.path, ref.revision, zoo),) for ref in config.referenced()}
    outcome = check_moe(config, _by_path(folders))
    return Mixture(config.document.text, f"mergekit-moe, {outcome.architecture}", out, settings, folders,
                   (*config.notes, *outcome.notes), config)


def _opened(ref: ModelRef, made: Mapping[str, Dense], zoo: Zoo | None) -> tuple[Model, tuple[Path, ...]]:
    earlier = made.get(ref.path) if ref.path else None
    if earlier is not None and not ref.revision and not ref.lora:
        if earlier.done:
            return _model(ref, earlier.out, Checkpoint(earlier.out)), (earlier.out,)
        donor = earlier.folders[earlier.plan.donor][0]
        headers = {target.name: target.header for target in earlier.plan.targets}
        told = {**config_json(donor, str(donor)), **earlier.plan.config}
        return Model(ref, str(ref), Promised(headers, earlier.key), told), (earlier.out,)
    folder = found(ref.path, ref.revision, zoo)
    weights: Weights = Checkpoint(folder)
    folders: tuple[Path, ...] = (folder,)
    if ref.lora:
        from glue.kinds.adapter import LoraWeights

        folders = folder, found(ref.lora, ref.lora_revision, zoo)
        weights = LoraWeights(weights, folders[1])
    return _model(ref, folder, weights), folders


def _model(ref: ModelRef, folder: Path, weights: Weights) -> Model:
    return Model(ref, str(ref), weights, config_json(folder, str(folder)))


def found(path: str, revision: str, zoo: Zoo | None) -> Path:
    """The folder that a config means: one on this machine, a member of the zoo, or a repository of the hub."""
    folder = Path(path).expanduser()
    if folder.exists():
        return folder
    if zoo is not None and path in zoo and not revision:
        return zoo[path].folder
    if HUB.fullmatch(f"hub:{path}") and path.count("/") == 1 and not path.startswith("."):
        return whole(f"hub:{path}" + (f"@{revision}" if revision else ""))
    near = did_you_mean(path, _neighbours(folder)) if folder.parent.is_dir() else ""
    raise CheckpointError(f"there is no model '{path}'{near}",
                          fix="name a folder, a repository of the hub (owner/name), or a member of the zoo")


def _neighbours(folder: Path) -> list[str]:
    return [str(folder.with_name(other.name)) for other in folder.parent.iterdir() if other.is_dir()]
