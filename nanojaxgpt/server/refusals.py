"""What a request is refused with: a status, and the body that OpenAI's clients read."""

from typing import Any

TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class Refusal(Exception):
    """The request can't be answered. `param` names the field that is wrong, if one is."""

    def __init__(
        self, status: int, message: str, code: str = "", param: str = "", retry_after: int = 0
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.headers = {"retry-after": str(retry_after)} if retry_after else {}
        if status == 401:
            self.headers["www-authenticate"] = "Bearer"
        if status in (408, 413):  # the rest of the body is not read
            self.headers["connection"] = "close"

    def body(self) -> dict[str, Any]:
        """Return the JSON body."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {
            "error": {
                "message": self.message,
                "type": TYPES.get(self.status, kind),
                "param": self.param or None,
                "code": self.code or None,
            }
        }
