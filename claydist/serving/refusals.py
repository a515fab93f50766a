"""Refusal: an answer other than 200, with what the caller may know of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from claydist.errors import ClaydistError


class Refusal(Exception):
    """An error that is the caller's to see.

    Parameters
    ----------
    status : of HTTP.
    message : what was expected, what was found, what to do.
    kind : a word that programs can branch on; by the status where not given.
    field : the part of the request that is wrong, e.g. `rows[3].carrier`.
    problems : each single problem, when there are several.
    headers : further headers of the answer, such as Retry-After.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "",
        field: str = "",
        problems: Sequence[str] = (),
        headers: Sequence[tuple[bytes, bytes]] = (),
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.kind = kind or _KINDS.get(status, "refused")
        self.field = field
        self.problems = tuple(problems)
        self.headers = tuple(headers)

    def to_json(self) -> dict[str, Any]:
        """The body of the answer, but for the Open Inference Protocol, which has a text alone."""
        error: dict[str, Any] = {"kind": self.kind, "message": self.message}
        if self.field:
            error["field"] = self.field
        if self.problems:
            error["problems"] = list(self.problems)
        return {"error": error}

    @property
    def text(self) -> str:
        """All of it in one line, for the Open Inference Protocol."""
        return "; ".join([self.message, *self.problems])


_KINDS = {
    400: "bad_request", 401: "unauthorized", 404: "not_found", 405: "method_not_allowed", 408: "timeout",
    409: "conflict", 413: "too_large", 422: "unprocessable", 429: "rate_limited", 500: "internal", 503: "overloaded",
}  # fmt: skip


def refuse(error: ClaydistError, status: int = 400) -> Refusal:
    """The refusal that says what a ClaydistError says."""
    return Refusal(status, error.message, problems=error.problems, field=getattr(error, "field", ""))


def busy(message: str, retry_after_s: int = 1) -> Refusal:
    """503 with Retry-After: the same request may succeed a little later."""
    return Refusal(503, message, headers=[(b"retry-after", str(retry_after_s).encode())])
