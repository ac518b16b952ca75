"""Keep the tests of this folder, and their many expected failures, cheap."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True, scope="module")
def few_threads() -> Iterator[None]:
    """Not more threads than a small machine has cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(min(threads, 2))
    yield
    torch.set_num_threads(threads)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo) -> None:
    """Cut what lies below the test out of the traceback of an expected failure.

    Nobody reads it, and to format it pytest parses TorchRL's and tensordict's
    largest files again for each. ``--runxfail`` shows it.
    """
    marker = item.get_closest_marker("xfail")
    if call.excinfo is None or marker is None or item.config.option.runxfail:
        return
    error, frame = call.excinfo.value, call.excinfo.tb
    if not isinstance(error, marker.kwargs.get("raises", ())):
        return
    error.__cause__ = error.__context__ = None
    while frame.tb_next and frame.tb_frame.f_code.co_filename != str(item.path):
        frame = frame.tb_next
    frame.tb_next = None
