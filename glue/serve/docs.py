"""How the server's OpenAPI schema tells of answers."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel


class Told(BaseModel):
    """What is wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(BaseModel):
    """Every answer that is an error."""

    error: Told


ERRORS: dict[int | str, dict[str, Any]] = {status: {"model": ErrorAnswer, "description": what} for status, what in {
    400: "the request cannot be understood or done", 401: "no key, or a wrong one", 404: "not here",
    408: "the body did not come", 409: "the session is not held", 413: "the body is too large",
    429: "too many requests wait", 500: "the member failed", 503: "the server stops", 504: "it took too long"}.items()}
OBJECT = {"schema": {"type": "object"}}
STREAM: dict[int | str, dict[str, Any]] = {
    200: {"description": "the answer; pieces of it, where `stream` was asked for",
          "content": {"application/json": OBJECT, "text/event-stream": {"schema": {"type": "string"}}}}}
BYTES: dict[int | str, dict[str, Any]] = {
    200: {"description": "what follows at each place",
          "content": {"application/json": OBJECT,
                      "application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}}}
