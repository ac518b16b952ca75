"""On a GPU: nothing waits for the device within a horizon, and graphs capture."""

from __future__ import annotations

import pytest
import torch
from _models import ACTION, LATENT, linear, make_model, observations, SpecEnv
from tensordict.nn import CudaGraphModule

from torchrl_wm import WorldModelEnv

pytestmark = pytest.mark.gpu


@pytest.fixture
def parts():
    model = make_model(done="terminated_logits").to("cuda")
    env = WorldModelEnv(model, SpecEnv(), max_steps=10)
    policy = linear(["latent"], ["action"], [LATENT, ACTION]).to("cuda")
    start = model.encode(observations(16).to("cuda")).detach()
    return env, policy, start


def test_env_is_where_the_model_is(parts) -> None:
    env, policy, start = parts
    assert env.device.type == "cuda"
    assert env.rollout(3, policy, tensordict=start)["next", "reward"].is_cuda


@pytest.mark.parametrize("kind", ["policy", "random", "actions"])
def test_imagine_never_waits_for_the_device(parts, kind) -> None:
    env, policy, start = parts
    actions = torch.zeros(16, 5, ACTION, device="cuda")
    call = {
        "policy": lambda: env.imagine(5, policy, start),
        "random": lambda: env.imagine(5, tensordict=start),
        "actions": lambda: env.imagine(5, tensordict=start, actions=actions),
    }[kind]
    call()
    if kind == "random":
        pytest.skip("TorchRL's Bounded.rand waits once per call, before the horizon")
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_cuda_graphs(parts) -> None:
    env, policy, start = parts

    def rewards(latent):
        td = start.clone(False).set("latent", latent)
        return env.imagine(5, policy, td)["next", "reward"]

    with torch.no_grad():
        expected = rewards(start["latent"])
        graph = CudaGraphModule(rewards)
        for _ in range(5):
            out = graph(start["latent"])
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled(parts, mode) -> None:
    env, policy, start = parts
    with torch.no_grad():
        expected = env.imagine(5, policy, start)
        env.compile(mode=mode)
        for _ in range(3):
            out = env.imagine(5, policy, start)
    torch.testing.assert_close(
        out["next", "reward"], expected["next", "reward"], atol=1e-5, rtol=0
    )


def test_bf16_autocast(parts) -> None:
    env, policy, start = parts
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
        out = env.imagine(5, policy, start)
    assert out["next", "reward"].isfinite().all()
