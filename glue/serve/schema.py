"""What a request may say: the fields of OpenAI's API that a member understands, and those of /v1/score.

Types are strict and unknown fields are refused: a setting that is passed over would make another text than was asked
for. Of settings that are not built only the value that changes nothing is taken.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from glue.serve.sessions import NAME

ROWS = 512  # texts that one request may ask for
MOST = 2 ** 31 - 1


def _whole(text: str) -> str:
    """JSON can say halves of characters, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("half a surrogate pair is no text") from None
    return text


Text = Annotated[str, AfterValidator(_whole)]
Token = Annotated[int, Field(ge=0, le=MOST)]
Ids = Annotated[list[Token], Field(fail_fast=True, min_length=1)]  # the first bad token is told, not a million of them
Extra = Annotated[list[Token], Field(fail_fast=True, max_length=2 ** 16)]
Stop = Annotated[Text, Field(min_length=1, max_length=500)]
Stops = Stop | Annotated[list[Stop], Field(fail_fast=True, max_length=32)] | None
Temperature = Annotated[float, Field(ge=0, le=100)]
TopP = Annotated[float, Field(gt=0, le=1)]
Seed = Annotated[int, Field(ge=-2 ** 63, lt=2 ** 64)]
Tokens = Annotated[int, Field(ge=0, le=MOST)]
Copies = Annotated[int, Field(ge=1, le=128)]
Nothing = Annotated[dict[str, Any], Field(max_length=0)]


class Strict(BaseModel):
    """No unknown fields, no numbers that are strings, nothing that is not finite."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class StreamOptions(Strict):
    """What a stream tells beside the text."""

    include_usage: bool = False


class Writing(Strict):
    """How text is written; the same for completions and chats."""

    model: str = Field(max_length=500, description="as /v1/models calls it")
    temperature: Temperature | None = 1.0
    top_p: TopP | None = 1.0
    n: Copies | None = 1
    seed: Seed | None = None
    stop: Stops = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    user: Annotated[str, Field(max_length=500)] | None = None
    presence_penalty: Literal[0] | None = Field(0, description="not built: 0 only")
    frequency_penalty: Literal[0] | None = Field(0, description="not built: 0 only")
    logit_bias: Nothing | None = Field(None, description="not built: empty only")

    @property
    def stops(self) -> tuple[str, ...]:
        """The texts that end an answer."""
        return () if self.stop is None else (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def usage_at_end(self) -> bool:
        """Whether a stream ends with a chunk that counts tokens."""
        return self.stream_options is not None and self.stream_options.include_usage


class Completion(Writing):
    """POST /v1/completions"""

    prompt: (Text | Annotated[list[Text], Field(fail_fast=True, min_length=1, max_length=ROWS)] | Ids |
             Annotated[list[Ids], Field(fail_fast=True, min_length=1, max_length=ROWS)])
    max_tokens: Tokens | None = 16
    echo: bool | None = False
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    best_of: Copies | None = Field(None, description="not built: no other than n")
    suffix: Literal[""] | None = Field(None, description="not built: empty only")


class Part(Strict):
    """A piece of a message."""

    type: Literal["text"]
    text: Text


class Message(Strict):
    """One turn of a chat."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | Annotated[list[Part], Field(fail_fast=True)]
    name: Annotated[Text, Field(max_length=500)] | None = None

    @property
    def text(self) -> str:
        """What is said."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class Chat(Writing):
    """POST /v1/chat/completions"""

    messages: Annotated[list[Message], Field(fail_fast=True, min_length=1, max_length=10_000)]
    max_tokens: Annotated[int, Field(ge=1, le=MOST)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, le=MOST)] | None = None
    logprobs: bool | None = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None


class ScoreRequest(Strict):
    """POST /v1/score

    What follows after the texts ids[:from_pos], ids[:from_pos + 1], ..., ids: p = len(ids) - from_pos + 1 places, where
    ids stands for the first `keep` tokens of the session and those given here.
    """

    ids: Annotated[list[Token], Field(fail_fast=True)] = Field(max_length=2 ** 20)
    from_pos: Annotated[int, Field(ge=1, le=MOST)]
    top_k: Annotated[int, Field(ge=0, le=MOST)] | None = None
    extra_ids: Annotated[list[Extra], Field(fail_fast=True)] = []
    session: Annotated[str, Field(min_length=1, max_length=100, pattern=NAME)] | None = None
    keep: Annotated[int, Field(ge=0, le=MOST)] = 0
    bits: Literal[32, 16, 8] = 32
