"""The whole contract of the imagined env, over drawn wirings, specs, heads and starts."""

from __future__ import annotations

import torch
from _wirings import LATENT, starts, wirings
from hypothesis import given, settings, strategies as st
from tensordict import TensorDict
from torchrl.data import LazyTensorStorage, ReplayBuffer
from torchrl.envs.utils import check_env_specs

from torchrl_wm import WorldModelEnv, WorldModelLoss
from torchrl_wm.modules import without_penalty
from torchrl_wm.modules.keys import join


def source(kind: str, keys: dict):
    data = starts(keys, 12)
    if kind == "tensordict":
        return data
    if kind == "function":
        return lambda size: starts(keys, *size)
    buffer = ReplayBuffer(storage=LazyTensorStorage(12))
    buffer.extend(data)
    return buffer


def check_endings(out: TensorDict) -> None:
    nxt = out["next"]
    truncated = nxt.get("truncated", torch.zeros_like(nxt["done"]))
    assert torch.equal(nxt["done"], nxt["terminated"] | truncated)
    assert nxt["done"].dtype == nxt["terminated"].dtype == torch.bool


@settings(max_examples=200)
@given(
    wiring=wirings(),
    kind=st.sampled_from(["tensordict", "function", "buffer"]),
    seed=st.integers(0, 2**16),
)
def test_contract(wiring, kind, seed) -> None:
    model, base, options, keys = wiring
    env = WorldModelEnv(model, base, start_states=source(kind, keys), **options)
    size = env.batch_size
    # Specs: copied and re-batched leaf by leaf; every latent in both.
    for key in base.full_action_spec.keys(True, True):
        leaf = base.full_action_spec_unbatched[key]
        assert env.full_action_spec[key].shape == (*size, *leaf.shape)
        assert type(env.full_action_spec[key]) is type(leaf)
    for key in model.latent_keys:
        assert env.observation_spec[key].shape == (*size, LATENT)
        assert env.state_spec[key].shape == (*size, LATENT)
    assert env.batch_locked == bool(size)
    check_env_specs(env)
    check_env_specs(env, break_when_any_done=False)

    # Rollouts: latents move, time follows on itself, endings are one.
    given_size = size or (2,)
    start = starts(keys, *given_size)
    env.set_seed(seed)
    out = env.rollout(4, tensordict=start)
    assert set(start.keys(True, True)) == {keys["observation"], keys["goal"]}
    assert out.batch_size[:-1] == given_size
    for key in model.latent_keys:
        after, before = out.get(join("next", key)), out.get(key)
        assert (after != before).flatten(len(given_size)).any(-1).all()
        dims = len(given_size)
        assert torch.equal(
            before.narrow(dims, 1, out.shape[-1] - 1),
            after.narrow(dims, 0, out.shape[-1] - 1),
        )
    check_endings(out)
    if options["max_steps"]:
        assert out.batch_size[-1] <= options["max_steps"]
    env.set_seed(seed)
    again = env.rollout(4, tensordict=start)
    assert (again == out).all()

    # Imagination: the full horizon, the same transitions for the same noise.
    env.set_seed(seed)
    imagined = env.imagine(3, tensordict=start)
    mask = imagined["collector", "mask"]
    assert imagined.batch_size == (*given_size, 3) == mask.shape
    ended = (
        imagined["next", "done"].squeeze(-1).cumsum(-1)
        - imagined["next", "done"].squeeze(-1).int()
    )
    assert torch.equal(mask, ended == 0)
    check_endings(imagined)

    # A partial reset touches the masked rows alone.
    if size:
        td = imagined[..., 0].select(*env.state_keys, *env.done_keys)
        reset = torch.rand(*size, 1) < 0.5
        fresh = env.reset(td.clone().set("_reset", reset))
        for key in env.state_keys:
            rows = ~reset.expand(*size, 1).squeeze(-1)
            assert torch.equal(fresh.get(key)[rows], td.get(key)[rows])
        assert not fresh["done"][reset].any()

    # Gradients flow, and the imagined batch trains the model it comes from.
    imagined.get(join("next", keys["reward"])).sum().backward()
    assert model.dynamics.module.drift.grad is not None
    if not model.is_recurrent and options["decode"]:
        plain = without_penalty(model)
        loss = WorldModelLoss(plain, losses=["reward", "reconstruction"])
        loss.set_keys(
            reward=keys["reward"],
            observation=keys["observation"],
            reconstructed_observation=keys["observation"],
        )
        values = loss(imagined.detach())
        assert all(value.isfinite() for value in values.values())
