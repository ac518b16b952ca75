"""pytest-benchmark suite: ``pytest benchmarks`` (``pip install torchrl-wm[bench]``)."""

from __future__ import annotations

import pytest
import torch
from common import filter_variants, make_parts, variants
from tensordict import TensorDict

from torchrl_wm import WorldModel, WorldModelLoss


@pytest.mark.parametrize(
    "name", ["networks", "hand loop", "rollout", "imagine", "TorchRL"]
)
@pytest.mark.parametrize("batch", [1, 256])
def test_imagination(benchmark, name: str, batch: int) -> None:
    loop = variants(batch, 15)[name]
    with torch.no_grad():
        loop()
        benchmark(loop)


@pytest.mark.parametrize("name", ["TorchRL", "eager", "compiled step"])
@pytest.mark.parametrize("train", [False, True])
def test_filter(benchmark, name: str, train: bool) -> None:
    loops = filter_variants(16, 32, train=train, compiled=name == "compiled step")
    loop = loops[name]
    loop()
    benchmark(loop)


@pytest.mark.parametrize("multi_step", [False, True])
def test_loss(benchmark, multi_step: bool) -> None:
    parts = make_parts(False, False)
    parts.pop("policy")
    loss = WorldModelLoss(
        WorldModel(**parts), losses=["reward", "latent"], multi_step=multi_step
    )
    batch = TensorDict(
        {
            "observation": torch.randn(16, 10, 64),
            "action": torch.randn(16, 10, 6),
            "next": {
                "observation": torch.randn(16, 10, 64),
                "reward": torch.randn(16, 10, 1),
            },
        },
        [16, 10],
    )

    def step() -> None:
        loss.zero_grad()
        loss(batch).sum(reduce=True).backward()

    step()
    benchmark(step)
