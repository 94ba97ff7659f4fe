"""What goes wrong, in OpenAI's form."""

import math

from pydantic import ValidationError
from starlette.responses import JSONResponse

from protocol.errors import BadAdapter, BadRequest, BadUsage, NoRoute, SwarmError, TooLong, first_problem


class Refused(SwarmError):
    """A request is not answered: `message` is one sentence for whoever sent it."""

    def __init__(
        self, status: int, message: str, *, code: str | None = None, param: str | None = None, retry_after: float = 0.0
    ):
        super().__init__(message)
        self.status, self.code, self.param, self.retry_after = status, code, param, retry_after

    def response(self) -> JSONResponse:
        """The answer."""
        headers = {"Retry-After": str(math.ceil(self.retry_after))} if self.retry_after else {}
        return JSONResponse(self.body(), self.status, headers)

    def body(self) -> dict[str, object]:
        """What is in it."""
        kinds = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


def refused(error: Exception) -> Refused:
    """What a client is told of an error."""
    if isinstance(error, Refused):
        return error
    if isinstance(error, ValidationError):
        return _of_fields(error)
    if isinstance(error, TooLong):
        return Refused(400, str(error), code="context_length_exceeded")
    if isinstance(error, BadUsage | BadRequest | BadAdapter):
        return Refused(400, str(error))
    if isinstance(error, NoRoute):
        return Refused(503, str(error), code="no_route", retry_after=10)
    if isinstance(error, SwarmError):
        return Refused(503, str(error), retry_after=error.retry_after)
    return Refused(500, "The gateway failed at this request; its log says why.")


def _of_fields(error: ValidationError) -> Refused:
    place, problem = first_problem(error)
    field = place.partition(".")[0]
    if not field:
        return Refused(400, f"The request is not a JSON object as expected here ({problem}).")
    if field == "prompt":  # each of its forms has something to say of itself
        place, problem = field, "expected a text, token ids, or a list of either, and not an empty one"
    return Refused(400, f"{place}: {problem}.", param=field)
