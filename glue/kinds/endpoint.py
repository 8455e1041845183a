"""Kind "endpoint": a model that runs somewhere else, asked over HTTP as if it ran here.

The folder holds config.json, which says where and how to ask, and the tokenizer. The environment variable that has the
key stands there, and the key itself does not.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from shutil import rmtree
from typing import TYPE_CHECKING, Any, Literal, get_args

from glue.errors import GlueError, RunError, ZooError, did_you_mean, one_line
from glue.files import publish, write_aside
from glue.hub import locate
from glue.kinds import Dtype, Running, kinds, wire
from glue.kinds.device import device_of
from glue.kinds.far_source import Completions, ScoreHTTP, Words
from glue.kinds.frame import config_json, tokenizer_of
from glue.kinds.link import HttpLink, Traffic
from glue.kinds.source import Tells, Vocabulary, vocabulary
from glue.member import Member

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MODEL_TYPE = "glue_endpoint"
Protocol = Literal["glue", "openai"]
LIKELIEST = (20, 5, 1)  # how many tokens of a place other servers are asked for, until they tell
CHECKED, AT_ONCE = 256, 32  # tokens that tell whether another server has this tokenizer, in texts of so many
UNTOLD = 2049           # tokens that a model is taken to see where nobody says


@dataclass(frozen=True)
class Told:
    """What config.json of an endpoint says.

    url, key  as a link has them     model  as the server calls it     protocol  glue's /v1/score, or OpenAI's API
    vocabulary, vocab_size  of the tokenizer beside it
    max_position_embeddings  tokens of a text that the model sees
    tells, most  as a source has them
    words     of other servers than glue's: how they are asked
    serves    of glue's: the digest of the member that was served when it was connected
    """

    url: str
    model: str
    protocol: Protocol
    vocabulary: str
    vocab_size: int
    max_position_embeddings: int
    tells: Tells
    most: int
    key: str = ""
    words: Words = "echo"
    serves: str = ""

    @staticmethod
    def read(member: Member) -> Told:
        """What `connect` wrote. Raises ZooError for other folders."""
        folder = locate(member.path)
        told = config_json(folder, member.name)
        if told.get("model_type") != MODEL_TYPE:
            raise ZooError(f"{folder} is no endpoint", fix="make one with  glue zoo connect")
        words = {"protocol": get_args(Protocol), "tells": get_args(Tells), "words": get_args(Words)}
        found: Any = {name: told.get(name, getattr(Told, name, None)) for name in Told.__dataclass_fields__}
        for name, kind in Told.__annotations__.items():
            value = found[name]
            right = type(value) is int and value >= 0 if kind == "int" else isinstance(value, str)
            if not right or (name in words and value not in words[name]):
                raise ZooError(f"{folder}: config.json has {name}: {one_line(repr(value), 80)}",
                               fix="make it again with  glue zoo connect")
        return Told(**found)

    def source(self, link: HttpLink, tokenizer: PreTrainedTokenizerBase,
               bits: wire.Bits = 32) -> ScoreHTTP | Completions:
        """Who is asked. Raises ZooError where the tokenizer is not the one that it was connected with."""
        known = vocabulary(tokenizer)
        if (known.digest, known.size) != (self.vocabulary, self.vocab_size):
            raise ZooError(f"the tokenizer in the folder of {self.url} is not the one it was connected with",
                           fix="connect again with  glue zoo connect")
        if self.protocol == "glue":
            return ScoreHTTP(link, known, self.max_position_embeddings, self.tells, self.most, bits)
        return Completions(link, self.model, known, self.max_position_embeddings, self.most, self.words, tokenizer)


def register() -> None:
    """Teach transformers the type of these folders, which reads it before a tokenizer. Harmless when repeated."""
    from transformers import AutoConfig

    from glue.kinds.modelling.asked import GlueAskedConfig

    AutoConfig.register(MODEL_TYPE, GlueAskedConfig, exist_ok=True)


def asked(member: Member, *, bits: wire.Bits = 32, distance: float = 0.0, transport: Any = None,
          traffic: Traffic | None = None) -> ScoreHTTP | Completions:
    """The source behind an endpoint, once the server has said that it still serves the same. Raises GlueError.

    bits, distance, transport, traffic  see ScoreHTTP and HttpLink
    """
    register()
    told = Told.read(member)
    link = HttpLink(told.url, told.key, distance=distance, transport=transport, traffic=traffic or Traffic())
    source = told.source(link, tokenizer_of(member), bits)
    if told.protocol == "glue":
        now = _of_glue(_served(link, told.model), told.url)
        if (now["vocabulary"], now["digest"]) != (told.vocabulary, told.serves):
            raise ZooError(f"{told.url} serves another member as '{told.model}' than when '{member.name}' was "
                           "connected", fix="serve the same again, or connect under a new name with  glue zoo connect")
    return source


@kinds.add("endpoint")
def endpoint(member: Member, *, device: str = "cpu", dtype: Dtype = "float32") -> Running:
    """A model without weights that asks the server. It answers in fp32, whatever the server calculates in."""
    from transformers import GenerationConfig

    from glue.kinds.modelling.asked import GlueAskedConfig, GlueAskedForCausalLM

    source, tokenizer = asked(member), tokenizer_of(member)
    words = [f"{word}_token_id" for word in ("bos", "eos", "pad")]
    marks: dict[str, Any] = {word: getattr(tokenizer, word) for word in words}
    shape = {**marks, "vocab_size": source.vocabulary.size, "max_position_embeddings": source.longest}
    config = GlueAskedConfig(**shape)
    model: Any = GlueAskedForCausalLM(config, source)
    model.generation_config = GenerationConfig(**marks)
    return Running(member, model.eval().to(device_of(device)), tokenizer)


def connect(folder: Path, url: str, *, tokenizer: Member, model: str = "", protocol: Protocol = "glue", key: str = "",
            transport: Any = None) -> Told:
    """Make the folder of an endpoint, after the server has said what it serves and with which tokens.

    tokenizer  a member that has the tokenizer of what is served
    model      as the server calls it; "" where it serves only one
    protocol   glue: its vocabulary is compared by digest. openai: a few tokens are asked for, and must come back as
               the tokenizer writes them
    key        the environment variable that holds the API key
    Raises ZooError where the folder is there already, or the server serves something else; RunError where it fails.
    """
    if protocol not in get_args(Protocol):
        raise ZooError(f"there is no protocol '{one_line(protocol, 40)}'{did_you_mean(protocol, get_args(Protocol))}",
                       fix="glue: what  glue serve  serves; openai: any other server")
    if os.path.lexists(folder):
        raise ZooError(f"{folder} is there already", fix="take another name, or remove it first")
    link = HttpLink(url, key, transport=transport)
    words = tokenizer_of(tokenizer)
    known, entry = vocabulary(words), _served(link, model)
    told = _glue(link, entry, known, key) if protocol == "glue" else _openai(link, entry, known, key, words)
    draft = folder.with_name(f".{folder.name}.{os.getpid()}")
    draft.mkdir(parents=True)
    try:
        words.save_pretrained(draft)
        config = {"model_type": MODEL_TYPE, **vars(told)}
        write_aside(draft / "config.json", json.dumps(config, indent=2, sort_keys=True) + "\n")
        publish(draft, folder)
    except BaseException:
        rmtree(draft, ignore_errors=True)
        raise
    finally:
        link.close()
    return told


def _served(link: HttpLink, model: str) -> dict[str, Any]:
    """What the server says of a model. Raises ZooError with the names of those that it has."""
    entries = link.ask("GET", "/v1/models", limit=1 << 24).json.get("data")
    entries = entries if isinstance(entries, list) else []
    found = {one["id"]: one for one in entries if isinstance(one, dict) and isinstance(one.get("id"), str)}
    if not found:
        raise ZooError(f"{link.url} does not say what it serves", fix="see that /v1/models below its URL lists models")
    if model in found or (not model and len(found) == 1):
        return found[model] if model else next(iter(found.values()))
    known = [one_line(name, 80) for name in found]
    raise ZooError(f"{link.url} serves no '{model}'{did_you_mean(model, known)}" if model else
                   f"{link.url} serves {len(found)} models: {', '.join(known[:12])}", fix="name one with --model")


def _of_glue(entry: Mapping[str, Any], url: str) -> dict[str, Any]:
    """What a glue server says of its member. Raises ZooError where the server is none of glue's."""
    told = entry.get("glue")
    kinds_of = {"digest": str, "vocabulary": str, "vocab_size": int, "longest": int, "max_top_k": int}
    if not isinstance(told, dict) or not all(type(told.get(name)) is kind for name, kind in kinds_of.items()):
        raise ZooError(f"{url} is not served by glue, or cannot be scored", fix="connect to it with  --protocol openai")
    return told


def _glue(link: HttpLink, entry: Mapping[str, Any], known: Vocabulary, key: str) -> Told:
    told = _of_glue(entry, link.url)
    if (told["vocabulary"], told["vocab_size"]) != (known.digest, known.size):
        raise ZooError(f"{link.url} serves '{one_line(entry['id'], 80)}' with a vocabulary of {told['vocab_size']} "
                       f"tokens and the digest {one_line(told['vocabulary'][:8])}; this tokenizer has {known.size} and "
                       f"{known.digest[:8]}", fix="name the member whose tokenizer the served one has")
    full = not 0 < told["max_top_k"] < known.size
    return Told(link.url, entry["id"], "glue", known.digest, known.size, told["longest"], "full" if full else "top_k",
                known.size if full else told["max_top_k"], key, serves=told["digest"])


def _openai(link: HttpLink, entry: Mapping[str, Any], known: Vocabulary, key: str,
            tokenizer: PreTrainedTokenizerBase) -> Told:
    """Of another server: how it can be asked, once some tokens came back as this tokenizer writes them."""
    ours = entry.get("glue")  # what glue serves may be asked as others are
    seen = entry.get("max_model_len", ours.get("longest") if isinstance(ours, dict) else None)
    longest = seen if type(seen) is int and seen > 1 else min(tokenizer.model_max_length, UNTOLD)
    ids = _telling(tokenizer, known.size)
    pieces = [ids[k:k + AT_ONCE] for k in range(0, max(1, len(ids) - 1), AT_ONCE - 1)]  # no first token is written
    problem = GlueError("")
    ways: list[Words] = ["prompt_logprobs", "echo"]
    for words, most in ((words, most) for words in ways for most in LIKELIEST):
        source = Completions(link, entry["id"], known, longest - 1, most, words, tokenizer)
        try:
            source.texts(pieces[0])
        except RunError as refused:
            problem = refused
            continue
        for piece in pieces:
            _same(link.url, tokenizer, piece[1:], source.texts(piece))
        return Told(link.url, entry["id"], "openai", known.digest, known.size, longest - 1, "given", most, key, words)
    raise ZooError(f"{link.url} does not tell the log-probabilities of a prompt's tokens: {problem.what}",
                   fix="ask a server that has /v1/completions with echo and logprobs, or vLLM's prompt_logprobs")


def _same(url: str, tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], theirs: Sequence[str]) -> None:
    """Raise ZooError where a server writes tokens otherwise than the tokenizer; spaces around them do not count."""
    for token, text in zip(ids, theirs, strict=True):
        own = str(tokenizer.decode([token]))
        if own.strip() != text.strip():
            raise ZooError(f"{url} writes a token as {one_line(repr(text.strip()), 40)} that this tokenizer writes as "
                           f"{one_line(repr(own.strip()), 40)}",
                           fix="name the member whose tokenizer the served one has")


def _telling(tokenizer: PreTrainedTokenizerBase, v: int) -> list[int]:
    """Tokens from all over the vocabulary, each of which is some text by itself."""
    texts = ((token, str(tokenizer.decode([token]))) for token in range(v) if token not in tokenizer.all_special_ids)
    plain = [token for token, text in texts if text.strip() and "\ufffd" not in text]
    return plain[::max(1, len(plain) // CHECKED)][:CHECKED]
