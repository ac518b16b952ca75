"""Signals: Ctrl-C that takes effect only between steps, and SIGTERM that ends a process.

A KeyboardInterrupt within a step may hit code that turns it into another error, or leaves a
module without its parameters. During a run the signal therefore sets a flag, which the run
reads where it may stop.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from typing import Any

_pending = False


@contextmanager
def deferred_interrupts() -> Iterator[None]:
    """Let Ctrl-C wait for :func:`check_interrupt`, or the end; a second one acts at once."""
    if threading.current_thread() is not threading.main_thread():
        yield  # Python hands signals to the main thread only
        return
    before = signal.getsignal(signal.SIGINT)
    if before is not signal.default_int_handler:
        yield  # the signal has another handler, or none
        return
    signal.signal(signal.SIGINT, _note)
    try:
        yield
        check_interrupt()
    finally:
        signal.signal(signal.SIGINT, before)
        _clear()


@contextmanager
def blocked_interrupts() -> Iterator[None]:
    """Start processes that Ctrl-C in their terminal does not end."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    # Otherwise the first process starts it, which unblocks the signal.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def keep_sigterm() -> None:
    """Let SIGTERM end processes that draw: SDL would take it for its windows, and none is open."""
    os.environ.setdefault("SDL_NO_SIGNAL_HANDLERS", "1")


def check_interrupt(*_: Any) -> None:
    """Raise KeyboardInterrupt if Ctrl-C was pressed."""
    if _pending:
        _clear()
        raise KeyboardInterrupt


def _note(*_: Any) -> None:
    global _pending
    if _pending:
        _clear()
        raise KeyboardInterrupt
    _pending = True


def _clear() -> None:
    global _pending
    _pending = False
