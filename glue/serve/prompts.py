"""What a request says, as tokens that the member can read; what it cannot read is refused here."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

from glue.kinds import Running
from glue.kinds.source import vocabulary
from glue.kinds.text import longest
from glue.serve.problems import Problem
from glue.serve.schema import Message

PLAIN = ("{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
         "{% if add_generation_prompt %}assistant:{% endif %}")


@dataclass(frozen=True)
class Prompt:
    """A text in tokens.

    text    as it was given, "" where tokens were given
    starts  where in the text each token begins; () where that is not known
    """

    ids: list[int]
    text: str = ""
    starts: tuple[int, ...] = ()


class Prompts:
    """How one running member reads. For one thread at a time.

    known    tokens that it can read and write
    longest  tokens of a text that it can see
    ends     tokens after which it writes nothing
    """

    def __init__(self, running: Running, template: str | None = None):
        self.running = running
        # a copy: a tokenizer that is asked by two threads at once fails, and the engine writes with the other
        self._tokenizer: Any = deepcopy(running.tokenizer)
        self._template = template
        self.vocabulary = vocabulary(running.tokenizer)
        config: Any = running.model.config.get_text_config()
        self.known = min(self.vocabulary.size, getattr(config, "vocab_size", None) or self.vocabulary.size)
        self.longest = longest(running.model, running.tokenizer)
        told = getattr(running.model.generation_config, "eos_token_id", None)
        ends = [told] if isinstance(told, int) else list(told or ())
        self.ends = frozenset({*ends, running.tokenizer.eos_token_id} - {None})

    def read(self, prompt: str | list[int], param: str = "prompt") -> Prompt:
        """A prompt in tokens, special ones where the tokenizer wants them; one of nothing is the start of text."""
        if not isinstance(prompt, str):
            return Prompt(self._checked(prompt, param))
        if len(prompt) > 100 * self.longest:  # it cannot fit, and to find out exactly takes long
            raise self._too_long(f"{len(prompt)} characters", param)
        fast = bool(getattr(self._tokenizer, "is_fast", False))
        told = self._tokenizer(prompt, return_offsets_mapping=fast, verbose=False)
        ids: list[int] = list(told["input_ids"])
        starts = tuple(start for start, _ in told["offset_mapping"]) if fast else ()
        if not ids:
            start = next((token for token in (self._tokenizer.bos_token_id, self._tokenizer.eos_token_id)
                          if token is not None), None)
            if start is None:
                raise Problem(400, "the prompt has no tokens, and the tokenizer has none for the start of text",
                              param=param)
            ids, starts = [start], (0,)
        return Prompt(self._checked(ids, param), prompt, starts)

    def chat(self, messages: Sequence[Message]) -> Prompt:
        """A chat in tokens, by the chat template, ready for the answer."""
        template = self._template or self._tokenizer.chat_template
        if template is None:
            raise Problem(400, f"'{self.running.member.name}' has no chat template; ask /v1/completions, or start the "
                               "server with --chat-template FILE, or --chat-template plain", param="messages",
                          code="no_chat_template")
        told = [{"role": message.role, "content": message.text,
                 **({"name": message.name} if message.name is not None else {})} for message in messages]
        try:
            text = self._tokenizer.apply_chat_template(told, chat_template=template, tokenize=False,
                                                       add_generation_prompt=True)
        except Exception as error:  # templates raise what they like
            raise Problem(400, f"the chat template does not take these messages: {error}", param="messages") from None
        if len(text) > 100 * self.longest:
            raise self._too_long(f"{len(text)} characters", "messages")
        ids = self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return Prompt(self._checked(list(ids), "messages"), text)

    def room(self, prompt: Prompt, wanted: int | None, param: str = "max_tokens") -> int:
        """Tokens that may be written: the last need not be read, so one more than fits. Raises Problem 400."""
        room = self.longest - len(prompt.ids) + 1
        if wanted is not None and wanted > room:
            raise Problem(400, f"'{self.running.member.name}' sees {self.longest} tokens; the prompt has "
                               f"{len(prompt.ids)} and {wanted} are to be written, {room} at most", param=param,
                          code="context_length_exceeded")
        return room if wanted is None else wanted

    def _checked(self, ids: list[int], param: str) -> list[int]:
        if len(ids) > self.longest:
            raise self._too_long(f"{len(ids)} tokens", param)
        if not ids or max(ids) >= self.known:
            raise Problem(400, f"token {max(ids, default=None)} is none: '{self.running.member.name}' knows those from "
                               f"0 to {self.known - 1}", param=param)
        return ids

    def _too_long(self, size: str, param: str) -> Problem:
        return Problem(400, f"'{self.running.member.name}' sees {self.longest} tokens; {size} are given", param=param,
                       code="context_length_exceeded")
