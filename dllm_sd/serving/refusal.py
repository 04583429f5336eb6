"""Why a server does not do what it is asked."""

from typing import Any

from dllm_sd.errors import in_short

KINDS = {401: "authentication_error", 404: "not_found_error", 503: "overloaded_error", 500: "server_error"}


class Refusal(Exception):
    """A request that is refused: its status, and one sentence with the remedy."""

    def __init__(self, status: int, message: str, retry_after: int | None = None) -> None:
        super().__init__(in_short(message))
        self.status = status
        self.retry_after = retry_after
        """Seconds after which the same request may succeed."""

    @property
    def tree(self) -> dict[str, Any]:
        """Return the body of the answer, as OpenAI's servers write it."""
        kind = KINDS.get(self.status, "invalid_request_error")
        return {"error": {"message": str(self), "type": kind, "param": None, "code": self.status}}
