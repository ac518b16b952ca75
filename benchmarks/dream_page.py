"""The picture of the guide's page on dreams: the page of a run after some steps of its policy.

The run is that of the demo, and the browser a headless Chromium:

    torchrl-wm demo --run runs/demo
    python benchmarks/dream_page.py runs/demo docs/guide/dream.png
"""

from __future__ import annotations

import argparse
import sys
import threading
from pathlib import Path

from torchrl_wm.trainers import dream_of_run, DreamServer, resume_run

sys.path.insert(0, str(Path(__file__).parents[1] / "test"))
from _chromium import Chromium  # noqa: E402


def main() -> None:
    """Take the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", help="the folder of the run")
    parser.add_argument("picture", help="the .png to write")
    parser.add_argument("--steps", type=int, default=40, help="steps of the policy")
    parser.add_argument("--seed", type=int, default=0, help="how the episode begins")
    parser.add_argument("--width", type=int, default=1200, help="in pixels")
    options = parser.parse_args()
    session = dream_of_run(resume_run(options.run, device="cpu"), seed=options.seed)
    for _ in range(options.steps):
        session.step("policy")
    server = DreamServer(session)

    def take() -> None:
        try:
            with Chromium(options.width, 860) as browser:
                browser.open(server.url)
                browser.wait("document.body.dataset.ready")
                browser.wait("[...document.images].every(image => image.complete)")
                browser.screenshot(options.picture)
        finally:
            server.close()

    threading.Thread(target=take).start()
    server.serve()


if __name__ == "__main__":
    main()
