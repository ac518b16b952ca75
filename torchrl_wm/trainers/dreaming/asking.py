"""What the page asks of a session, as JSON, and the answers."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Mapping
from dataclasses import asdict
from math import isfinite
from typing import Any

from torchrl_wm.trainers.dreaming.moments import Moment
from torchrl_wm.trainers.dreaming.session import DreamSession
from torchrl_wm.trainers.dreaming.views import View

#: What can be asked for, and the entries that it may have beside "at".
ASKED: Mapping[str, tuple[str, ...]] = {
    "reset": ("seed",),
    "step": ("action",),
    "look": (),
    "back": (),
}


class Elsewhere(Exception):
    """The session was used by somebody else since the page looked at it."""


def ask(session: DreamSession, name: str, given: Any) -> dict[str, Any]:
    """Do what the page asks, and return the moment that follows.

    Args:
        session: the session.
        name: one of :data:`ASKED`.
        given: the entries, by name. ``"at"`` is how many moments the page knows; what is asked
            is refused if there are others.

    Raises:
        ValueError: if an entry is unknown or not valid.
        Elsewhere: if the session has gone on since.
    """
    if not isinstance(given, dict):
        raise ValueError(f"A JSON object is expected, got {type(given).__name__}.")
    unknown = sorted(set(given) - {"at", *ASKED[name]})
    if unknown:
        raise ValueError(
            f"{name!r} takes {[*ASKED[name], 'at']}, and the entries {unknown} are unknown."
        )
    at, now = given.pop("at", None), len(session.moments)
    if at is not None and at != now:
        raise Elsewhere(
            f"The dream has gone on elsewhere: it has {now} moments, and this page knows {at}. "
            f"The page shows it as it is now."
        )
    getattr(session, name)(**given)
    return now_of(session)


def now_of(session: DreamSession) -> dict[str, Any]:
    """Return the newest moment, with pictures, and how many there are."""
    return {
        "moment": as_json(session.moments[-1]),
        "at": len(session.moments),
        "over": session.is_over,
        "seed": session.seed,
    }


def state_of(session: DreamSession) -> dict[str, Any]:
    """Return all that a page needs to begin: what the session is, and its moments so far."""
    history = [as_json(moment, frames=False) for moment in session.moments]
    return {
        "title": session.title,
        "controls": [asdict(control) for control in session.controls.all],
        "names": session.names,
        "notes": session.notes,
        "has_policy": session.policy is not None,
        "has_real": session.has_real,
        "usual_disagreement": _plain(session.usual_disagreement),
        "history": history,
        **now_of(session),
    }


def as_json(moment: Moment, frames: bool = True) -> dict[str, Any]:
    """Return a moment as plain data: numbers that are not finite are None, pictures are URLs."""
    real = None if moment.real is None else _side(moment.real, frames)
    return {
        "step": moment.step,
        "actor": moment.actor,
        "action": _plain(moment.action),
        "imagined": _side(moment.imagined, frames),
        "real": real,
        "disagreement": _plain(moment.disagreement),
    }


def _side(view: View, frames: bool) -> dict[str, Any]:
    out = {
        "reward": _plain(view.reward),
        "total": _plain(view.total),
        "terminated": view.terminated,
        "truncated": view.truncated,
    }
    if frames:
        out["values"] = {name: _plain(v) for name, v in view.values.items()}
        out["frame"] = None
        if view.frame is not None:
            data = b64encode(view.frame).decode("ascii")
            out["frame"] = f"data:image/png;base64,{data}"
    return out


def _plain(value: Any) -> Any:
    """Return numbers as JSON has them, which knows neither NaN nor infinity."""
    if isinstance(value, list):
        return [_plain(each) for each in value]
    if isinstance(value, dict):
        return {name: _plain(each) for name, each in value.items()}
    return value if value is None or isfinite(value) else None
