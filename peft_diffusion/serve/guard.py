"""Who may ask the server: hosts, origins, tokens and sizes, before anything else of a request is read."""

import base64
import binascii
import ipaddress
from collections.abc import Sequence
from secrets import compare_digest
from typing import NamedTuple
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send


class Refusal(NamedTuple):
    """Why a request is not answered.

    Attributes:
        status: The status of HTTP.
        detail: What is wrong.
    """

    status: int
    detail: str


def error_body(kind: str, detail: str) -> dict[str, str]:
    """Write an error in the shape that A1111's ``modules/api/api.py`` gives it.

    Args:
        kind: The type of the error.
        detail: What is wrong.

    Returns:
        The body of the answer.
    """
    return {"error": kind, "detail": detail, "body": "", "errors": detail}


class Guard:
    """An ASGI application around another, which lets through what may be asked.

    A web page elsewhere can make a browser send requests to this machine. It cannot choose the ``Origin`` that the browser
    tells, nor, by a name of its own that it lets mean 127.0.0.1 (DNS rebinding), the ``Host``: that must be of this machine,
    and an origin the same.
    No answer allows another origin to read it (no CORS).

    Args:
        app: The application inside.
        token: What requests must carry; None for nothing.
        hosts: Names of this machine beside localhost and addresses in digits.
        most: Bytes of a request's body.
    """

    def __init__(self, app: ASGIApp, token: str | None, hosts: Sequence[str], most: int) -> None:
        self._app = app
        self._token = None if token is None else token.encode()
        self._hosts = frozenset(host.lower() for host in hosts)
        self._most = most

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or pass it on."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return
        refusal = self._refusal(Headers(scope=scope))
        if refusal is None:
            await self._app(scope, self._counted(receive), send)
            return
        headers = {"WWW-Authenticate": "Basic"} if refusal.status == 401 else {}
        answer = JSONResponse(
            error_body("HTTPException", refusal.detail), refusal.status, {**headers, "Connection": "close"}
        )
        await answer(scope, receive, send)

    def _refusal(self, headers: Headers) -> Refusal | None:
        named = headers.getlist("host")
        if len(named) != 1 or not self._is_here(f"//{named[0]}"):
            told = ", ".join(named)[:100]
            return Refusal(403, f"the host {told!r} is no name of this server; give it to serve as --hosts")
        origin = headers.get("origin")
        if origin is not None and origin.lower() not in (f"http://{named[0].lower()}", f"https://{named[0].lower()}"):
            return Refusal(403, f"pages of {origin[:100]!r} may not ask this server")
        if self._token is not None and not self._carries(headers.get("authorization", "")):
            return Refusal(401, "Incorrect username or password")
        length = headers.get("content-length", "0")
        if length.isdigit() and int(length) > self._most:
            return self._too_large
        return None

    @property
    def _too_large(self) -> Refusal:
        return Refusal(413, f"the request is larger than {self._most // 2**20} MiB; serve takes more with --max-request-mb")

    def _is_here(self, address: str) -> bool:
        try:
            host = urlsplit(address).hostname or ""
        except ValueError:
            return False
        if host == "localhost" or host in self._hosts:
            return True
        try:
            ipaddress.ip_address(host)  # no name, so nobody can let it mean another machine
        except ValueError:
            return False
        return True

    def _carries(self, authorization: str) -> bool:
        """Whether the token is there, as a Bearer token or as a password, under any name of a user."""
        scheme, _, told = authorization.partition(" ")
        given = told.strip().encode("utf-8", "replace")
        if scheme.lower() == "basic":
            try:
                given = base64.b64decode(given, validate=True).partition(b":")[2]
            except binascii.Error:
                return False
        elif scheme.lower() != "bearer":
            return False
        return self._token is not None and compare_digest(given, self._token)

    def _counted(self, receive: Receive) -> Receive:
        """A body whose length nobody told is counted as it comes."""
        seen = 0

        async def counted() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > self._most:
                raise HTTPException(*self._too_large)
            return message

        return counted
