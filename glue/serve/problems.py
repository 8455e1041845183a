"""What can be wrong with a request, in the form that OpenAI's clients understand."""

from __future__ import annotations

from typing import Any

from glue.errors import one_line

TYPES = {400: "invalid_request_error", 401: "authentication_error", 404: "not_found_error",
         405: "invalid_request_error", 408: "timeout_error", 409: "session_lost", 413: "invalid_request_error",
         429: "overloaded_error", 499: "cancelled", 500: "server_error", 503: "shutting_down", 504: "timeout_error"}


class Problem(Exception):
    """An answer that is an error: its HTTP status, what is wrong and how to put it right, and the field it is about."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    @property
    def body(self) -> dict[str, Any]:
        """The JSON of the answer."""
        return {"error": {"message": one_line(str(self)), "type": TYPES.get(self.status, "server_error"),
                          "param": self.param, "code": self.code}}
