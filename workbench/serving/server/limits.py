"""What the server accepts, and how it says no: errors in OpenAI's format."""

from __future__ import annotations

import ipaddress
import socket
from dataclasses import dataclass, fields
from typing import Any

from emoe_core.errors import EmoeError, OptionError


@dataclass(frozen=True)
class ServerLimits:
    """Bounds on what clients may ask.

    Attributes
    ----------
    max_body_bytes : int
        Of a request; more is refused with 413.
    max_prompt_tokens, max_output_tokens : int
        More is refused with 400.
    default_output_tokens : int
        Where a request does not say.
    max_batch : int
        Requests that run at once.
    max_waiting : int
        Requests accepted beyond those; more are refused with 429.
    body_timeout_s : float
        How long nothing of a body may come; then the request is refused with 408.
    """

    max_body_bytes: int = 1_000_000
    max_prompt_tokens: int = 4096
    max_output_tokens: int = 1024
    default_output_tokens: int = 128
    max_batch: int = 4
    max_waiting: int = 64
    body_timeout_s: float = 30.0

    def __post_init__(self) -> None:
        for item in fields(self):
            least = 0 if item.name == "max_waiting" else 1
            if item.name != "body_timeout_s" and getattr(self, item.name) < least:
                raise OptionError(f"{item.name} is {getattr(self, item.name)}: give at least {least}")
        if not self.body_timeout_s > 0:
            raise OptionError(f"body_timeout_s is {self.body_timeout_s}: give more than 0 seconds")


class ApiError(EmoeError):
    """A request that is refused or failed: a status and OpenAI's error object."""

    def __init__(
        self,
        status: int,
        message: str,
        kind: str = "invalid_request_error",
        code: str | None = None,
        param: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.kind = kind
        self.code = code
        self.param = param

    def __reduce__(self) -> tuple[Any, ...]:
        return ApiError, (self.status, str(self), self.kind, self.code, self.param)

    def body(self) -> dict[str, Any]:
        """Return OpenAI's error object."""
        return {"error": {"message": str(self), "type": self.kind, "param": self.param, "code": self.code}}


def shutting_down() -> ApiError:
    """Return the error of a server that takes no more requests."""
    return ApiError(503, "the server is shutting down: ask another, or wait", "server_error", "shutting_down")


def require_safe_host(host: str, api_key: str | None) -> None:
    """Raise `OptionError` when others could reach the server without a key."""
    try:
        loopback = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = False
    if not loopback and api_key is None:
        raise OptionError(
            f"--host {host} can be reached by others: give a key with --api-key-file or the environment variable "
            f"EMOE_API_KEY, or stay on 127.0.0.1"
        )


def require_free_port(host: str, port: int) -> None:
    """Raise `OptionError` when a server could not listen there, before anything is loaded for it."""
    if not 0 <= port <= 65535:
        raise OptionError(f"--port {port}: give 0 to 65535, 0 taking a free one")
    try:
        with socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET):
            pass
    except socket.gaierror as error:
        raise OptionError(f"--host {host} is no address of this machine: {error.strerror}") from None
    except OSError as error:
        raise OptionError(
            f"cannot listen on port {port} of {host} ({error.strerror}): give another --port, 0 takes a free one"
        ) from None
