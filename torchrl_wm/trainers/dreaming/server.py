"""A dream on a local page: a server for this machine alone.

Only the standard library: the page asks for one thing at a time, and a framework would be one more
dependency for four requests.
"""

from __future__ import annotations

import queue
import threading
import webbrowser
from collections.abc import Callable
from concurrent.futures import CancelledError, Future
from http.server import ThreadingHTTPServer
from typing import Any

from tensordict import TensorDictBase
from torchrl.envs import EnvBase

from torchrl_wm.envs import WorldModelEnv
from torchrl_wm.trainers.dreaming.handler import Handler
from torchrl_wm.trainers.dreaming.session import DreamSession

#: The only address that the server listens at: nobody else on the network can reach it.
HOST = "127.0.0.1"
#: How long Ctrl-C may have to wait, in seconds, where waiting for a lock cannot be interrupted.
_WAIT = 0.5


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
        handler = type("Handler", (Handler,), {"dream": self})
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
        real_env: the real env, if there is one.
        policy: may act; see :class:`DreamSession`.
        settings: others of :class:`DreamSession`, by name.
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
