"""Heads that have latents of their own: imagined, filtered, observed step by step, trained."""

from __future__ import annotations

import pytest
import torch
from _memory_models import data
from _models import SpecEnv
from tensordict import TensorDict
from tensordict.nn import TensorDictModule as Mod
from torch import nn

from torchrl_wm import WorldModel, WorldModelEnv, WorldModelLoss
from torchrl_wm.modules.keys import join

OBS, ACTION, MEMORY = 6, 2, 3


class RecurrentReward(nn.Module):
    """A reward from a state that the head itself moves."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(OBS + ACTION, MEMORY)
        self.read = nn.Linear(MEMORY, 1)

    def forward(self, latent, action, state):
        inputs = torch.cat([latent, action], -1)
        flat = self.cell(inputs.reshape(-1, OBS + ACTION), state.reshape(-1, MEMORY))
        state = flat.reshape(state.shape)
        return self.read(state), state


class Move(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(OBS + ACTION, OBS)

    def forward(self, latent, action):
        return latent + self.net(torch.cat([latent, action], -1))


def model_of(latent="latent", state="lstm", posterior: bool = False) -> WorldModel:
    torch.manual_seed(0)
    encoded = "encoded" if posterior else latent
    parts = {}
    if posterior:
        parts["posterior"] = Mod(
            lambda prior, seen: (prior + seen) / 2,
            [("next", latent), ("next", encoded)],
            [("next", latent)],
        )
    begin = TensorDict({state: torch.ones(MEMORY)})
    if posterior:
        begin[latent] = torch.zeros(OBS)
    return WorldModel(
        Mod(nn.Linear(OBS, OBS), ["observation"], [encoded]),
        Mod(Move(), [latent, "action"], [("next", latent)]),
        Mod(
            RecurrentReward(),
            [join("next", latent), "action", state],
            [("next", "reward"), join("next", state)],
        ),
        initial_state=begin,
        **parts,
    )


KEYS = [("latent", "lstm"), (("deep", "latent"), ("deep", "lstm"))]


@pytest.mark.parametrize("latent, state", KEYS)
@pytest.mark.parametrize("posterior", [False, True])
def test_the_filter_moves_them_on_the_corrected_latents(latent, state, posterior):
    model, batch = model_of(latent, state, posterior), data(2, 4)
    batch["is_init"][1, 2] = True
    assert set(model.latent_keys) == {latent, state}
    found = model.observe(batch)
    head = model.reward_head.module
    expected = torch.ones(2, MEMORY)
    for t in range(4):
        if t == 2:  # an episode begins in the second row
            expected[1] = 1.0
        torch.testing.assert_close(found[state][:, t], expected)
        corrected = found[join("next", latent)][:, t]
        if not posterior:  # the encoder's latents take the place of what was predicted
            corrected = model.encoder.module(batch["next", "observation"][:, t])
        expected = head(corrected, batch["action"][:, t], expected)[1].detach()
        torch.testing.assert_close(found[join("next", state)][:, t], expected)


@pytest.mark.parametrize("latent, state", KEYS)
@pytest.mark.parametrize("posterior", [False, True])
def test_observing_step_by_step_gives_the_same(latent, state, posterior) -> None:
    model, batch = model_of(latent, state, posterior), data(4)
    batch["is_init"][0] = True
    sequence = model.observe(batch)
    carried = TensorDict({}, [])
    for t in range(4):
        carried.update(batch[t].select("observation", "is_init"))
        carried = model.observer()(carried)
        torch.testing.assert_close(carried[state], sequence[state][t])
        torch.testing.assert_close(carried[latent], sequence[latent][t])
        carried.set("action", batch["action"][t])


@pytest.mark.parametrize("multi_step", [False, True])
def test_the_loss_trains_them(multi_step) -> None:
    model, batch = model_of(), data(2, 4)
    loss = WorldModelLoss(model, multi_step=multi_step)(batch)["loss_reward"]
    loss.backward()
    assert model.reward_head.module.cell.weight_hh.grad.any()
    if multi_step:  # open loop: the head moves on what the dynamics predict
        step, rewards = model.encode(batch[:, 0].select("observation")), []
        for t in range(4):
            step = model.step(step.set("action", batch["action"][:, t]))
            rewards.append(step["next", "reward"])
            step = step.get("next").select(*model.latent_keys)
        error = torch.stack(rewards, 1) - batch["next", "reward"]
        torch.testing.assert_close(loss, error.pow(2).mean())


def test_compiled_steps_of_the_filter_give_the_same() -> None:
    model, batch = model_of(), data(2, 4)
    expected = model.observe(batch)
    found = model.compile_rollout(backend="eager").observe(batch)
    torch.testing.assert_close(found["lstm"], expected["lstm"])


@pytest.mark.parametrize("latent, state", KEYS)
def test_a_head_that_reads_what_the_dynamics_add(latent, state) -> None:
    """The encoder writes the latent, and the dynamics are needed all the same."""
    model, batch = model_of(latent, state), data(1, 3)
    move = model.dynamics.module

    def both(z, a):
        z = move(z, a)
        return z, 2 * z

    model.dynamics = Mod(
        both, [latent, "action"], [join("next", latent), ("next", "more")]
    )
    model.reward_head = Mod(
        model.reward_head.module,
        [("next", "more"), "action", state],
        [("next", "reward"), join("next", state)],
    )
    sequence = model.observe(batch)
    carried = TensorDict({}, [1])
    for t in range(3):
        carried.update(batch[:, t].select("observation"))
        carried["is_init"] = torch.full((1, 1), t == 0)
        carried = model.observer()(carried)
        torch.testing.assert_close(carried[state], sequence[state][:, t])
        carried.set("action", batch["action"][:, t])


def test_a_replaced_head_is_noticed() -> None:
    model, batch = model_of(), data(2, 4)
    before = model.observe(batch)["lstm"]
    model.reward_head.module.cell = nn.GRUCell(OBS + ACTION, MEMORY)
    assert not torch.allclose(model.observe(batch)["lstm"], before)


def test_the_imagined_env_moves_them() -> None:
    model = model_of()
    env = WorldModelEnv(model, SpecEnv())
    start = model.encode(data(1)[0].select("observation"))
    steps = env.rollout(3, tensordict=start)
    assert not torch.equal(steps["lstm"][1], steps["lstm"][2])
    torch.testing.assert_close(steps["lstm"][1:], steps["next", "lstm"][:-1])
