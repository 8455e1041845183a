"""Tokens become text one by one, without half characters, and the text ends where a stop says so."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

HALF = "�"  # what the bytes of half a character are shown as
MOST_BYTES = 8  # tokens that end no character before they are shown as they are: they never will
BACK = 6  # tokens before the new ones that are read with them: what a token is shown as may depend on its neighbours


def shown(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], special: bool = False) -> str:
    """Tokens as text, as they are."""
    return str(tokenizer.decode(list(ids), skip_special_tokens=not special, clean_up_tokenization_spaces=False))


class Written:
    """The text that tokens add to what stands before them.

    text    all that is settled; it never changes any more, it only grows
    pieces  of each token what it added; a token that ends no character adds nothing, the one that ends it all of it
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, before: Sequence[int] = ()):
        self._tokenizer = tokenizer
        self._ids = list(before[-BACK:])
        self._told, self._known = len(self._ids), ""  # so many of them are in the text; what they are shown as
        if self._ids:
            self._known = shown(tokenizer, self._ids)
        self.text = ""
        self.pieces: list[str] = []

    def add(self, token: int) -> str:
        """One more token -> what the text grew by."""
        self._ids.append(token)
        new = shown(self._tokenizer, self._ids)
        if new.endswith(HALF) and len(self._ids) - self._told <= MOST_BYTES:
            self.pieces.append("")
            return ""
        self.pieces.append(self._settled(new))
        return self.pieces[-1]

    def finish(self) -> str:
        """What is left when nothing comes any more: half a character, shown as such."""
        if self._told == len(self._ids) or not self.pieces:
            return ""
        grown = self._settled(shown(self._tokenizer, self._ids))
        self.pieces[-1] += grown
        return grown

    def _settled(self, new: str) -> str:
        grown, self._known = new[len(self._known):], new
        if len(self._ids) > 3 * BACK:
            self._ids = self._ids[-BACK:]
            self._known = shown(self._tokenizer, self._ids)
        self._told = len(self._ids)
        self.text += grown
        return grown


def cut(text: str, stops: Sequence[str], before: int) -> int | None:
    """Where the first stop begins in a text of which `before` characters held none; None where there is none."""
    found = [place for stop in stops if (place := text.find(stop, max(0, before - len(stop) + 1))) >= 0]
    return min(found, default=None)


def safe(text: str, stops: Sequence[str]) -> int:
    """How many characters of a text may be told already: its end may be the beginning of a stop."""
    return next((place for place in range(max(0, len(text) - max(map(len, stops), default=0)), len(text))
                 if any(stop.startswith(text[place:]) for stop in stops)), len(text))
