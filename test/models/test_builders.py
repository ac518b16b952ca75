"""What holds of the models of transitions: ensembles, plain latents and joint embeddings."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from _env_kinds import drawn_transitions, env_of, OBSERVATIONS
from _wirings import ACTIONS
from envs.test_multi_agent import TeamEnv
from tensordict.nn import set_interaction_type
from torchrl.data import Composite, LazyTensorStorage, ReplayBuffer, Unbounded
from torchrl.envs import (
    Compose,
    DoubleToFloat,
    DTypeCastTransform,
    GymEnv,
    RewardSum,
    StepCounter,
    TransformedEnv,
)
from torchrl.envs.utils import check_env_specs

from torchrl_wm import WorldModelEnv, WorldModelLoss
from torchrl_wm.models import (
    EnsembleConfig,
    JEPAConfig,
    make_ensemble_world_model,
    make_jepa_world_model,
    make_mlp_world_model,
    MLPConfig,
)
from torchrl_wm.modules import fit_normalizers
from torchrl_wm.modules.blocks.ensemble_dynamics import PROPAGATIONS
from torchrl_wm.modules.keys import join

MAKE = {
    "ensemble": (
        make_ensemble_world_model,
        {"members": 3, "elites": 2, "hidden": (8,), "termination_hidden": (8,)},
    ),
    "jepa": (
        make_jepa_world_model,
        {
            "hidden": (8,),
            "latent_size": 4,
            "projections": 8,
            "reward": True,
            "termination": "learned",
            "probe": True,
        },
    ),
    "mlp": (make_mlp_world_model, {"hidden": (8,), "latent_size": 4}),
}


def make(name: str, env, **settings):
    builder, small = MAKE[name]
    return builder(env, **{**small, **settings})


def check_all_of_it(name: str, env, size, **settings) -> None:
    """One model, through loss, env, buffer."""
    world_model, loss = make(name, env, **settings)
    batch = drawn_transitions(env, 6, 2)
    fit_normalizers(world_model, batch)
    values = loss(batch)
    assert all(value.isfinite() for value in values.values())
    values.sum(reduce=True).backward()
    for part, module in world_model.components.items():
        grads = [p.grad for p in module.parameters()]
        assert not grads or any(g is not None and g.any() for g in grads), part
    starts = batch.select(*world_model.encoder.in_keys).reshape(-1)
    imagined = WorldModelEnv(
        world_model,
        env,
        batch_size=size,
        start_states=starts,
        decode=world_model.decoder is not None,
        max_steps=4,
    )
    check_env_specs(imagined)
    with torch.no_grad():
        out = imagined.imagine(3)
    assert out.shape == (*size, 3)
    assert imagined.rollout(2) is not None and imagined.slow_because in (
        None,
        "several groups of done entries can end",
    )
    buffer = ReplayBuffer(storage=LazyTensorStorage(10))
    buffer.extend(out.reshape(-1).exclude("collector"))
    again = loss(buffer.sample(4))
    assert all(value.isfinite() for value in again.values())


@pytest.mark.parametrize("name", sorted(MAKE))
@pytest.mark.parametrize("observations", sorted(OBSERVATIONS))
@pytest.mark.parametrize("actions", sorted(ACTIONS))
def test_every_kind_of_env(name, observations, actions) -> None:
    check_all_of_it(name, env_of(observations, actions), ())


@pytest.mark.parametrize("name", sorted(MAKE))
@pytest.mark.parametrize("size", [(3,), (2, 2)])
@pytest.mark.parametrize("nested", [False, True])
def test_batched_and_nested_envs(name, size, nested) -> None:
    check_all_of_it(
        name, env_of("dictionary", "categorical", size, nested=nested), size
    )


@pytest.mark.parametrize("propagation", PROPAGATIONS)
@pytest.mark.parametrize("size", [(), (3,)])
def test_every_propagation(propagation, size) -> None:
    env = env_of("dictionary", "categorical", size)
    check_all_of_it("ensemble", env, size, propagation=propagation)


@pytest.mark.parametrize("name", sorted(MAKE))
def test_settings_by_config_and_by_name(name) -> None:
    env = GymEnv("CartPole-v1")
    kind = {"ensemble": EnsembleConfig, "jepa": JEPAConfig, "mlp": MLPConfig}[name]
    builder = MAKE[name][0]
    config = kind(hidden=(8,), activation="relu")
    world_model, _ = builder(env, config, hidden=(16,))
    assert world_model.recipe.config == kind(hidden=(16,), activation="relu")
    assert config.hidden == (8,), "the given config was changed"
    with pytest.raises(TypeError, match="no setting 'hiddens'. Did you mean 'hidden'"):
        builder(env, hiddens=(8,))
    with pytest.raises(TypeError, match=f"config must be a {kind.__name__}, got dict"):
        builder(env, {"hidden": (8,)})
    with pytest.raises(ValueError, match="Unknown activation 'sine'"):
        builder(env, activation="sine")
    with pytest.raises(ValueError, match="Unknown termination 'maybe'"):
        builder(env, termination="maybe")
    with pytest.raises(TypeError, match="GymWrapper"):
        builder(env._env)


@pytest.mark.parametrize("name", sorted(MAKE))
def test_no_termination_head_if_none_is_wanted(name) -> None:
    env = GymEnv("Pendulum-v1")
    world_model, loss = make(name, env, termination="none")
    assert world_model.done_head is None and "loss_done" not in loss.out_keys


@pytest.mark.parametrize("name", sorted(MAKE))
def test_terminations_by_a_threshold_or_by_chance(name) -> None:
    env = GymEnv("CartPole-v1")
    eager, _ = make(name, env, termination_threshold=0.01)
    late, _ = make(name, env, termination_threshold=0.99)
    batch = env.rollout(30, break_when_any_done=False)
    for model, expected in ((eager, True), (late, False)):
        fit_normalizers(model, batch)
        ended = model(batch.exclude("next"))["next", "terminated"]
        assert ended.all() == expected and ended.any() == expected
    chance, _ = make(name, env, sample_termination=True)
    fit_normalizers(chance, batch)
    declared = Composite(continue_prob=Unbounded((1,)))
    imagined = WorldModelEnv(chance, env, observation_spec=declared).imagine(
        50, tensordict=batch.exclude("next")
    )
    rate = imagined["next", "terminated"].float().mean()
    assert abs(rate - (1 - imagined["next", "continue_prob"]).mean()) < 0.05


@pytest.mark.parametrize("name", sorted(MAKE))
def test_training_draws_and_copies_are_sound(name) -> None:
    env = GymEnv("CartPole-v1")
    world_model, loss = make(name, env)
    batch = env.rollout(10, break_when_any_done=False)
    fit_normalizers(world_model, batch)
    state = world_model.state_dict()
    assert len({v.data_ptr() for v in state.values()}) == len(
        state
    ), "tensors stand twice"
    twin = copy.deepcopy(loss)
    torch.manual_seed(0)
    one = loss(batch)
    torch.manual_seed(0)
    other = twin(batch)
    assert all(torch.equal(one[key], other[key]) for key in one.keys())
    mask = torch.arange(10) < 5
    masked = batch.clone().set(("collector", "mask"), mask)
    masked["observation"][5:] = float("nan")
    assert all(value.isfinite() for value in loss(masked).values())
    weighed = loss(batch.clone().set("weight", torch.zeros(10)))
    assert all(value == 0 for value in weighed.values())
    assert join("next", "reward") in loss.in_keys


def test_imagined_and_real_transitions_share_a_buffer() -> None:
    env = GymEnv("CartPole-v1")
    world_model, _ = make("ensemble", env)
    real = env.rollout(20, break_when_any_done=False)
    fit_normalizers(world_model, real)
    imagined_env = WorldModelEnv(world_model, env)
    with torch.no_grad():
        imagined = imagined_env.imagine(3, tensordict=real.exclude("next"))
    imagined = imagined.reshape(-1).exclude("collector")
    for one, other in ((real, imagined), (real["next"], imagined["next"])):
        assert set(one.keys()) == set(other.keys())
        for key in one.keys():
            if key != "next":
                assert one[key].dtype == other[key].dtype
                assert one[key].shape[1:] == other[key].shape[1:]
    buffer = ReplayBuffer(storage=LazyTensorStorage(100))
    buffer.extend(real.reshape(-1))
    buffer.extend(imagined)
    assert len(buffer) == 80


@pytest.mark.parametrize("propagation", ["ts1", "tsinf", "expectation", "mean"])
def test_an_ensemble_imagines_in_one_graph(propagation) -> None:
    env = GymEnv("CartPole-v1")
    world_model, _ = make("ensemble", env, propagation=propagation)
    start = env.rollout(6, break_when_any_done=False).exclude("next")
    imagined = WorldModelEnv(world_model, env)
    with pytest.warns(UserWarning, match="before it is fitted"):
        imagined.imagine(1, tensordict=start)
    outs = []
    for compiled in (False, True):
        if compiled:
            imagined.compile(backend="eager")
        torch.manual_seed(0)
        outs.append(imagined.imagine(3, tensordict=start)["next", "observation"])
    torch.testing.assert_close(*outs)


@pytest.mark.parametrize("name", sorted(MAKE))
def test_sequences_open_loop(name) -> None:
    env = GymEnv("Pendulum-v1")
    data = env.rollout(40).reshape(8, 5)
    if name != "ensemble":
        world_model, loss = make(name, env, multi_step=True, decay=0.5)
    else:
        world_model, loss = make(name, env)
        loss = WorldModelLoss(world_model, losses=loss.terms, multi_step=True)
    fit_normalizers(world_model, data)
    values = loss(data)
    assert all(value.isfinite() for value in values.values())
    values.sum(reduce=True).backward()
    assert any(p.grad is not None and p.grad.any() for p in world_model.parameters())


@pytest.mark.parametrize("name", sorted(MAKE))
@pytest.mark.parametrize("done", [("root",), ("agents",), ("agents", "root")])
def test_teams_of_agents(name, done) -> None:
    env = TeamEnv(done=done)
    world_model, loss = make(name, env)
    batch = drawn_transitions(env, 6)
    fit_normalizers(world_model, batch)
    values = loss(batch)
    assert all(value.isfinite() for value in values.values())
    imagined = WorldModelEnv(
        world_model, env, start_states=batch.select(("agents", "observation"))
    )
    check_env_specs(imagined)
    out = imagined.imagine(3)
    assert out["next", "agents", "reward"].shape == (3, 3, 1)
    assert out["agents"].batch_size == (3, 3)


def test_how_many_members_are_elites() -> None:
    env = GymEnv("CartPole-v1")
    for members, elites, count in ((7, None, 5), (3, None, 3), (1, None, 1), (4, 2, 2)):
        world_model, _ = make("ensemble", env, members=members, elites=elites)
        assert len(world_model.dynamics.elites) == count
    with pytest.raises(ValueError, match="between 1 and the 3 members, got 4"):
        make("ensemble", env, members=3, elites=4)


@pytest.mark.parametrize("name", sorted(MAKE))
def test_networks_without_hidden_layers(name) -> None:
    env = GymEnv("CartPole-v1")
    world_model, loss = make(name, env, hidden=())
    batch = env.rollout(10, break_when_any_done=False)
    fit_normalizers(world_model, batch)
    assert all(value.isfinite() for value in loss(batch).values())


def test_plain_latents_keep_their_size() -> None:
    """Without it they grow in training until the model breaks."""
    env = GymEnv("CartPole-v1")
    world_model, _ = make("mlp", env)
    imagined = WorldModelEnv(world_model, env, start_states=env).imagine(20)
    for latent in (imagined["latent"], imagined["next", "latent"]):
        size = latent.pow(2).mean(-1)
        assert torch.allclose(size, torch.ones_like(size), atol=1e-3)
    with pytest.raises(ValueError, match="latent_size must be at least 2, got 1"):
        make("mlp", env, latent_size=1)


def test_observations_that_are_no_floats() -> None:
    env = GymEnv("FrozenLake-v1")  # a one-hot vector of integers
    batch = env.rollout(20, break_when_any_done=False)
    with pytest.raises(
        ValueError, match=r"cannot serve 'observation' \[16\] torch.int64"
    ):
        make("ensemble", env)
    world_model, loss = make("mlp", env)
    fit_normalizers(world_model, batch)
    assert all(value.isfinite() for value in loss(batch).values())
    check_env_specs(WorldModelEnv(world_model, env, start_states=env))
    numbers = GymEnv("FrozenLake-v1", categorical_action_encoding=True)
    with pytest.raises(ValueError, match=r"\['observation'\] are class numbers"):
        make("mlp", numbers)


def test_what_transforms_count_is_left_alone() -> None:
    env = TransformedEnv(
        GymEnv("Pendulum-v1"), Compose(StepCounter(), DoubleToFloat(), RewardSum())
    )
    world_model, loss = make("ensemble", env)
    batch = env.rollout(20)
    fit_normalizers(world_model, batch)
    assert all(value.isfinite() for value in loss(batch).values())
    assert world_model.latent_keys == ["observation"]


@pytest.mark.parametrize("name", sorted(MAKE))
def test_observations_of_doubles(name) -> None:
    """As MuJoCo's are."""
    env = TransformedEnv(
        GymEnv("Pendulum-v1"),
        DTypeCastTransform(torch.float32, torch.float64, in_keys=["observation"]),
    )
    world_model, loss = make(name, env)
    batch = env.rollout(20)
    assert batch["observation"].dtype is torch.float64
    fit_normalizers(world_model, batch)
    assert all(value.isfinite() for value in loss(batch).values())
    imagined = WorldModelEnv(
        world_model, env, start_states=batch, decode=world_model.decoder is not None
    )
    check_env_specs(imagined)
    assert imagined.rollout(3)["next", "observation"].dtype is torch.float64


@pytest.mark.parametrize("name", sorted(MAKE))
def test_models_reach_other_processes(name) -> None:
    env = GymEnv("CartPole-v1")
    world_model, _ = make(name, env)
    batch = env.rollout(10, break_when_any_done=False)
    fit_normalizers(world_model, batch)
    twin = pickle.loads(pickle.dumps(world_model))
    actions = batch.exclude("next")
    with set_interaction_type("deterministic"), torch.no_grad():
        torch.manual_seed(0)
        one = world_model(actions.clone())["next", "reward"]
        torch.manual_seed(0)
        other = twin(actions.clone())["next", "reward"]
    assert torch.equal(one, other) and twin.recipe == world_model.recipe


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("propagation", PROPAGATIONS)
def test_an_ensemble_of_one_works(propagation, nested) -> None:
    env = env_of("nested" if nested else "vector", "bounded", nested=nested)
    settings = {"members": 1, "elites": None, "propagation": propagation}
    world_model, loss = make("ensemble", env, **settings)
    batch = drawn_transitions(env, 20)
    fit_normalizers(world_model, batch)
    loss(batch).sum(reduce=True).backward()
    world_model.dynamics.choose_elites(batch)
    predicted = world_model.dynamics(batch.exclude("next"))["next"]
    assert not predicted["disagreement"].any()  # with whom?
    starts = batch.select(*world_model.encoder.in_keys)
    out = WorldModelEnv(world_model, env, start_states=starts).rollout(3)
    assert all(value.isfinite().all() for value in out.values(True, True))
