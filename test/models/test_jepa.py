"""The joint-embedding model, made from an env's specs."""

from __future__ import annotations

import pytest
import torch
from _built import CASES, DotEnv, made_env, sequences, train
from _models import SpecEnv
from gymnasium.utils.env_checker import check_env
from torchrl.data import Categorical, Composite, Unbounded
from torchrl.envs import GymEnv
from torchrl.envs.utils import check_env_specs

from torchrl_wm import GymWorldModelEnv, WorldModelEnv
from torchrl_wm.models import (
    JEPAConfig,
    load_world_model,
    make_jepa_world_model,
    save_world_model,
)
from torchrl_wm.modules import fit_normalizers
from torchrl_wm.planners import CEMPlanner, GoalDistance

SMALL = {"latent_size": 8, "hidden": (12,), "pixel_depth": 2, "projections": 16}
ALL = {**SMALL, "reward": True, "termination": "learned", "probe": True}
SEARCH = {"planning_horizon": 3, "optim_steps": 2, "num_candidates": 16, "top_k": 4}


@pytest.mark.parametrize("observations, action", CASES)
class TestSpecs:
    def test_env(self, observations, action) -> None:
        env = made_env(observations, action)
        world_model, _ = make_jepa_world_model(env, **ALL, normalize=False)
        starts = sequences(env, 9).exclude("next", "action")
        for size in ([], [2]):
            check_env_specs(
                WorldModelEnv(world_model, env, start_states=starts, batch_size=size)
            )
        seeing = WorldModelEnv(world_model, env, decode=True)
        out = seeing.imagine(3, tensordict=starts)
        assert (out["next", "latent"] != out["latent"]).any(-1).all()
        norm = out["next", "latent"].square().mean(-1)
        torch.testing.assert_close(norm, torch.ones(9, 3), atol=1e-3, rtol=0)

    @pytest.mark.parametrize("multi_step", [False, True])
    @pytest.mark.parametrize("regularizer", ["sigreg", "vicreg"])
    def test_loss(self, observations, action, regularizer, multi_step) -> None:
        env = made_env(observations, action)
        settings = {"regularizer": regularizer, "multi_step": multi_step}
        world_model, loss = make_jepa_world_model(env, **ALL, **settings)
        batch = sequences(env, 3, 4)
        fit_normalizers(world_model, batch)
        losses = loss(batch)
        names = {"latent", regularizer, "reward", "done", "probe"}
        assert set(losses.keys()) == {f"loss_{name}" for name in names}
        assert all(value.isfinite() for value in losses.values())
        losses.sum(reduce=True).backward()
        for module in world_model.components.values():
            assert any(p.grad is not None and p.grad.any() for p in module.parameters())


def test_class_numbers_are_encoded() -> None:
    """There is no decoder that could not tell them apart, but for a probe."""
    env = made_env()
    env.observation_spec = Composite(cell=Categorical(5), x=Unbounded((2,)))
    _, loss = make_jepa_world_model(env, **SMALL, normalize=False)
    assert loss(sequences(env, 4))["loss_sigreg"].isfinite()
    with pytest.raises(ValueError, match=r"\['cell'\] are class numbers"):
        make_jepa_world_model(env, **SMALL, probe=True)


NESTED = {
    "observation_key": ("robot", "seen"),
    "action_key": ("robot", "push"),
    "reward_key": ("robot", "gain"),
}


@pytest.mark.parametrize("keys", [{}, NESTED], ids=["plain", "nested"])
def test_it_asks_for_no_rewards(keys) -> None:
    """Neither in training nor in planning for a goal."""
    env = SpecEnv(**keys)
    world_model, loss = make_jepa_world_model(env, **SMALL)
    assert world_model.reward_head is world_model.done_head is None
    seen = keys.get("observation_key", "observation")
    batch = sequences(env, 6)
    fit_normalizers(world_model, batch)
    batch = batch.select(*env.action_keys, seen, ("next", *_tuple(seen)))
    losses = loss(batch)
    assert set(losses.keys()) == {"loss_latent", "loss_sigreg"}
    planner = CEMPlanner(
        WorldModelEnv(world_model, env),
        **SEARCH,
        score=GoalDistance("latent", goal={seen: "goal"}, steps="last"),
        action_key=env.action_key,
    )
    state = batch.select(seen).set("goal", batch.get(("next", *_tuple(seen))))
    assert planner(state).get(env.action_key).shape == (6, 2)
    with pytest.raises(ValueError, match="has no rewards"):
        CEMPlanner(WorldModelEnv(world_model, env), **SEARCH, action_key=env.action_key)


def _tuple(key) -> tuple:
    return key if isinstance(key, tuple) else (key,)


def test_both_sides_of_the_prediction_are_trained() -> None:
    env = made_env()
    world_model, loss = make_jepa_world_model(env, **SMALL, normalize=False)
    batch = sequences(env, 5)
    now = world_model.encode(batch.select("observation", "action"))
    predicted = world_model.step(now)["next", "latent"]
    target = world_model.encode(batch["next"].select("observation"))["latent"]
    expected = (predicted - target).square().mean()
    found = loss(batch)["loss_latent"]
    torch.testing.assert_close(found, expected)
    parameters = list(world_model.encoder.parameters())
    torch.testing.assert_close(
        torch.autograd.grad(found, parameters),
        torch.autograd.grad(expected, parameters),
    )


def test_a_probe_shapes_nothing() -> None:
    env = made_env()
    batch = sequences(env, 5)
    grads = []
    for probe in (False, True):
        torch.manual_seed(0)
        world_model, loss = make_jepa_world_model(
            env, **SMALL, normalize=False, regularizer="vicreg"
        )
        if probe:
            plain = world_model.state_dict()
            world_model, loss = make_jepa_world_model(
                env, **SMALL, normalize=False, regularizer="vicreg", probe=True
            )
            world_model.load_state_dict(plain, strict=False)
        torch.manual_seed(1)
        loss(batch).sum(reduce=True).backward()
        grads.append([p.grad for p in world_model.encoder.parameters()])
    torch.testing.assert_close(*grads)


def test_latents_keep_their_length_unless_told() -> None:
    env = made_env()
    starts = sequences(env, 4).exclude("next", "action")
    for unit in (True, False):
        world_model, _ = make_jepa_world_model(
            env, **SMALL, normalize=False, unit_latents=unit
        )
        out = WorldModelEnv(world_model, env).imagine(20, tensordict=starts)
        length = out["next", "latent"].square().mean(-1)
        assert bool(((length - 1).abs() < 1e-3).all()) is unit


@pytest.mark.parametrize("settings", [SMALL, ALL])
def test_files(settings, tmp_path) -> None:
    env = made_env("pixels and vector")
    world_model, _ = make_jepa_world_model(env, **settings)
    batch = sequences(env, 5)
    fit_normalizers(world_model, batch)
    save_world_model(world_model, tmp_path / "model.pt")
    loaded = load_world_model(tmp_path / "model.pt")
    assert loaded.recipe == world_model.recipe
    outs = [model(batch.exclude("next").clone()) for model in (world_model, loaded)]
    for key in outs[0].keys(True, True):
        assert torch.equal(outs[0].get(key), outs[1].get(key)), key


def test_gymnasium() -> None:
    env = made_env("pixels")
    starts = sequences(env, 9).exclude("next", "action")
    world_model, _ = make_jepa_world_model(env, **ALL, normalize=False)
    imagined = WorldModelEnv(
        world_model, env, start_states=starts, decode=True, max_steps=5
    )
    check_env(GymWorldModelEnv(imagined), skip_render_check=True)
    bare, _ = make_jepa_world_model(env, **SMALL)
    with pytest.raises(ValueError, match="predicts none.*reward_head"):
        GymWorldModelEnv(WorldModelEnv(bare, env, start_states=starts))


def test_the_paper_s_settings() -> None:
    config = JEPAConfig.le_world_model(hidden=(8,))
    assert (config.latent_size, config.projections, config.knots) == (192, 1024, 17)
    assert config.regularizer_weight == 0.09 and config.hidden == (8,)
    _, loss = make_jepa_world_model(GymEnv("Pendulum-v1"), config)
    term = loss.terms[1]
    assert (term.weight, term.projections, term.knots) == (0.09, 1024, 17)


class TestErrors:
    @pytest.mark.parametrize(
        "setting, message",
        [
            ({"latent_size": 1}, "latent_size must be at least 2, got 1"),
            ({"regularizer": "ema"}, "Unknown regularizer 'ema'"),
            ({"termination": "maybe"}, "Unknown termination 'maybe'"),
            ({"projections": 0}, "at least 1 projection.*projections=0"),
            ({"activation": "sine"}, "Unknown activation 'sine'"),
        ],
    )
    def test_settings(self, setting, message) -> None:
        with pytest.raises(ValueError, match=message):
            make_jepa_world_model(made_env(), **{**SMALL, **setting})

    def test_an_unknown_setting(self) -> None:
        with pytest.raises(TypeError, match="no setting 'rewards'. Did you mean"):
            make_jepa_world_model(made_env(), rewards=True)

    def test_a_goal_of_another_shape(self) -> None:
        env = made_env("pixels")
        world_model, _ = make_jepa_world_model(env, **SMALL)
        score = GoalDistance("latent", goal={"pixels": "goal"})
        planner = CEMPlanner(WorldModelEnv(world_model, env), **SEARCH, score=score)
        state = sequences(env, 2).select("pixels")
        state["goal"] = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
        with pytest.raises(ValueError, match=r"'goal'.*\(3, 8, 8\).*\(8, 8, 3\)"):
            planner(state)


def test_it_learns_where_the_dot_is() -> None:
    """From images and actions alone: a linear map reads the place, and the dot meets its goal."""
    torch.manual_seed(0)
    env = DotEnv()
    play = torch.stack([env.rollout(20) for _ in range(30)])
    world_model, loss = make_jepa_world_model(
        env,
        latent_size=16,
        hidden=(48,),
        pixel_depth=4,
        projections=64,
        multi_step=True,
    )
    train(loss, list(play), steps=250, rows=24, length=4, lr=3e-3, one_cycle=True)

    starts = torch.stack([env.reset() for _ in range(16)])
    goals = torch.stack([env.reset() for _ in range(16)])
    planner = CEMPlanner(
        WorldModelEnv(world_model, env),
        planning_horizon=4,
        optim_steps=4,
        num_candidates=64,
        top_k=8,
        score=GoalDistance("latent", goal={"pixels": "goal"}, steps="last"),
    )
    plans = planner.plan(starts.set("goal", goals["pixels"]))["actions"]
    before, after = [], []
    for start, goal, plan in zip(starts["pixels"], goals["pixels"], plans):
        place, target = middle(start), middle(goal)
        before.append((place - target).norm())
        for action in plan:
            place = (place + 0.5 * action).clamp(-0.9, 0.9)
        after.append((place - target).norm())
    before, after = torch.stack(before), torch.stack(after)
    assert after.mean() < 0.4 * before.mean()


def middle(image: torch.Tensor) -> torch.Tensor:
    """The place of the dot in an image ``[H, W, 1]``."""
    weight = image.squeeze(-1).float()
    axis = torch.linspace(-1, 1, len(weight))
    sums = weight.sum(1) @ axis, weight.sum(0) @ axis
    return torch.stack(sums) / weight.sum()


@pytest.mark.parametrize("regularizer", ["sigreg", "vicreg"])
def test_a_loss_step_is_one_graph(regularizer) -> None:
    env = made_env("pixels")
    _, loss = make_jepa_world_model(env, **SMALL, regularizer=regularizer)
    batch = sequences(env, 4, 3)
    batch["collector", "mask"] = torch.ones(4, 3, dtype=torch.bool)
    compiled = torch.compile(loss, backend="eager", fullgraph=True)
    values = []
    for module in (loss, compiled):
        torch.manual_seed(0)
        values.append(module(batch)[f"loss_{regularizer}"])
    torch.testing.assert_close(*values)
