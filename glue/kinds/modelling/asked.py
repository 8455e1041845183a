"""A causal language model without weights: its forward asks a source, row by row.

What it gives as logits are log-probabilities. Of a source that tells only the likeliest tokens, those that it does not
tell get equal parts of what is left, and never more than the least of the likeliest: an approximation, but none for the
tokens that are told and for those of the text itself, which are always asked for.

A source that tells only what follows in a text cannot be asked for any other token, as those who judge answers must. It
can still write: where one place only is wanted, its likeliest tokens are taken, unless it is not known which they are.

Letters: b batch, s sequence, v vocabulary, p places.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from itertools import repeat
from threading import Lock
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

from glue.errors import RunError, ZooError
from glue.kinds.local_source import common
from glue.kinds.source import Scored, Session, Source

OPEN = 64  # texts that are kept open at the source
AT_ONCE = 8  # rows of a batch that are asked at the same time: most of it is waiting


class GlueAskedConfig(PretrainedConfig):
    """The shape of what is asked: no more of it is known than its vocabulary, and how much of a text it sees."""

    model_type = "glue_endpoint"


class AskedCache(Cache):
    """The texts so far, padding included; what is made of them stays with the source.

    ids  [b, s]     real [b, s], False where padding stands
    """

    def __init__(self, ids: Tensor, real: Tensor):
        super().__init__(layers=[])
        self.ids, self.real = ids, real

    def extended(self, ids: Tensor, real: Tensor) -> None:
        """More of each text."""
        self.ids, self.real = torch.cat([self.ids, ids], dim=1), torch.cat([self.real, real], dim=1)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens read so far, padding included."""
        return self.ids.shape[1]

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1, which is no limit."""
        return -1

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows, in this order; a row may be kept more than once."""
        rows = indices.to(self.ids.device)
        self.ids, self.real = self.ids[rows], self.real[rows]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes what row beam_idx[i] was; beam search asks for this."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row several times, one after the other."""
        self.ids, self.real = (rows.repeat_interleave(repeats, dim=0) for rows in (self.ids, self.real))

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens; their number is given negative, as transformers does."""
        left = self.ids.shape[1] - abs(tokens_to_remove)
        self.ids, self.real = self.ids[:, :left], self.real[:, :left]

    def reset(self) -> None:
        """Forget all tokens."""
        self.ids, self.real = self.ids[:, :0], self.real[:, :0]

    @property
    def batch_size(self) -> int:
        """Rows."""
        return len(self.ids)

    @property
    def is_croppable(self) -> bool:
        """Whether `crop` leaves no trace."""
        return True


class Opened:
    """The texts that are open at a source, each with what was last asked of it; the first is the one longest unused."""

    def __init__(self, source: Source):
        self._source, self._lock = source, Lock()
        self._texts: list[tuple[list[int], Session, ExitStack]] = []

    def score(self, ids: list[int], start: int, **asked: Any) -> Scored:
        """Ask the text that has the most in common with this one, or a new one where that is not even half of it."""
        with self._lock:  # but not while a source is asked: others may be meanwhile
            best = max(self._texts, key=lambda text: common(text[0], ids), default=None)
            found = best if best is not None and 2 * common(best[0], ids) > len(best[0]) else None
            if found is not None:
                self._texts.remove(found)
        stack = ExitStack() if found is None else found[2]
        session = stack.enter_context(self._source.open()) if found is None else found[1]
        try:
            scored = session.score(ids, start, **asked)
        except BaseException:
            stack.close()
            raise
        with self._lock:
            self._texts.append((ids, session, stack))
            surplus = self._texts.pop(0) if len(self._texts) > OPEN else None
        if surplus is not None:
            surplus[2].close()
        return scored

    def close(self) -> None:
        """Give every text back."""
        with self._lock:
            while self._texts:
                self._texts.pop()[2].close()


class GlueAskedForCausalLM(PreTrainedModel, GenerationMixin):
    """Whatever a source tells, as a model; see the top of the file."""

    config_class = GlueAskedConfig

    def __init__(self, config: GlueAskedConfig, source: Source):
        super().__init__(config)
        self.source, self.opened = source, Opened(source)
        self.nothing = nn.Parameter(torch.zeros(0), requires_grad=False)  # tells device and type, and has no numbers
        self.post_init()

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # forward makes an AskedCache

    def forward(self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None,
                past_key_values: AskedCache | None = None, use_cache: bool | None = None,
                logits_to_keep: int | Tensor = 0, labels: Tensor | None = None, **kwargs) -> CausalLMOutputWithPast:
        """Log-probabilities [b, p, v] after each token of [b, s], or after those of logits_to_keep; 0 after padding."""
        if input_ids is None:
            raise ValueError("give input_ids: what is asked takes nothing else")
        if past_key_values is not None and not isinstance(past_key_values, AskedCache):
            raise ValueError(f"an endpoint keeps an AskedCache, this is a {type(past_key_values).__name__}; leave "
                             "past_key_values out and one is made")
        real = torch.ones_like(input_ids, dtype=torch.bool)
        if attention_mask is not None:
            real = attention_mask[:, -input_ids.shape[1]:].bool()
        before = AskedCache(input_ids[:, :0], real[:, :0]) if past_key_values is None else past_key_values
        read = [row[mask].tolist() for row, mask in zip(before.ids, before.real, strict=True)]
        places = torch.arange(input_ids.shape[1])
        places = places[logits_to_keep.cpu() if isinstance(logits_to_keep, Tensor) else slice(-logits_to_keep, None)]
        with ThreadPoolExecutor(AT_ONCE) as pool:
            logits = list(pool.map(self._row, read, input_ids.tolist(), real.tolist(), repeat(places.tolist())))
        if use_cache:
            before.extended(input_ids, real)
        out = torch.stack(logits).to(input_ids.device)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=out, labels=labels, vocab_size=self.config.vocab_size)
        return CausalLMOutputWithPast(loss=loss, logits=out, past_key_values=before if use_cache else None)

    def _row(self, text: list[int], ids: list[int], real: list[bool], places: list[int]) -> Tensor:
        """The logits of one row at these positions of its new ids; `text` is what was there before. [p, v]"""
        lengths = []  # how much of the whole text stands before what each position tells
        whole = list(text)
        for token, counts in zip(ids, real, strict=True):
            whole += [token] if counts else []
            lengths.append(len(whole) if counts else 0)
        wanted = [lengths[place] for place in places]
        size = self.source.vocabulary.size
        if not any(wanted):
            return torch.zeros(len(places), size)
        start, end = min(length for length in wanted if length), max(wanted)
        logs = self._told(whole[:end], start)
        at = torch.tensor([length - start for length in wanted])
        return torch.where((at >= 0)[:, None], logs[at.clamp(min=0)], 0.0)

    def _told(self, ids: list[int], start: int) -> Tensor:
        """Log-probabilities of all tokens after ids[:start], ..., ids. [p, v]"""
        source = self.source
        if source.tells == "full":
            return self.opened.score(ids, start).logs
        if source.tells == "given" and (start < len(ids) or not source.most):
            raise ZooError("this server tells no probabilities of tokens that are asked for, only of a text's own",
                           fix="answers cannot be judged by it; ask a server that has glue's /v1/score")
        following = [[token] for token in ids[start:]] + [[]]  # the text's own tokens are told whatever they are
        extra = following if source.tells == "top_k" else ()
        scored = self.opened.score(ids, start, top_k=source.most, extra=extra)
        if bool((torch.minimum(scored.floor, scored.tail).log() > scored.logs.amax(1)).any()):
            raise RunError("what most likely comes next has a text that several tokens have, and the server tells no "
                           "more of it", fix="ask a server that has glue's /v1/score, or vLLM's prompt_logprobs")
        return spread(scored, source.vocabulary.size)


def spread(scored: Scored, v: int) -> Tensor:
    """All tokens' log-probabilities [p, v]; those not told get equal parts of the tail, each at most the floor."""
    if scored.tokens is None:
        return scored.logs
    told = scored.tokens >= 0
    each = torch.minimum(scored.tail / (v - told.sum(1)).clamp(min=1), scored.floor).log()
    wide = each[:, None].expand(-1, v + 1).to(scored.logs.dtype)  # with a column for what stands for no token
    return wide.scatter(1, torch.where(told, scored.tokens, v), scored.logs)[:, :v]
