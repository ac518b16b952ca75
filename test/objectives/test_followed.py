"""A loss and its model stay one: moved, copied, and with other networks inside."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from _models import LATENT, make_model, transitions
from _small_models import MAKE
from tensordict import TensorDict
from torch import nn
from torchrl.envs import GymEnv

from torchrl_wm import WorldModelEnv, WorldModelLoss
from torchrl_wm.modules import fit_normalizers


def _clone(module: nn.Module) -> None:
    """What ``.to(another device)`` does: parameters stay the objects they are, buffers do not."""
    module._apply(lambda tensor: tensor.clone())


MOVES = {
    "model": lambda wm, loss: _clone(wm),
    "loss": lambda wm, loss: _clone(loss),
    "both": lambda wm, loss: (_clone(wm), _clone(loss)),
    "components": lambda wm, loss: [_clone(m) for m in wm.components.values()],
    "model.double": lambda wm, loss: wm.double(),
    "loss.double": lambda wm, loss: loss.double(),
    "pickled": lambda wm, loss: None,
}


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "A normaliser is used")
        yield


@pytest.mark.parametrize("move", MOVES)
@pytest.mark.parametrize("name", ["mlp", "ensemble", "dreamer-v3"])
def test_a_loss_follows_its_model(name, move) -> None:
    """A loss reads what is fitted after a move, as one that is made then does."""
    env = GymEnv("Pendulum-v1")
    world_model, loss = MAKE[name](env)
    batch = env.rollout(40)
    if move == "pickled":
        loss = pickle.loads(pickle.dumps(loss))
        world_model = loss.world_model
        _clone(world_model)
    MOVES[move](world_model, loss)
    if "double" in move:
        batch = batch.apply(lambda x: x.double() if x.is_floating_point() else x)
    fit_normalizers(world_model, batch)
    outs = []
    for module in (loss, WorldModelLoss(world_model, losses=loss.terms)):
        torch.manual_seed(0)
        outs.append(module(batch))
    assert sorted(outs[0].keys()) == sorted(outs[1].keys())
    assert all(torch.equal(outs[0][key], outs[1][key]) for key in outs[0].keys())
    held = {id(p) for p in loss.parameters()}
    assert {id(p) for p in world_model.parameters()} <= held


def test_an_env_that_moves_the_model_moves_the_loss() -> None:
    env = GymEnv("Pendulum-v1")
    world_model, loss = MAKE["mlp"](env)
    WorldModelEnv(world_model, env)._apply(lambda tensor: tensor.clone())
    batch = env.rollout(40)
    fit_normalizers(world_model, batch)
    assert torch.equal(
        loss(batch)["loss_reward"],
        WorldModelLoss(world_model, losses=loss.terms)(batch)["loss_reward"],
    )


def test_a_compiled_loss_follows_a_model_that_was_moved_before() -> None:
    torch._dynamo.reset()
    env = GymEnv("Pendulum-v1")
    world_model, loss = MAKE["mlp"](env)
    _clone(world_model)
    batch = env.rollout(40)
    fit_normalizers(world_model, batch)
    compiled = torch.compile(loss, backend="eager", fullgraph=True)(batch)
    torch.testing.assert_close(compiled["loss_reward"], loss(batch)["loss_reward"])


@pytest.mark.parametrize("move", ["model", "loss", "model.double"])
def test_targets_stay_what_they_were(move) -> None:
    """... and go where the model goes."""
    loss = WorldModelLoss(make_model(), losses=["latent"], delay_encoder=True)
    loss.target_encoder_params.data.apply_(lambda x: x.fill_(0.5))
    MOVES[move](loss.world_model, loss)
    dtype = next(loss.world_model.parameters()).dtype
    for key, value in loss.target_encoder_params.items(True, True):
        assert (value == 0.5).all() and value.dtype is dtype, key
    batch = transitions(4)
    if dtype is torch.float64:
        batch = batch.apply(lambda x: x.double() if x.is_floating_point() else x)
    loss(batch)
    assert all((v == 0.5).all() for v in loss.target_encoder_params.values(True, True))


def test_a_copy_trains_its_own_model() -> None:
    loss = WorldModelLoss(make_model(), losses=["reward", "latent"], delay_encoder=True)
    loss.target_encoder_params.data.apply_(lambda x: x.fill_(0.5))
    other = copy.deepcopy(loss)
    mine = {id(p) for p in loss.parameters()}
    assert {id(p) for p in other.world_model.parameters()} <= {
        id(p) for p in other.parameters()
    }
    assert mine.isdisjoint(id(p) for p in other.parameters())
    assert all((v == 0.5).all() for v in other.target_encoder_params.values(True, True))
    before = copy.deepcopy(other.world_model.state_dict())
    optimizer = torch.optim.SGD(other.parameters(), 0.1)
    other(transitions(4)).sum(reduce=True).backward()
    optimizer.step()
    after = other.world_model.state_dict()
    assert any(not torch.equal(before[key], after[key]) for key in before)
    assert all(p.grad is None for p in loss.parameters())


@pytest.mark.parametrize("deeper", [False, True])
def test_a_network_replaced_inside_a_component(deeper) -> None:
    model = make_model()
    loss, batch = WorldModelLoss(model), transitions(4)
    loss(batch)
    net = nn.Linear(LATENT, 1)
    model.reward_head.module = nn.Sequential(net) if deeper else net
    expected = WorldModelLoss(model)(batch)["loss_reward"]
    assert torch.equal(loss(batch)["loss_reward"], expected)
    assert any(p is net.weight for p in loss.parameters())


def test_parameters_that_stand_in_for_a_while() -> None:
    """After them the loss is what it was."""
    model = make_model()
    loss, batch = WorldModelLoss(model), transitions(4)
    expected = loss(batch)["loss_reward"]
    held = [id(p) for p in loss.parameters()]
    zeros = TensorDict.from_module(model).data.apply(torch.zeros_like)
    with zeros.to_module(model):
        loss(batch)
    assert torch.equal(loss(batch)["loss_reward"], expected)
    assert [id(p) for p in loss.parameters()] == held
