"""What came of a request, in the form of OpenAI's answers."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from typing import Any

from glue.serve.prompts import Prompt
from glue.serve.rows import News, Row, Told
from glue.serve.written import Written, shown


def head(kind: str, prefix: str, model: str) -> dict[str, Any]:
    """What every answer, and every piece of a stream, begins with."""
    return {"id": f"{prefix}-{secrets.token_hex(12)}", "object": kind, "created": int(time.time()), "model": model}


def usage(rows: Sequence[Row], copies: int) -> dict[str, int]:
    """Tokens read, each prompt once whatever the number of its copies, and written."""
    read, written = sum(len(row.ids) for row in rows[::copies]), sum(len(row.tokens) for row in rows)
    return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}


def route(rows: Sequence[Row], copies: int, several: bool) -> dict[str, Any]:
    """The field that tells of mixtures who answered: for each prompt, where several were given; {} for all others."""
    routes = [row.route for row in rows[::copies]]
    if all(each is None for each in routes):
        return {}
    return {"glue": {"route": routes if several else routes[0]}}


class Logs:
    """The log-probabilities of a completion in the form of /v1/completions.

    Offsets are places in the text that is answered, the prompt included where it is echoed.
    """

    def __init__(self, row: Row, prompt: Prompt, echo: bool):
        self._row, self._top = row, row.top or 0
        self._prompt, self._echo = prompt, echo
        self._offset = 0
        self._before: list[tuple[Told, str, int]] = []

    def begin(self) -> str:
        """When the prompt has been read: what is echoed of it."""
        if not self._echo:
            return ""
        pieces, starts, text = _laid_out(self._row, self._prompt)
        self._before = list(zip(self._row.prompt_told, pieces, starts, strict=True)) if self._row.judged else []
        self._offset = len(text)
        return text

    def told(self, news: News) -> dict[str, Any] | None:
        """Of written tokens, the first time those of the prompt before them; None if not asked for."""
        if self._row.top is None:
            return None
        places, self._before = self._before, []
        for told, piece in zip(news.told, news.pieces, strict=True):
            places.append((told, piece or self._name(told.token), self._offset))
            self._offset += len(piece)
        return {"tokens": [piece for _, piece, _ in places], "token_logprobs": [told.log for told, _, _ in places],
                "top_logprobs": [self._likeliest(told, piece) if told.log is not None else None
                                 for told, piece, _ in places],
                "text_offset": [offset for _, _, offset in places]}

    def _likeliest(self, told: Told, own: str) -> dict[str, float]:
        """Text -> log-probability of the likeliest, and of the token itself. Tokens of one text are told apart."""
        assert told.log is not None
        best = {}
        for token, log in told.top[:self._top]:
            name = own if token == told.token else self._name(token)
            best[name if name not in best else f"{name}<{token}>"] = log
        if all(token != told.token for token, _ in told.top):
            best[own if own not in best else f"{own}<{told.token}>"] = told.log
        return best

    def _name(self, token: int) -> str:
        return shown(self._row.running.tokenizer, [token], special=True)


def _laid_out(row: Row, prompt: Prompt) -> tuple[list[str], list[int], str]:
    """Of a prompt's tokens the text of each, where it begins, and the whole text."""
    tokenizer = row.running.tokenizer
    if prompt.text and len(prompt.starts) == len(prompt.ids):
        starts = list(prompt.starts)
        ends = [*starts[1:], len(prompt.text)]
        pieces = [prompt.text[start:end] or shown(tokenizer, [token], special=True)
                  for token, start, end in zip(prompt.ids, starts, ends, strict=True)]
        return pieces, starts, prompt.text
    written = Written(tokenizer)
    starts = []
    for token in prompt.ids:
        starts.append(len(written.text))
        written.add(token)
    written.finish()
    pieces = [piece or shown(tokenizer, [token], special=True)
              for token, piece in zip(prompt.ids, written.pieces, strict=True)]
    return pieces, starts, written.text


def chat_logs(news: News, top: int) -> dict[str, Any] | None:
    """Of written tokens, in the form of /v1/chat/completions; None if not asked for."""
    row = news.row
    if row.top is None:
        return None

    def one(token: int, log: float) -> dict[str, Any]:
        text = shown(row.running.tokenizer, [token], special=True)
        return {"token": text, "logprob": log, "bytes": list(text.encode(errors="replace"))}

    return {"content": [{**one(told.token, told.log or 0.0),
                         "top_logprobs": [one(token, log) for token, log in told.top[:top]]}
                        for told in news.told], "refusal": None}
