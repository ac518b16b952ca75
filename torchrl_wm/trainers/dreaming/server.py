"""A dream on a local page: a server for this machine alone.

Only the standard library: the page asks for one thing at a time, and a framework would be one more
dependency for four requests.
"""

from __future__ import annotations

import json
import queue
import threading
import webbrowser
from collections.abc import Callable
from concurrent.futures import CancelledError, Future
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import resources
from typing import Any

from tensordict import TensorDictBase
from torchrl.envs import EnvBase

from torchrl_wm.envs import WorldModelEnv
from torchrl_wm.trainers.dreaming.asking import ask, ASKED, Elsewhere, state_of
from torchrl_wm.trainers.dreaming.session import DreamSession

#: The only address that the server listens at: nobody else on the network can reach it.
HOST = "127.0.0.1"
#: The most bytes of a request.
_LONGEST = 65_536
#: How long Ctrl-C may have to wait, in seconds, where waiting for a lock cannot be interrupted.
_WAIT = 0.5

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


class DreamServer:
    """A server of a session's page, at 127.0.0.1.

    The session is used in the thread that calls :meth:`serve`, one request after the other.

    Args:
        session: the session.
        port: the port; 0 for any that is free.

    Raises:
        ValueError: if there is no such port.
        OSError: if the port is taken; the message says so.

    Examples:
        >>> DreamServer(session).serve()  # doctest: +SKIP
    """

    def __init__(self, session: DreamSession, port: int = 0) -> None:
        if isinstance(port, bool) or not isinstance(port, int) or not 0 <= port < 65536:
            raise ValueError(
                f"port must be an int from 0 (any that is free) to 65535, got {port!r}."
            )
        self.session = session
        self._asked: queue.SimpleQueue[tuple[Future, Callable] | None]
        self._asked = queue.SimpleQueue()
        self._is_open, self._serves = True, False
        handler = type("Handler", (_Handler,), {"server_of_dream": self})
        try:
            self._http = ThreadingHTTPServer((HOST, port), handler)
        except OSError as err:
            raise OSError(
                f"The port {port} of {HOST} cannot be used ({err}). Give another one, or port=0 "
                f"for any that is free."
            ) from err
        self._http.daemon_threads = True

    @property
    def port(self) -> int:
        """The port."""
        return self._http.server_address[1]

    @property
    def url(self) -> str:
        """The address of the page."""
        return f"http://{HOST}:{self.port}/"

    @property
    def hosts(self) -> tuple[str, ...]:
        """The names by which a browser on this machine may call the server."""
        names = (HOST, "localhost")
        # Browsers leave out http's own port.
        bare = names if self.port == 80 else ()
        return (*(f"{name}:{self.port}" for name in names), *bare)

    def serve(self) -> None:
        """Answer requests until :meth:`close` is called, or Ctrl-C is pressed, which is raised."""
        # Requests are read in threads: browsers keep connections open, and a single thread
        # would wait for them. The session stays in this one, as renderers ask for.
        self._serves = True
        threading.Thread(target=self._http.serve_forever, daemon=True).start()
        try:
            while self._is_open:
                self._answer()
        finally:
            self._is_open = False
            self._http.shutdown()
            self._http.server_close()
            self._cancel()

    def close(self) -> None:
        """Let :meth:`serve` return, and free the port."""
        self._is_open = False
        self._asked.put(None)
        if not self._serves:
            self._http.server_close()

    def call(self, function: Callable[[DreamSession], Any]) -> Any:
        """Call a function of the session where the session lives, and return its result.

        Raises:
            CancelledError: if the server is closed.
        """
        future: Future = Future()
        self._asked.put((future, function))
        if not self._is_open:
            future.cancel()
        return future.result()

    def _answer(self) -> None:
        """Wait for a request, and answer it."""
        try:
            asked = self._asked.get(timeout=_WAIT)
        except queue.Empty:
            return
        if asked is None:
            return
        future, function = asked
        if not future.set_running_or_notify_cancel():
            return
        try:
            future.set_result(function(self.session))
        except Exception as err:  # whatever an env raises; the page shows it
            future.set_exception(err)
        except BaseException:  # Ctrl-C
            future.set_exception(CancelledError())
            raise

    def _cancel(self) -> None:
        """Cancel all requests that wait."""
        while not self._asked.empty():
            asked = self._asked.get()
            if asked is not None:
                asked[0].cancel()


class _Handler(BaseHTTPRequestHandler):
    """Reads a request, refuses those from elsewhere, and answers."""

    server_of_dream: DreamServer
    server_version = "torchrl-wm"
    sys_version = ""
    timeout = 60

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
        hosts = self.server_of_dream.hosts
        host, origin = self.headers.get("Host", ""), self.headers.get("Origin")
        if host.lower() not in hosts:
            self._refuse(
                HTTPStatus.FORBIDDEN,
                f"This page is for this machine alone, at {self.server_of_dream.url}; it was "
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
        except ValueError as err:  # of text or JSON
            raise ValueError(f"The request is no JSON: {err}.") from err

    def _answer(self, function: Callable[[DreamSession], Any]) -> None:
        """Answer with what a function makes of the session."""
        try:
            answer = self.server_of_dream.call(function)
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
        try:
            self.wfile.write(content)
        except ConnectionError:
            pass  # the page was closed meanwhile

    def log_message(self, format: str, *args: Any) -> None:
        """Write no line for each request."""


def page() -> bytes:
    """Return the page."""
    return resources.files(__package__).joinpath("page.html").read_bytes()


def _said(err: Exception) -> str:
    """Return the message of an error, without the quotes of a KeyError."""
    return str(err.args[0] if len(err.args) == 1 else err) or type(err).__name__


def serve_dream(
    env: WorldModelEnv | DreamSession,
    *,
    real_env: EnvBase | None = None,
    policy: Callable[[TensorDictBase], TensorDictBase] | None = None,
    port: int = 0,
    open_page: bool = True,
    on_ready: Callable[[str], Any] | None = None,
    **settings: Any,
) -> None:
    """Show a dream on a local page, where one steps it by keys and sliders, until Ctrl-C.

    The page is served at 127.0.0.1, to this machine alone.

    Args:
        env: an imagined env of batch size ``[]``, or a session.

    Keyword Args:
        real_env, policy, settings: see :class:`DreamSession`.
        port: the port; 0 for any that is free.
        open_page: open the page in a browser.
        on_ready: is called with the address of the page.

    Raises:
        TypeError: if settings are given beside a session.
        OSError: if the port is taken.

    Examples:
        >>> from torchrl.envs import GymEnv
        >>> from torchrl_wm import WorldModelEnv
        >>> from torchrl_wm.models import make_ensemble_world_model
        >>> from torchrl_wm.trainers import serve_dream
        >>> real_env = GymEnv("Pendulum-v1")
        >>> world_model, _ = make_ensemble_world_model(real_env)
        >>> serve_dream(WorldModelEnv(world_model, real_env), real_env=real_env)  # doctest: +SKIP
    """
    session = env
    if not isinstance(session, DreamSession):
        session = DreamSession(env, real_env=real_env, policy=policy, **settings)
    elif settings or real_env is not None or policy is not None:
        raise TypeError(
            "A session has its real env, policy and settings already: "
            "serve_dream(DreamSession(env, real_env=..., policy=...))."
        )
    server = DreamServer(session, port)
    try:
        if on_ready is not None:
            on_ready(server.url)
        if open_page:
            # Its requests wait until the server runs; a browser in the terminal does not return.
            args = (server.url,)
            threading.Thread(target=webbrowser.open, args=args, daemon=True).start()
        server.serve()
    except KeyboardInterrupt:
        pass
    finally:
        server.close()
