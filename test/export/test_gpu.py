"""On a GPU: models there, numpy out, and random numbers of the env's own."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from _export_models import ACTION_SPACE, Net, OBS_SPACE
from _models import make_model, observations, SpecEnv

from torchrl_wm import GymWorldModelEnv, GymWorldModelVectorEnv, WorldModelEnv

pytestmark = pytest.mark.gpu


class CudaNet(Net):
    """Begins where its parameters are."""

    def reset(self, seed=None, options=None):
        state = torch.ones(*self.batch, 4, device=self.decoder.weight.device)
        return state, self.decode(state), {}


@pytest.mark.parametrize("kind", ["adapters", "world model"])
@pytest.mark.parametrize("rows", [None, 3])
def test_episodes_repeat_and_are_numpy(kind, rows) -> None:
    if kind == "adapters":
        args = CudaNet(0.5, () if rows is None else (rows,)), OBS_SPACE, ACTION_SPACE
        kwargs = {"device": "cuda"}
    else:
        model = make_model().to("cuda")
        start = observations(5).to("cuda")
        args, kwargs = (WorldModelEnv(model, SpecEnv(), start_states=start),), {}
    if rows is None:
        env = GymWorldModelEnv(*args, **kwargs)
    else:
        env = GymWorldModelVectorEnv(*args, num_envs=rows, **kwargs)
    action = np.zeros(env.action_space.shape, np.float32)

    def run(seed):
        return [env.reset(seed=seed)[0], *[env.step(action)[0] for _ in range(3)]]

    before = torch.cuda.get_rng_state()
    first, again, other = run(0), run(0), run(1)
    assert torch.equal(before, torch.cuda.get_rng_state())
    assert all(isinstance(obs, np.ndarray) for obs in first)
    assert np.array_equal(first, again) and not np.array_equal(first, other)
