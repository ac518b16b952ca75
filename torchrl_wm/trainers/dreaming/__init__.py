"""Dreams that one steps by hand: a session, and the local page that shows it.

``session.py`` holds both sides (``sides.py``) from one start (``recorded.py`` without a real env),
``views.py`` says what is seen of them, ``controls.py`` what sets an action; ``of_run.py`` makes the
session of a run. ``server.py`` serves it to a page (``page.html``); ``handler.py`` reads a request,
and ``asking.py`` does what it asks for.
"""

from __future__ import annotations

from torchrl_wm.trainers.dreaming.moments import Moment
from torchrl_wm.trainers.dreaming.of_run import dream_of_run
from torchrl_wm.trainers.dreaming.server import DreamServer, serve_dream
from torchrl_wm.trainers.dreaming.session import DreamSession
from torchrl_wm.trainers.dreaming.views import View

__all__ = [
    "DreamServer",
    "DreamSession",
    "Moment",
    "View",
    "dream_of_run",
    "serve_dream",
]
