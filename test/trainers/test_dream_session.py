"""Dreams that one steps by hand: what both sides show, and that it is what the envs do."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from _env_kinds import Dot, drawn_transitions, env_of
from _memory_models import data as memory_data, model_of
from _models import SpecEnv
from _real_envs import (
    DREAMER,
    make_nested,
    make_reacher,
    MBPO,
    PETS,
    PLANET,
    Reacher1D,
    TDMPC2,
    TRANSFORMER,
)
from _small_models import MAKE
from PIL import Image
from tensordict import TensorDict
from tensordict.nn import TensorDictModule as Mod, TensorDictSequential
from torch import nn
from torchrl.envs import GymEnv, GymWrapper

from torchrl_wm import WorldModelEnv
from torchrl_wm.modules import fit_normalizers
from torchrl_wm.modules.keys import as_tuple, join, unique
from torchrl_wm.trainers import (
    dream_of_run,
    DreamerTrainer,
    DreamSession,
    make_real_env,
    MBPOTrainer,
    PETSTrainer,
    PlaNetTrainer,
    start_run,
    TDMPC2Trainer,
)


def small_model(real_env, name="mlp", **settings):
    """A model without noise, and its imagined env."""
    torch.manual_seed(0)
    if name == "ensemble":
        settings = {"propagation": "mean", **settings}
    if name in ("ensemble", "mlp"):
        settings["termination"] = "none"
    model, _ = MAKE[name](real_env, **settings)
    if name in ("ensemble", "mlp"):
        fit_normalizers(model, real_env.rollout(20))
    return WorldModelEnv(model, real_env, decode=model.decoder is not None)


def picture(view) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(view.frame)))


@pytest.mark.parametrize(
    "make, numbers",
    [
        (lambda: GymEnv("Pendulum-v1"), [[0.5], [-2.0], [1.25], [0.0]]),
        (lambda: GymEnv("CartPole-v1"), [[1], [0], [0], [1]]),
        (make_nested, [[0.5], [-2.0], [1.25], [0.0]]),
    ],
    ids=["bounded", "choice", "nested"],
)
@pytest.mark.parametrize("name", ["ensemble", "mlp"])
def test_a_dream_is_a_rollout_of_each_env(make, numbers, name) -> None:
    real_env = make()
    env = small_model(real_env, name)
    session = DreamSession(env, real_env=real_env, seed=3)
    for action in numbers:
        session.step(action)

    def repeat():
        left = iter([session.controls.actions(row)[0] for row in numbers])
        return lambda td: td.update(next(left))

    other = make()
    other.set_seed(3)
    start = other.reset()
    real = other.rollout(4, repeat(), auto_reset=False, tensordict=start.copy())
    with torch.no_grad():
        imagined = env.rollout(4, repeat(), tensordict=start)
    entry = unique(env.world_model.encoder.in_keys)[0]
    shown = ".".join(as_tuple(entry))
    reward = join("next", env.reward_key)
    for time, moment in enumerate(session.moments[1:]):
        assert moment.step == time + 1 and moment.actor == "you"
        assert moment.action == pytest.approx(numbers[time])
        for side, rollout in ((moment.imagined, imagined), (moment.real, real)):
            assert side.reward == pytest.approx(float(rollout[time][reward]), abs=1e-5)
            total = float(rollout[: time + 1][reward].sum())
            assert side.total == pytest.approx(total, abs=1e-4)
        assert moment.real.values[shown] == pytest.approx(
            real[time]["next"].get(entry).tolist(), abs=1e-5
        )
        if entry in env.observation_spec.keys(True, True):
            assert moment.imagined.values[shown] == pytest.approx(
                imagined[time]["next"].get(entry).tolist(), abs=1e-5
            )


@pytest.mark.parametrize(
    "actions", ["categorical", "multi-one-hot", "multi-categorical", "binary", "matrix"]
)
def test_actions_of_any_kind_are_set_by_numbers(actions) -> None:
    reference = env_of("dictionary", actions, nested=True)
    torch.manual_seed(0)
    model, _ = MAKE["ensemble"](
        reference, termination="none", normalize=False, propagation="mean"
    )
    env = WorldModelEnv(model, reference)
    session = DreamSession(env, data=drawn_transitions(reference, 30))
    assert session.controls.all and not session.has_real
    for _ in range(5):
        moment = session.step("random")
        again = session.controls.actions(moment.action)
        assert session.controls.numbers(again) == moment.action
        assert env.full_action_spec_unbatched.is_in(again[0])


def test_actions_that_are_not_valid_are_named() -> None:
    pendulum = DreamSession(
        small_model(GymEnv("Pendulum-v1")), real_env=GymEnv("Pendulum-v1")
    )
    cart = DreamSession(
        small_model(GymEnv("CartPole-v1")), real_env=GymEnv("CartPole-v1")
    )
    for session, action, said in (
        (pendulum, [2.5], "action must be a number from -2 up to 2, got 2.5"),
        (pendulum, [float("nan")], "got nan"),
        (pendulum, [0.0, 0.0], "a list of 1 numbers"),
        (pendulum, ["left"], "must be a number, got 'left'"),
        (pendulum, [True], "must be a number, got True"),
        (pendulum, "policy", "There is no policy"),
        (pendulum, "left", "An action is"),
        (cart, [2], "a whole number from 0 up to 1, got 2"),
        (cart, [0.5], "a whole number"),
    ):
        with pytest.raises(ValueError, match=said):
            session.step(action)
        assert len(session.moments) == 1
    with pytest.raises(ValueError, match="seed must be"):
        pendulum.reset(-1)


def test_a_seed_and_the_actions_say_all(tmp_path) -> None:
    real_env = make_real_env("Pendulum-v1", max_episode_steps=10)
    env = small_model(real_env, "ensemble", propagation="ts1")
    session = DreamSession(env, real_env=real_env, seed=5)
    before = torch.get_rng_state()
    for action in ([1.0], "random", "random"):
        session.step(action)
    first = list(session.moments)
    session.reset()
    for moment in first[1:]:
        session.step(moment.action)
    assert [m.imagined for m in session.moments] == [m.imagined for m in first]
    assert [m.real for m in session.moments] == [m.real for m in first]
    assert (torch.get_rng_state() == before).all()
    assert session.reset(6).real != first[0].real
    assert session.seed == 6 and session.reset().real == session.moments[0].real


def test_back_takes_back_steps_and_looks() -> None:
    real_env = make_real_env("Pendulum-v1")
    session = DreamSession(
        small_model(real_env, "ensemble", propagation="ts1"), real_env=real_env
    )
    with pytest.raises(RuntimeError, match="This is the start"):
        session.back()
    for _ in range(3):
        session.step([1.0])
    looked = session.look()
    assert looked.step == 3 and looked.action is None and looked.disagreement is None
    assert looked.imagined.values == looked.real.values
    assert looked.imagined.total == session.moments[-2].imagined.total
    after = session.step([0.5])
    assert session.back() == looked
    assert session.step([0.5]) == after
    session.back()
    third = session.moments[-2]
    assert session.back() == third
    fourth = session.step([0.5])
    assert fourth.real == after.real and fourth.imagined != after.imagined


class Failing(Reacher1D):
    broken = False

    def step(self, action):
        if self.broken:
            raise OSError("the motor is on fire")
        return super().step(action)


def test_a_step_that_fails_leaves_both_sides_where_they_were() -> None:
    inner = Failing()
    real_env = make_real_env(inner)
    session = DreamSession(small_model(real_env, "ensemble"), real_env=real_env)
    session.step([0.5])
    expected = session.step([1.0])
    session.back()
    inner.broken = True
    for _ in range(2):
        with pytest.raises(OSError, match="on fire"):
            session.step([1.0])
    inner.broken = False
    assert len(session.moments) == 2
    assert session.step([1.0]) == expected


def test_a_picture_or_a_start_that_fails_leaves_the_episode_as_it_was() -> None:
    broken = []

    def render(observation):
        if broken:
            raise OSError("no pen")
        return np.zeros((4, 4, 3), np.uint8)

    real_env = make_real_env("Pendulum-v1")
    env = small_model(real_env, "ensemble", propagation="ts1")
    session = DreamSession(env, real_env=real_env, render=render)
    session.step([0.5])
    expected = session.step([1.0])
    session.back()
    broken.append(True)
    for fails in (
        lambda: session.step([1.0]),
        lambda: session.look(),
        lambda: session.reset(3),
    ):
        with pytest.raises(OSError, match="no pen"):
            fails()
    broken.clear()
    for seed in (2**32, 10**400):
        with pytest.raises(ValueError, match=r"seed must be .* to 2\*\*32 - 1"):
            session.reset(seed)
    assert session.seed == 0 and len(session.moments) == 2
    assert session.step([1.0]) == expected
    assert session.back() == session.moments[1] and session.back().step == 0


def test_a_look_draws_the_same_again() -> None:
    real_env = make_real_env("Pendulum-v1")
    env = small_model(real_env, "ensemble", propagation="tsinf")
    session = DreamSession(env, real_env=real_env)
    before = torch.get_rng_state()
    session.step([1.0])
    session.look()
    after = session.step([0.5])
    assert torch.equal(torch.get_rng_state(), before)
    for _ in range(6):
        torch.rand(1)
        session.back()
        assert session.step([0.5]) == after


def test_a_policy_that_writes_observations_anew_reads_the_newest() -> None:
    real_env = make_real_env("Pendulum-v1")
    halved = Mod(lambda x: x / 2, ["observation"], ["observation"])
    policy = TensorDictSequential(halved, Mod(Reads(), ["observation"], ["action"]))
    env = small_model(real_env, "ensemble")
    session = DreamSession(env, real_env=real_env, policy=policy)
    for _ in range(3):
        shown = session.moments[-1].imagined.values["observation"]
        assert session.step().action == pytest.approx([shown[0] / 2])


def ends_beyond(limit: float) -> Mod:
    return Mod(
        lambda place: place.abs() > limit,
        [("next", "place")],
        [("next", "terminated")],
    )


def test_each_side_goes_on_to_its_own_end() -> None:
    real_env = make_real_env(make_reacher, max_episode_steps=6)
    env = small_model(real_env, "ensemble")
    env.world_model.done_head = ends_beyond(0.0)
    env = WorldModelEnv(env.world_model, real_env)
    session = DreamSession(env, real_env=real_env)
    moment = session.step([0.0])
    assert moment.imagined.terminated and not moment.real.ended
    later = session.step([0.0])
    assert later.imagined.reward is None and later.real.reward is not None
    assert later.imagined.total == moment.imagined.total
    assert later.disagreement is None
    assert not session.look().imagined.ended
    while not session.is_over:
        last = session.step([0.0])
    assert last.step == 6 and last.real.truncated and not last.real.terminated
    with pytest.raises(RuntimeError, match="over after 6 steps"):
        session.step([0.0])
    with pytest.raises(RuntimeError, match="The real episode has ended"):
        session.look()
    assert not session.back().real.ended


def test_images_are_shown_as_they_are() -> None:
    real_env = GymWrapper(Dot())
    torch.manual_seed(0)
    model, _ = MAKE["dreamer-v3"](real_env, pixel_depth=2)
    env = WorldModelEnv(model, real_env, decode=True)
    session = DreamSession(env, real_env=real_env, burn_in=2)
    start = session.moments[0]
    assert start.step == 0 and start.real.total == 0.0
    seen = session._real.root["view"].numpy()
    assert (picture(start.real) == seen).all()
    assert (picture(start.imagined) == seen).all()
    moment = session.step([0.5, -0.5])
    decoded = session._imagined.state["view"][0].clamp(0, 255).round().numpy()
    assert np.abs(picture(moment.imagined).astype(int) - decoded).max() <= 1
    assert (picture(moment.real) == session._real.root["view"].numpy()).all()
    assert session.names == {} and not session.notes


def test_observations_are_drawn_by_a_function() -> None:
    real_env = make_real_env(make_reacher)
    given = []

    def render(observation):
        given.append(observation)
        return np.full((4, 6, 3), 10 * len(given), np.uint8)

    labels = {"place": ["metres"]}
    session = DreamSession(
        small_model(real_env, "ensemble"),
        real_env=real_env,
        render=render,
        labels=labels,
    )
    assert [set(one) for one in given] == [{"place", "speed"}] * 2
    assert picture(session.moments[0].imagined).shape == (4, 6, 3)
    assert session.names == {"place": ["metres"], "speed": ["speed"]}
    with pytest.raises(ValueError, match="MountainCar-v0"):
        DreamSession(
            small_model(real_env, "ensemble"),
            real_env=real_env,
            render="MountainCar-v0",
        )
    plain = DreamSession(small_model(real_env, "ensemble"), real_env=real_env)
    assert plain.moments[0].imagined.frame is None
    assert "Reacher1D" in plain.notes[0] and "--render" in plain.notes[0]


def test_a_model_of_latents_shows_latents_beside_those_of_the_real() -> None:
    real_env = GymEnv("Pendulum-v1")
    session = DreamSession(small_model(real_env, "tdmpc2"), real_env=real_env)
    start, moment = session.moments[0], session.step([1.0])
    (name,) = session.names
    assert start.imagined.values == start.real.values
    assert len(moment.imagined.values[name]) == len(moment.real.values[name]) == 16
    assert moment.imagined.values != moment.real.values
    assert moment.imagined.frame is None and moment.real.frame is not None
    assert "latents and no observations" in session.notes[0]


@pytest.mark.parametrize("nested", [False, True])
def test_without_a_real_env_it_begins_at_recorded_steps(nested) -> None:
    real_env = make_nested() if nested else GymEnv("Pendulum-v1")
    env = small_model(real_env, "ensemble")
    data = [real_env.rollout(9), real_env.rollout(5)]
    session = DreamSession(env, data=data, seed=1)
    (name,), (key,) = session.names, unique(env.world_model.encoder.in_keys)
    rows = torch.cat([episode.get(key) for episode in data])
    found = set()
    for seed in range(20):
        start = torch.tensor(session.reset(seed).imagined.values[name])
        near = (rows - start).abs().amax(-1)
        assert near.min() < 1e-6
        found.add(int(near.argmin()))
    assert len(found) > 5
    moment = session.step([0.5])
    assert moment.real is None and not session.has_real
    assert 0 < session.usual_disagreement["median"] < session.usual_disagreement["high"]
    assert moment.disagreement > 0
    with pytest.raises(ValueError, match="no real env to look at"):
        session.look()


def test_where_nothing_says_how_to_begin() -> None:
    env = small_model(GymEnv("Pendulum-v1"))
    with pytest.raises(ValueError, match="real_env=.*data=.*start_states"):
        DreamSession(env)
    with pytest.raises(TypeError, match="DreamSession needs a WorldModelEnv"):
        DreamSession(GymEnv("Pendulum-v1"))
    start = TensorDict({"observation": torch.tensor([[1.0, 0.0, 0.0]])}, [1])
    model, reference = env.world_model, GymEnv("Pendulum-v1")
    with_starts = WorldModelEnv(model, reference, decode=True, start_states=start)
    shown = DreamSession(with_starts).moments[0].imagined.values["observation"]
    assert shown == [1.0, 0.0, 0.0]


def test_a_model_with_memory_begins_after_the_frames_before() -> None:
    model, steps = model_of(), memory_data(6)
    env = WorldModelEnv(model, SpecEnv())
    session = DreamSession(env, data=steps.unsqueeze(0))
    session.step([0.5, 0.5])
    moment = session.step([-0.5, 0.5])
    # From one of the two steps that have five frames.
    actions = torch.tensor([[[0.5, 0.5], [-0.5, 0.5]]])
    rewards = []
    for time in (4, 5):
        start = model.burn_in(steps[:time].unsqueeze(0))
        with torch.no_grad():
            out = env.imagine(2, tensordict=start, actions=actions)
        rewards.append(float(out["next", "reward"][0, -1]))
    assert any(moment.imagined.reward == pytest.approx(r, abs=1e-5) for r in rewards)
    session.back()
    assert session.step([-0.5, 0.5]) == moment


class Reads(nn.Module):
    def forward(self, value):
        return value[..., :1].clamp(-2, 2)


def test_the_policy_acts_on_what_is_imagined_and_then_on_the_real() -> None:
    real_env = make_real_env("Pendulum-v1")
    env = small_model(real_env, "ensemble")
    policy = Mod(Reads(), ["observation"], ["action"])
    session = DreamSession(env, real_env=real_env, policy=policy)
    session.step([2.0])
    before = session.moments[-1]
    moment = session.step()
    assert moment.actor == "policy"
    assert moment.action == pytest.approx(before.imagined.values["observation"][:1])
    env.world_model.done_head = Mod(
        lambda x: x[..., :1] == x[..., :1],
        [("next", "observation")],
        [("next", "terminated")],
    )
    ended = DreamSession(
        WorldModelEnv(env.world_model, real_env), real_env=real_env, policy=policy
    )
    before = ended.step([2.0])
    assert before.imagined.terminated
    assert ended.step().action == pytest.approx(before.real.values["observation"][:1])
    lost = Mod(Reads(), ["camera"], ["action"])
    with pytest.raises(KeyError, match="camera.*decode=True"):
        DreamSession(env, real_env=real_env, policy=lost).step()


RUNS = [
    (PETSTrainer, PETS),
    (PETSTrainer, {**PETS, "env": "_real_envs:make_nested"}),
    (MBPOTrainer, {**MBPO, "steps": 30, "evaluation_interval": 0}),
    (TDMPC2Trainer, {**TDMPC2, "steps": 24}),
    (TDMPC2Trainer, {**TDMPC2, "steps": 24, "evaluate_with": "policy"}),
    (DreamerTrainer, {**DREAMER, "steps": 24}),
    (PlaNetTrainer, {**PLANET, "steps": 24}),
    (PlaNetTrainer, {**TRANSFORMER, "steps": 24}),
]


@pytest.mark.parametrize(
    "kind, settings",
    RUNS,
    ids="pets nested mbpo tdmpc2 prior dreamer planet transformer".split(),
)
def test_the_dream_of_a_run(kind, settings) -> None:
    trainer = kind(**settings)
    with pytest.raises(ValueError, match="has not learnt anything yet"):
        dream_of_run(trainer)
    trainer.train()
    state = torch.get_rng_state()
    session = dream_of_run(trainer, seed=2)
    assert torch.equal(torch.get_rng_state(), state)
    assert session.title == trainer.recipe.title and session.has_real
    is_ensemble = kind in (PETSTrainer, MBPOTrainer)
    assert (session.usual_disagreement is not None) == is_ensemble
    if not trainer.world_model.is_recurrent:
        # As evaluations and `play` of that seed begin.
        (episode,) = trainer.evaluate(1, seed=2)
        key = unique(trainer.world_model.encoder.in_keys)[0]
        assert (session._real.root.get(key) == episode[0].get(key)).all()
    first, second = session.step("policy"), session.step("policy")
    assert first.action != second.action or first.imagined.ended
    assert first.real.frame is not None or "nested" in str(settings["env"])
    assert session.back() == first
    again = session.step("policy")
    assert again.real.reward == pytest.approx(second.real.reward) or not is_ensemble


def test_the_dream_of_logged_data(tmp_path) -> None:
    real_env = GymEnv("Pendulum-v1")
    log = str(tmp_path / "log")
    torch.stack([real_env.rollout(20) for _ in range(6)]).memmap(log)
    settings = {
        "steps": 10,
        "interval": 10,
        "members": 2,
        "hidden": (8,),
        "held_out": 0.3,
    }
    for name, env in (("data", None), ("env", "Pendulum-v1")):
        run = start_run("model", tmp_path / name, data=log, env=env, **settings)
        run.train()
        session = dream_of_run(run, render=None if env else "Pendulum-v1")
        moment = session.step("random")
        assert session.policy is None and session.has_real == (env is not None)
        assert moment.imagined.frame is not None
        assert moment.disagreement is not None and session.usual_disagreement


def test_a_run_without_a_model_has_no_dream() -> None:
    trainer = MBPOTrainer(**MBPO)
    trainer.recipe.world_model = None
    with pytest.raises(ValueError, match="no world model to dream with"):
        dream_of_run(trainer)
