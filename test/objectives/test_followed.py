"""A loss and its model stay one: moved, copied, and with other networks inside."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from _models import ACTION, LATENT, linear, make_model, transitions
from _small_models import MAKE
from tensordict import TensorDict
from torch import nn
from torchrl.data import Bounded
from torchrl.envs import GymEnv

from torchrl_wm import WorldModelEnv, WorldModelLoss
from torchrl_wm.modules import Entry, fit_normalizers, QEnsemble
from torchrl_wm.objectives import ValueTerm


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


def value_loss() -> WorldModelLoss:
    action = Entry.from_spec("action", Bounded(-1.0, 1.0, (ACTION,)))
    q = QEnsemble({"latent": LATENT}, [action], num_cells=[8], dropout=0.0)
    policy = linear(["latent"], ["action"], [LATENT, ACTION])
    losses = ["reward", "latent", ValueTerm(q, policy)]
    return WorldModelLoss(make_model(), losses=losses, delay_encoder=True)


def test_every_tensor_stands_once_in_the_state() -> None:
    """The model's and the term's modules under their names, and the targets."""
    loss = value_loss()
    state = loss.state_dict(keep_vars=True)
    assert len({id(value) for value in state.values()}) == len(state)
    roots = [key.partition(".")[0] for key in state]
    targets = ["target_encoder_params", "target_q_ensemble_params"]
    expected = ["world_model", targets[0], "q_ensemble", targets[1]]
    assert list(dict.fromkeys(roots)) == expected
    parameters = list(loss.parameters())
    assert len({id(parameter) for parameter in parameters}) == len(parameters)


@pytest.mark.parametrize(
    "clone", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))]
)
def test_copies_share_nothing_and_keep_their_targets(clone) -> None:
    loss = value_loss()
    loss.target_q_ensemble_params.data.apply_(lambda x: x.fill_(0.5))
    other = clone(loss)
    assert other.q_ensemble is other.terms[-1].q_ensemble
    assert other.q_ensemble is not loss.q_ensemble
    other(transitions(3)).sum(reduce=True).backward()
    assert all(
        (v == 0.5).all() for v in other.target_q_ensemble_params.values(True, True)
    )
    assert all(p.grad is None for p in loss.parameters())
    assert any(p.grad is not None for p in other.q_ensemble.parameters())


@pytest.mark.parametrize("where", ["encoder", "network", "term"])
def test_targets_begin_anew_with_another_network(where) -> None:
    loss, batch = value_loss(), transitions(3)
    loss(batch)
    new = value_loss()
    if where == "encoder":
        loss.world_model.encoder = new.world_model.encoder
    elif where == "network":
        loss.world_model.encoder.module = new.world_model.encoder.module
    else:
        loss.terms[-1].q_ensemble = new.q_ensemble
    loss(batch)
    name = "q_ensemble" if where == "term" else "encoder"
    expected = TensorDict.from_module(getattr(new, name)).data
    assert (getattr(loss, f"target_{name}_params").data == expected).all()
    held = {id(parameter) for parameter in loss.parameters()}
    assert {id(parameter) for parameter in getattr(new, name).parameters()} <= held


def test_new_weights_are_no_other_network() -> None:
    """Targets stay what they were, as where weights are loaded."""
    loss = WorldModelLoss(make_model(), losses=["latent"], delay_encoder=True)
    before = loss.target_encoder_params.data.clone()
    loss.world_model.load_state_dict(make_model().state_dict())
    loss(transitions(3))
    assert (loss.target_encoder_params.data == before).all()


def test_targets_are_reset_with_their_networks() -> None:
    loss = value_loss()
    before = loss.target_encoder_params.data.clone()
    loss.reset_parameters_recursive()
    assert (loss.target_encoder_params.data == loss.encoder_params.data).all()
    assert not (loss.target_encoder_params.data == before).all()


def test_the_mode_of_the_loss_is_the_models() -> None:
    loss = value_loss()
    loss.eval()
    assert not loss.world_model.training and not loss.q_ensemble.training
