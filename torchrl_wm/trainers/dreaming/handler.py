"""Requests to the server of a dream: read, refused if they come from elsewhere, and answered."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import CancelledError
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from importlib import resources
from typing import Any, Protocol

from torchrl_wm.trainers.dreaming.asking import ask, ASKED, Elsewhere, state_of
from torchrl_wm.trainers.dreaming.session import DreamSession

#: The most bytes of a request.
_LONGEST = 65_536

#: The page needs nothing from elsewhere, and nothing else may show it or talk to the server.
_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Cross-Origin-Resource-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


class Served(Protocol):
    """The server, as a request knows it."""

    url: str
    hosts: tuple[str, ...]

    def call(self, function: Callable[[DreamSession], Any]) -> Any:
        """Call a function of the session."""


class Handler(BaseHTTPRequestHandler):
    """Reads a request, refuses those from elsewhere, and answers."""

    dream: Served
    server_version = "torchrl-wm"
    sys_version = ""
    timeout = 60

    def handle(self) -> None:
        """Answer, unless the page is closed meanwhile."""
        try:
            super().handle()
        except ConnectionError:
            pass

    def do_GET(self) -> None:
        """Answer with the page, or with the state of the session."""
        if not self._is_from_here():
            return
        path = self.path.partition("?")[0]
        if path == "/":
            self._send(HTTPStatus.OK, page(), "text/html; charset=utf-8")
        elif path == "/state":
            self._answer(state_of)
        else:
            self._refuse(HTTPStatus.NOT_FOUND, f"There is no {path!r} here.")

    def do_POST(self) -> None:
        """Do what the page asks for."""
        if not self._is_from_here():
            return
        name = self.path.lstrip("/")
        if name not in ASKED:
            return self._refuse(
                HTTPStatus.NOT_FOUND,
                f"There is no {self.path!r} here: ask for {list(ASKED)}.",
            )
        try:
            given = self._read()
        except ValueError as err:
            return self._refuse(HTTPStatus.BAD_REQUEST, str(err))
        self._answer(lambda session: ask(session, name, given))

    def _is_from_here(self) -> bool:
        """Return whether the page of this server asks; refuse other pages and other names.

        A page of somebody else's may let its own name stand for 127.0.0.1 (DNS rebinding), which
        the header Host shows; or ask this server directly, which Origin shows.
        """
        hosts = self.dream.hosts
        host, origin = self.headers.get("Host", ""), self.headers.get("Origin")
        if host.lower() not in hosts:
            self._refuse(
                HTTPStatus.FORBIDDEN,
                f"This page is for this machine alone, at {self.dream.url}; it was "
                f"asked for as {host!r}.",
            )
            return False
        if origin is not None and origin.lower() not in {f"http://{h}" for h in hosts}:
            self._refuse(
                HTTPStatus.FORBIDDEN,
                f"Only its own page may ask this server, and {origin!r} did.",
            )
            return False
        return True

    def _read(self) -> Any:
        """Return the JSON of a request."""
        # Of this type other pages can only ask with leave, which this server never gives.
        kind = self.headers.get("Content-Type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise ValueError(f"Content-Type must be application/json, got {kind!r}.")
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal() or int(length) > _LONGEST:
            raise ValueError(
                f"A request has a Content-Length of at most {_LONGEST} bytes, got {length!r}."
            )
        try:
            return json.loads(self.rfile.read(int(length)))
        except (
            ValueError,
            RecursionError,
        ) as err:  # of text or JSON, or nested too deep
            raise ValueError(f"The request is no JSON: {err}.") from err

    def _answer(self, function: Callable[[DreamSession], Any]) -> None:
        """Answer with what a function makes of the session."""
        try:
            answer = self.dream.call(function)
        except CancelledError:
            return self._refuse(HTTPStatus.SERVICE_UNAVAILABLE, "The server is closed.")
        except Elsewhere as err:
            return self._refuse(HTTPStatus.CONFLICT, str(err))
        except (KeyError, RuntimeError, TypeError, ValueError) as err:
            return self._refuse(HTTPStatus.BAD_REQUEST, _said(err))
        except Exception as err:  # of the user's env, policy or renderer
            text = f"{type(err).__name__}: {_said(err)}"
            return self._refuse(HTTPStatus.INTERNAL_SERVER_ERROR, text)
        content = json.dumps(answer, allow_nan=False).encode()
        self._send(HTTPStatus.OK, content, "application/json")

    def _refuse(self, status: HTTPStatus, why: str) -> None:
        content = json.dumps({"error": why}).encode()
        self._send(status, content, "application/json")

    def _send(self, status: HTTPStatus, content: bytes, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        for name, value in _HEADERS.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """Write no line for each request."""


def page() -> bytes:
    """Return the page."""
    return resources.files(__package__).joinpath("page.html").read_bytes()


def _said(err: Exception) -> str:
    """Return the message of an error, without the quotes of a KeyError."""
    return str(err.args[0] if len(err.args) == 1 else err) or type(err).__name__
