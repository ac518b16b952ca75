"""Set-up of every test run: seeds, GPU skips, and the snippets of README and docs."""

from __future__ import annotations

import os
import tempfile
from importlib.util import find_spec

os.environ.setdefault("MPLBACKEND", "Agg")  # before anything imports matplotlib

import pytest
import torch

# Settings of the documentation's builder, not a module with doctests.
collect_ignore = ["docs/conf.py"]
if not find_spec("sphinx"):  # it needs the extra docs
    collect_ignore.append("docs/code_links.py")
if not find_spec("stable_baselines3"):  # its example needs the extra
    collect_ignore.append("torchrl_wm/export/sb3.py")
if not find_spec("tyro"):  # so does the command line
    collect_ignore.append("torchrl_wm/cli")

if find_spec("hypothesis"):
    from hypothesis import HealthCheck, register_random, settings

    # The first call into torch can take seconds, and more where the machine is busy: to
    # judge examples, or the drawing of them, by the clock would only be flaky.
    patient = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
    settings.register_profile("local", **patient)
    settings.register_profile("ci", **patient, derandomize=True)
    settings.load_profile("ci" if os.environ.get("CI") else "local")

    class TorchRandom:
        """torch's random numbers begin anew with each example: one that fails fails again."""

        seed = staticmethod(torch.manual_seed)
        getstate = staticmethod(torch.get_rng_state)
        setstate = staticmethod(torch.set_rng_state)

    TORCH_RANDOM = TorchRandom()  # hypothesis holds it weakly
    register_random(TORCH_RANDOM)


@pytest.fixture(autouse=True)
def seed() -> int:
    """Start every test, doctest and snippet from one torch seed, and return it."""
    value = 0
    torch.manual_seed(value)
    return value


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a GPU where there is none."""
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


def pytest_report_header() -> list[str]:
    """Say what the outcome depends on."""
    header = [f"torch: {torch.__version__}, cuda: {torch.cuda.is_available()}"]
    if not find_spec("sybil"):
        header.append("sybil is missing: the snippets of README and docs are NOT run")
    return header


if find_spec("sybil"):
    from sybil import Sybil
    from sybil.parsers.markdown import PythonCodeBlockParser, SkipParser

    def _enter_scratch_folder(namespace: dict) -> None:
        """Let the snippets of a document write files that a later one reads."""
        namespace["__scratch__"] = (tempfile.TemporaryDirectory(), os.getcwd())
        os.chdir(namespace["__scratch__"][0].name)

    def _leave_scratch_folder(namespace: dict) -> None:
        folder, home = namespace.pop("__scratch__")
        os.chdir(home)
        folder.cleanup()

    # The ```python blocks of a document share one namespace, in order. A block that
    # should not run stands under a comment: <!--- skip: next -->
    pytest_collect_file = Sybil(
        parsers=[PythonCodeBlockParser(), SkipParser()],
        patterns=["README.md", "docs/*.md", "docs/*/*.md"],
        fixtures=["seed"],  # sybil does not heed autouse
        setup=_enter_scratch_folder,
        teardown=_leave_scratch_folder,
    ).pytest()
