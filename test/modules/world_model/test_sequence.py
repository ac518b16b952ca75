"""Sequences filtered in one parallel pass: equal to the steps, in values and gradients."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from _models import SpecEnv
from hypothesis import given, settings, strategies as st
from tensordict import TensorDict
from tensordict.nn import TensorDictModule as Mod
from torch import nn

from torchrl_wm import WorldModel, WorldModelEnv, WorldModelLoss
from torchrl_wm.modules import check_sequence
from torchrl_wm.modules.keys import join
from torchrl_wm.modules.modes import evaluation_mode

OBS, ACTION, HIDDEN = 6, 2, 5
NAMES = [("latent", "hidden"), (("deep", "latent"), ("deep", "hidden"))]


class Recurrence(nn.Module):
    """A linear recurrence: ``h' = decay h + W [z, a]``, and the latent that it predicts."""

    def __init__(self) -> None:
        super().__init__()
        self.decay = nn.Parameter(torch.linspace(0.3, 0.9, HIDDEN))
        self.inputs = nn.Linear(OBS + ACTION, HIDDEN)
        self.read = nn.Linear(HIDDEN, OBS)

    def forward(self, latent, hidden, action):
        hidden = self.decay * hidden + self.inputs(torch.cat([latent, action], -1))
        return self.read(hidden), hidden


class Parallel(nn.Module):
    """The same over ``[B, T]``, without a loop: every step sees all before it, by powers."""

    def __init__(self, step: Recurrence) -> None:
        super().__init__()
        self.step = step

    def forward(self, latent, hidden, action, is_init):
        step, length = self.step, latent.shape[1]
        new = step.inputs(torch.cat([latent, action], -1))
        # What was carried into a step stands at the first step, and where an episode begins.
        new = new + step.decay * hidden
        episode = is_init.squeeze(-1).cumsum(1)
        time = torch.arange(length)
        power = (time[:, None] - time).clamp_min(0)
        weight = step.decay ** power.unsqueeze(-1)
        seen = (time[:, None] >= time) & (episode[:, :, None] == episode[:, None])
        out = torch.einsum("tsh,bts,bsh->bth", weight, seen.float(), new)
        return step.read(out), out


def model_of(latent="latent", hidden="hidden", parallel: bool = True) -> WorldModel:
    torch.manual_seed(0)
    step = Recurrence()
    places = [join("next", latent), join("next", hidden)]
    sequence = None
    if parallel:
        reads = [latent, hidden, "action", "is_init"]
        sequence = Mod(Parallel(step), reads, places)
    return WorldModel(
        Mod(nn.Linear(OBS, OBS), ["observation"], [latent]),
        Mod(step, [latent, hidden, "action"], places),
        Mod(nn.Linear(HIDDEN, 1), [join("next", hidden)], [("next", "reward")]),
        initial_state=TensorDict({hidden: torch.ones(HIDDEN)}),
        sequence=sequence,
    )


def data(*size: int, begins=()) -> TensorDict:
    torch.manual_seed(1)
    is_init = torch.zeros(*size, 1, dtype=torch.bool)
    for index in begins:
        is_init[index] = True
    return TensorDict(
        {
            "observation": torch.randn(*size, OBS),
            "action": torch.randn(*size, ACTION),
            "is_init": is_init,
            "next": {
                "observation": torch.randn(*size, OBS),
                "reward": torch.randn(*size, 1),
            },
        },
        size,
    )


@pytest.mark.parametrize("latent, hidden", NAMES)
@pytest.mark.parametrize("stored", [False, True])
def test_it_filters_as_the_steps_do(latent, hidden, stored) -> None:
    batch = data(3, 6, begins=[(0, 0), (1, 3), (2, 1), (2, 5)])
    if stored:  # the slices begin within episodes
        batch[hidden] = torch.randn(3, 6, HIDDEN)
        batch[latent] = torch.randn(3, 6, OBS)
    model = model_of(latent, hidden)
    check_sequence(model, batch)
    found = model.observe(batch)
    expected = model_of(latent, hidden, parallel=False).observe(batch)
    assert set(found.keys(True, True)) == set(expected.keys(True, True))
    for key in expected.keys(True, True):
        torch.testing.assert_close(found[key], expected[key])


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 5)), max_size=5))
def test_wherever_episodes_begin(begins) -> None:
    check_sequence(model_of(), data(2, 6, begins=begins))


def test_without_a_loop() -> None:
    """No step is made: neither under observe nor in the loss."""
    model, batch = model_of(), data(2, 6)
    model.dynamics.register_forward_hook(lambda *_: pytest.fail("a step was made"))
    model.observe(batch)
    WorldModelLoss(model)(batch)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_losses_and_gradients_are_those_of_the_steps(reduction) -> None:
    batch, grads = data(2, 6, begins=[(1, 2)]), []
    for parallel in (True, False):
        model = model_of(parallel=parallel)
        loss = WorldModelLoss(model, losses=["reward", "latent"], reduction=reduction)
        out = loss(batch)
        out.sum(reduce=True).backward()
        grads.append([out["loss_reward"], *(p.grad for p in model.parameters())])
    for one, other in zip(*grads):
        torch.testing.assert_close(one, other)


def test_its_tensors_are_those_of_the_step() -> None:
    model, alone = model_of(), model_of(parallel=False)
    assert model.state_dict().keys() == alone.state_dict().keys()
    assert len(list(model.parameters())) == len(list(alone.parameters()))
    for made in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert made.sequence.module.step is made.dynamics.module
        with torch.no_grad():
            made.dynamics.module.decay.mul_(0.5)
        check_sequence(made, data(2, 4))
    assert "sequence" in repr(model) and "shared" in repr(model)


def test_imagining_makes_steps() -> None:
    model = model_of()
    env = WorldModelEnv(model, SpecEnv())
    observed = TensorDict({"observation": torch.randn(OBS)})
    assert env.rollout(4, tensordict=model.encode(observed))["hidden"].shape == (4, 5)


def test_a_difference_is_named() -> None:
    model = model_of()
    forward = Parallel.forward
    wrong = model.sequence.module

    def late(latent, hidden, action, is_init):
        read, out = forward(wrong, latent, hidden, action, is_init)
        return read, torch.cat([out[:, :3], out[:, 3:] + 0.25], 1)

    wrong.forward = late
    with pytest.raises(ValueError, match=r"'hidden'.*from step 3 on, by 0.25"):
        check_sequence(model, data(2, 6))
    with pytest.raises(ValueError, match="no sequence to check"):
        check_sequence(model_of(parallel=False), data(2, 6))


def test_a_difference_without_feature_dims_is_named() -> None:
    first = Mod(lambda total, seen: total + seen, ["total", "seen"], ["total"])
    model = WorldModel(
        Mod(lambda o: o[..., 0], ["observation"], ["seen"]),
        Mod(lambda total, a: total.clone(), ["total", "action"], [("next", "total")]),
        posterior=Mod(
            first.module, [("next", "total"), ("next", "seen")], [("next", "total")]
        ),
        initial_state={"total": torch.zeros(())},
        sequence=Mod(
            lambda total, seen: total[:, :1]
            + seen.cumsum(1)
            + (seen.cumsum(1) * 0 + 1),
            ["total", ("next", "seen")],
            [("next", "total")],
        ),
    )
    with pytest.raises(ValueError, match="'total'.*from step 0 on, by 1"):
        check_sequence(model, data(2, 4).exclude("is_init"))


def test_its_mode_is_the_models() -> None:
    model = model_of()
    model.eval()
    assert not model.sequence.training and not model.sequence.module.training
    model.train()
    with evaluation_mode(model):
        assert not model.sequence.module.training
    assert model.sequence.module.training and model.sequence.training


def test_bad_modules_are_refused() -> None:
    model = model_of()
    step = model.dynamics.module
    places = [("next", "latent"), ("next", "hidden")]
    reads = ["latent", "hidden", "action", "is_init"]

    def with_(module, in_keys=reads, out_keys=places):
        model.sequence = Mod(module, in_keys, out_keys)
        return model.latent_keys

    with pytest.raises(ValueError, match="reads.*'goal'"):
        with_(Parallel(step), [*reads, "goal"])
    with pytest.raises(ValueError, match=r"lacks \[\('next', 'hidden'\)\]"):
        with_(Parallel(step), out_keys=[("next", "latent")])
    with pytest.raises(ValueError, match=r"tensors of its own.*decay"):
        with_(Parallel(Recurrence()))
    with pytest.raises(TypeError, match="sequence must be a TensorDictModule"):
        model.sequence = Parallel(step)


def test_the_sequence_follows_replaced_components() -> None:
    model, batch = model_of(), data(2, 4)
    step = Recurrence()
    reads = model.dynamics.in_keys
    model.dynamics = Mod(step, reads, [("next", "latent"), ("next", "hidden")])
    with pytest.raises(ValueError, match="tensors of its own"):
        model.observe(batch)
    model.sequence = None
    model.observe(batch)
