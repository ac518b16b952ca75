"""Plans on problems whose optimum is known."""

from __future__ import annotations

import pytest
import torch
from benchmarks.planning_quality import pendulum_returns, problems, scores

from torchrl_wm.planners.noise import coloring

LEAST = {"CEM": 0.98, "iCEM": 0.98, "MPPI": 0.95}


@pytest.mark.parametrize("title", list(problems()))
@pytest.mark.parametrize("planner", list(LEAST))
def test_reaches_the_optimum(planner: str, title: str) -> None:
    found = scores(planner, problems()[title], seeds=20)
    assert found.mean() >= LEAST[planner]
    assert found.max() <= 1 + 1e-4  # or it would be no optimum


@pytest.mark.slow
@pytest.mark.parametrize("planner", list(LEAST))
def test_swings_up_the_pendulum(planner: str) -> None:
    assert pendulum_returns(planner, seeds=20).mean() > -200


@pytest.mark.parametrize("beta", [0.0, 0.5, 2.0])
def test_coloured_noise_has_its_spectrum(beta: float) -> None:
    steps = 16
    noise = torch.randn(100_000, steps) @ coloring(steps, beta).T
    power = torch.fft.rfft(noise).abs().square().mean(0)[1:-1]
    frequency = torch.fft.rfftfreq(steps)[1:-1]
    slope = torch.log(power / power[0]) / torch.log(frequency / frequency[0]).clamp_min(
        1e-9
    )
    torch.testing.assert_close(
        slope[1:], torch.full_like(slope[1:], -beta), atol=0.05, rtol=0
    )
    torch.testing.assert_close(noise.var(0), torch.ones(steps), atol=0.05, rtol=0)
