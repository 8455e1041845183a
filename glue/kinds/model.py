"""Kind "model": an ordinary Hugging Face folder of a causal language model."""

from __future__ import annotations

import re
from collections.abc import Collection, Hashable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from glue.checkpoint import Checkpoint, Header
from glue.errors import CheckpointError, MethodError
from glue.hub import locate
from glue.kinds import QUANTISED, Dtype, Running, kinds
from glue.kinds.device import as_torch, device_of, loading, settled
from glue.kinds.frame import config_json, config_of, first_line, generation_of, tokenizer_of
from glue.member import Member
from glue.snapshot import whole

if TYPE_CHECKING:
    from transformers import PreTrainedModel


HEADS = ("lm_head", "embed_out")  # what the layer is called that writes, by itself in the files or not
EMBEDDINGS = ("model.embed_tokens.weight", "transformer.wte.weight", "gpt_neox.embed_in.weight")


def model_weights(member: Member) -> Checkpoint:
    """The tensors in a member's folder. A head that is the embedding, and lies beside it all the same, is none."""
    found = Checkpoint(whole(member.path))
    head, embedding = (next((name for name in names if name in found.headers), "")
                       for names in ((f"{head}.weight" for head in HEADS), EMBEDDINGS))
    # merged as two tensors, each with random numbers of its own, they would part
    if head and embedding and found.headers[head].shape == found.headers[embedding].shape and _tied(member) \
            and torch.equal(found[head], found[embedding]):
        del found.headers[head]
    return found


def _tied(member: Member) -> bool:
    """Whether the configuration says that embedding and head are one; where it is silent, its architecture does."""
    folder = locate(member.path)
    if not (folder / "config.json").is_file():
        return False
    told = config_json(folder, member.name).get("tie_word_embeddings")
    return bool(config_of(member).tie_word_embeddings if told is None else told)


@kinds.add("model", weights=model_weights)
def model(member: Member, *, device: str = "cpu", dtype: Dtype = "float32") -> Running:
    """A causal language model with its tokenizer, in evaluation mode, padding on the left."""
    return _ending(Running(member, model_of(member, device, dtype), tokenizer_of(member)))


def _ending(running: Running) -> Running:
    """The same, with the end of text of its tokenizer where its generation settings name none: else it never ends."""
    settings = running.model.generation_config
    if settings is not None and settings.eos_token_id is None:
        settings.eos_token_id = running.tokenizer.eos_token_id
    return running


def model_of(member: Member, device: str, dtype: Dtype) -> PreTrainedModel:
    """The model in a member's folder, where and as the words say.

    Raises CheckpointError where the files do not fill it exactly, MethodError where it fits nowhere.
    """
    folder = whole(member.path)
    config_of(member)  # first, for its plainer errors
    how = loading(device, dtype, Checkpoint(folder).headers)
    loaded: Any = _filled(folder, f"'{member.name}' in {folder}", use_safetensors=True, **how)
    if loaded.device.type == "meta":
        raise MethodError(f"'{member.name}' is so large that not even its embeddings fit on {device_of(device)}",
                          fix="take a larger device, a smaller dtype, or device: cpu")
    return loaded


def assembled(frame: Member, tensors: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]], *, device: str = "cpu",
              dtype: Dtype = "float32") -> Running:
    """A model of these tensors with the configuration and the tokenizer of `frame`, without any file.

    It is put together in fp32 on the processor and then goes where and becomes what the words say; auto is fp32.
    Raises MethodError for quantised weights, which come from files.
    """
    if dtype in QUANTISED:
        raise MethodError(f"'{frame.name}' is put together in memory, and {dtype} is for weights in files",
                          fix="say dtype: bfloat16, or write it as a model first and ask that")
    config = config_of(frame)
    # cloned: transformers may keep a tensor as it is, and a view of a file does not survive that file
    loaded = _filled(None, f"the tensors for '{frame.name}'", config=config, dtype=torch.float32,
                     state_dict={name: tensor.clone() for name, tensor in dict(tensors).items()})
    loaded.generation_config = generation_of(frame)
    if dtype not in ("auto", "float32"):
        loaded = loaded.to(as_torch(dtype))  # type: ignore[arg-type]
    return _ending(Running(frame, settled(loaded, device), tokenizer_of(frame)))


class Streamed(Protocol):
    """Tensors that are made when they are asked for: whole, or as flat pieces, each valid until the next."""

    @property
    def headers(self) -> Mapping[str, Header]: ...
    def tensor(self, name: str) -> Tensor: ...
    def stream(self, name: str) -> Iterator[Tensor]: ...


class Skeleton:
    """A model that is built once and then takes other weights in place, without any file.

    All frames that it is filled for have one configuration.
    device, dtype  as of `assembled`
    """

    def __init__(self, device: str = "cpu", dtype: Dtype = "float32") -> None:
        self._device, self._dtype = device, dtype
        self._running: Running | None = None
        self._places: dict[str, Tensor] = {}
        self._held: dict[str, Hashable] = {}  # place -> what is there

    def filled(self, frame: Member, tensors: Streamed, marks: Mapping[str, Hashable]) -> Running:
        """The model of these tensors, with the tokenizer and the generation settings of `frame`; as `assembled`.

        marks  tensor -> what tells its numbers from any others; those that are there already are not put there again
        """
        if self._running is None or not self._takes(tensors.headers):
            self._running = assembled(frame, ((name, tensors.tensor(name)) for name in tensors.headers),
                                      device=self._device, dtype=self._dtype)
            self._places, self._held = _places(self._running.model, tensors.headers), dict(marks)
            return self._running
        for name, place in self._places.items():
            if self._held.get(name) != marks[name]:
                self._held.pop(name, None)  # half of a tensor is none
                done = 0
                for piece in tensors.stream(name):
                    place[done:done + len(piece)].copy_(piece)
                    done += len(piece)
                assert done == len(place), f"'{name}' has {len(place)} numbers, {done} came"
                self._held[name] = marks[name]
        if self._running.member != frame:
            self._running = Running(frame, self._running.model, tokenizer_of(frame))
            self._running.model.generation_config = generation_of(frame)
        return _ending(self._running)

    def _takes(self, headers: Mapping[str, Header]) -> bool:
        return bool(self._places) and all(name in headers and headers[name].numel == len(place)
                                          for name, place in self._places.items())


def _places(model: PreTrainedModel, names: Collection[str]) -> dict[str, Tensor]:
    """Where in the model each tensor lies, flat; nothing where files and model call them by other names.

    Of tensors that share a place, such as an embedding and a tied head, the files must hold one.
    """
    state = model.state_dict()
    together: dict[int, list[str]] = {}
    for name, tensor in state.items():
        if tensor.numel():
            together.setdefault(tensor.data_ptr(), []).append(name)
    held = [[name for name in some if name in names] for some in together.values()]
    return {some[0]: state[some[0]].view(-1) for some in held} if all(len(some) == 1 for some in held) else {}


def _filled(source: Any, told_as: str, **how: Any) -> PreTrainedModel:
    """A model in evaluation mode, every tensor of which came from the source."""
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    try:
        if source is None:  # the auto class wants files
            kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(how["config"])]
        else:
            kind, how = AutoModelForCausalLM, {**how, "trust_remote_code": False, "local_files_only": True}
        loaded, found = kind.from_pretrained(source, output_loading_info=True, **how)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        if "quantization_config" in how and "dispatched on the CPU" in str(error):  # it may not wait there
            raise MethodError(f"{told_as}: it does not fit on the GPUs, layer by layer",
                              fix="take more of them, or device: cpu") from None
        raise CheckpointError(f"{told_as}: {first_line(error)}",
                              fix="a model needs config.json and safetensors weights of the shapes it says") from None
    for what in ("missing", "mismatched"):
        if names := sorted(map(str, found[f"{what}_keys"])):
            # transformers would go on with random numbers in these places
            if what == "missing" and (once := _once(names, set(loaded.state_dict()) - set(names))):
                raise CheckpointError(f"{told_as}: '{once}' stands there once for several layers, as where all share "
                                      f"one MLP, and no architecture that is known here does so",
                                      fix="write a copy of it for each layer: the numbers stay the same")
            raise CheckpointError(f"{told_as}: {len(names)} tensors that its configuration asks for are {what}, "
                                  f"e.g. {names[0]}", fix="download or write the weights again")
    return loaded.eval()


def _once(missing: Collection[str], there: Collection[str]) -> str:
    """The first tensor of a module that one layer has, where that module is all that every other layer lacks; or ""."""
    def parts(name: str) -> tuple[str, str]:  # (layer, module in it): model.layers.0.mlp.up_proj.weight -> (0, mlp)
        found = re.search(r"\.(\d+)\.(.+?)\.", name)
        return (found[1], found[2]) if found else ("", "")

    lacking = {module for _, module in map(parts, missing)}
    having = {layer for layer, module in map(parts, there) if module in lacking}
    layers = {layer for layer, module in map(parts, there) if layer and module not in lacking}
    once = len(having) == 1 and {layer for layer, _ in map(parts, missing)} == layers - having
    return min(name for name in there if parts(name)[1] in lacking) if once else ""
