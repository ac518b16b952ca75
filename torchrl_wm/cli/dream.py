"""``torchrl-wm dream``: look into what a run's model imagines, on a local page."""

from __future__ import annotations

from torchrl_wm.cli.console import say
from torchrl_wm.cli.open_run import open_run
from torchrl_wm.trainers import dream_of_run, serve_dream


def dream_of(
    path: str,
    *,
    port: int,
    open_page: bool,
    seed: int,
    render: str | None,
    checkpoint: int | None,
) -> None:
    """Serve the page until Ctrl-C."""
    session = dream_of_run(open_run(path, checkpoint), seed=seed, render=render)
    for note in session.notes:
        say(note)

    def ready(url: str) -> None:
        say(f"{session.title}: {url}")
        say("Only this machine can reach the page. Ctrl-C ends it.")

    serve_dream(session, port=port, open_page=open_page, on_ready=ready)
    say("The page is closed.")
