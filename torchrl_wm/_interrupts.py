"""Ctrl-C that is heeded between steps, and nowhere else.

A KeyboardInterrupt in the midst of a step may hit code that turns it into another error,
or leaves a module without its parameters. So the signal sets a flag while a run goes on,
and the run reads it where it may stop.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from typing import Any

_pending = False


@contextmanager
def deferred_interrupts() -> Iterator[None]:
    """Let Ctrl-C wait for :func:`check_interrupt`, or the end; a second one is heeded at once."""
    if threading.current_thread() is not threading.main_thread():
        yield  # Python hands signals to the main thread only
        return
    before = signal.getsignal(signal.SIGINT)
    if before is not signal.default_int_handler:
        yield  # somebody else handles the signal, or nobody does
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
    """Let processes begin that Ctrl-C, which their whole terminal gets, does not end."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    # Or the first process makes it begin, which unblocks the signal.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def check_interrupt(*_: Any) -> None:
    """Raise the KeyboardInterrupt that was asked for, if one was."""
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
