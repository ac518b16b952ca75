"""Rewards, terminations and returns: against worlds whose answers are known."""

from __future__ import annotations

import pytest
import torch
from _diagnosed import line, observed_clock, padded, walk, walk_env
from _models import clock_env, clock_model, SpecEnv
from tensordict import TensorDict
from tensordict.nn import TensorDictModule as Mod
from torch import nn
from torchrl.envs import GymEnv, SerialEnv

from torchrl_wm import WorldModel, WorldModelEnv
from torchrl_wm.diagnostics import exploitation_gap, reward_error, termination_metrics
from torchrl_wm.modules import TerminationHead
from torchrl_wm.modules.keys import join

# Rewards -----------------------------------------------------------------------


def test_reward_errors_of_a_known_model() -> None:
    """The clock's reward is the time; the real one is one more, and grows by three."""
    error = reward_error(observed_clock(), line(20, 3.0), 5)
    k = torch.arange(1.0, 6).unsqueeze(-1)
    torch.testing.assert_close(error["rmse", "reward"], 2 * k + 1)
    torch.testing.assert_close(error["bias", "reward"], -(2 * k + 1))
    torch.testing.assert_close(error["return_rmse", "reward"], (2 * k + 1).cumsum(0))
    torch.testing.assert_close(error["correlation", "reward"], torch.ones(5, 1))
    torch.testing.assert_close(error["return_correlation", "reward"], torch.ones(5, 1))


def test_windows_of_rewards_do_not_cross_the_beginning_of_an_episode() -> None:
    """The clock is right about each episode, but for the one that its reward is ahead."""
    episodes = torch.cat([line(10, 1.0), line(7, 1.0)])
    begins = torch.zeros(17, 1, dtype=torch.bool)
    begins[[0, 10]] = True
    error = reward_error(observed_clock(), episodes.set("is_init", begins), 5)
    torch.testing.assert_close(error["rmse", "reward"], torch.ones(5, 1))


def test_a_reward_that_has_nothing_to_do_with_the_real_one() -> None:
    episodes = walk(400, 4)
    episodes["next", "reward"] = torch.randn(400, 4, 1)
    error = reward_error(walk_env(), episodes, 3)
    assert (error["correlation", "reward"].abs() < 0.2).all()
    episodes["next", "reward"] = torch.ones(400, 4, 1)
    assert reward_error(walk_env(), episodes, 3)["correlation", "reward"].isnan().all()


def test_rewards_any_batch_and_padding() -> None:
    env, episodes = walk_env(), walk(2, 3, 9)
    expected = reward_error(env, episodes.reshape(-1, 9), 4).to_dict()
    for given in (episodes, padded(episodes, 3)):
        torch.testing.assert_close(reward_error(env, given, 4).to_dict(), expected)
    with pytest.raises(KeyError, match=r"lack the rewards \[\('next', 'reward'\)\]"):
        reward_error(env, episodes.exclude(("next", "reward")), 4)


def test_nested_rewards() -> None:
    env = SpecEnv(observation=1, reward_key=("agents", "reward"))
    model = WorldModel(
        Mod(nn.Identity(), ["observation"], ["observation"]),
        Mod(lambda x, a: x + 1, ["observation", "action"], [("next", "observation")]),
        Mod(lambda x: x + 0, [("next", "observation")], [("next", "agents", "reward")]),
    )
    episodes = line(9, 1.0)
    episodes["next", "agents", "reward"] = episodes["next"].pop("reward")
    episodes["action"] = torch.zeros(9, 2)
    error = reward_error(WorldModelEnv(model, env), episodes, 3)
    torch.testing.assert_close(error["rmse", "agents", "reward"], torch.ones(3, 1))


# Terminations --------------------------------------------------------------------


def ending_clock(head: Mod) -> WorldModelEnv:
    env = observed_clock()
    model = env.world_model
    model = WorldModel(model.encoder, model.dynamics, model.reward_head, done_head=head)
    return WorldModelEnv(model, clock_env())


def at_least(time: float) -> Mod:
    keys = [("next", "observation")], [("next", "terminated")]
    return Mod(lambda x: x >= time, *keys)


def test_counts() -> None:
    """Ten rows at times 0..9 that end where the next time is 5 or more, but for 7."""
    episodes = line(10, 1.0)
    ends = (episodes["next", "observation"] >= 5) & (
        episodes["next", "observation"] != 7
    )
    episodes["next", "terminated"] = episodes["next", "done"] = ends
    metrics = termination_metrics(ending_clock(at_least(6)), episodes)
    names = ("true_positives", "false_positives", "false_negatives", "true_negatives")
    assert [int(metrics[name]) for name in names] == [4, 1, 1, 4]
    assert metrics["precision"] == pytest.approx(4 / 5)
    assert metrics["recall"] == pytest.approx(4 / 5)
    assert metrics["f1"] == pytest.approx(0.8)
    assert metrics["base_rate"] == metrics["predicted_rate"] == 0.5
    again = termination_metrics(ending_clock(at_least(6)), padded(episodes, 5))
    assert again.to_dict() == metrics.to_dict()


def test_time_limits_are_no_terminations() -> None:
    episodes = line(10, 1.0, ends=(9,))
    env = ending_clock(at_least(100))
    assert termination_metrics(env, episodes)["base_rate"] == pytest.approx(0.1)
    episodes["next", "truncated"] = episodes["next", "done"].clone()
    metrics = termination_metrics(env, episodes)
    assert metrics["base_rate"] == 0
    assert metrics["precision"].isnan() and metrics["recall"].isnan()


@pytest.mark.parametrize("sample", [False, True])
def test_the_heads_own_threshold(sample) -> None:
    """A head that draws decides by its threshold here, too."""
    network = nn.Linear(1, 1)
    nn.init.ones_(network.weight), nn.init.constant_(network.bias, -5.0)
    head = TerminationHead(
        network, [("next", "observation")], threshold=0.9, sample=sample
    )
    episodes = line(10, 1.0)  # the probability is above 0.9 from the time 8 on
    episodes["next", "terminated"] = episodes["next", "observation"] >= 8
    metrics = termination_metrics(ending_clock(head), episodes)
    assert metrics["f1"] == 1 and metrics["true_positives"] == 3


def test_models_and_data_without_ends() -> None:
    with pytest.raises(ValueError, match="predicts no terminations.*done_head"):
        termination_metrics(observed_clock(), line(10, 1.0))
    bare = line(10, 1.0).exclude(("next", "done"))
    with pytest.raises(KeyError, match="which say where they end"):
        termination_metrics(ending_clock(at_least(3)), bare)


def test_nested_done() -> None:
    names = tuple(("agents", name) for name in ("done", "terminated", "truncated"))
    reference = SpecEnv(observation=1, done_names=())
    reference.done_spec = SpecEnv().done_spec.__class__(
        {"agents": SpecEnv().full_done_spec.clone()}, shape=()
    )
    head = at_least(6)
    head.out_keys = [("next", "agents", "terminated")]
    model = observed_clock().world_model
    model = WorldModel(model.encoder, model.dynamics, model.reward_head, done_head=head)
    episodes = line(10, 1.0)
    episodes["action"] = torch.zeros(10, 2)
    ends = episodes["next", "observation"] >= 6
    for name in names[:2]:
        episodes[join("next", name)] = ends
    metrics = termination_metrics(WorldModelEnv(model, reference), episodes)
    assert metrics["agents", "f1"] == 1


# Returns ---------------------------------------------------------------------------


def still(td: TensorDict) -> TensorDict:
    return td.set("action", torch.zeros(*td.batch_size, 1))


def test_gap_of_recorded_episodes() -> None:
    """The clock promises 1 + 2 + 3; the real rewards are 3 * k + 1."""
    gap = exploitation_gap(observed_clock(), still, line(3, 3.0), 3)
    assert gap.batch_size == (1,)
    assert gap["imagined_return"].item() == 6 and gap["real_return"].item() == 21
    assert gap["gap"].item() == -15
    half = exploitation_gap(observed_clock(), still, line(3, 3.0), 3, gamma=0.5)
    assert half["real_return"].item() == 4 + 7 / 2 + 10 / 4
    assert half["imagined_return"].item() == 1 + 2 / 2 + 3 / 4


def test_rows_of_several_episodes_and_padding() -> None:
    first, second = line(4, 1.0, ends=(3,)), line(6, 1.0)
    row = padded(torch.cat([first, second]), 3)
    gap = exploitation_gap(observed_clock(), still, row.expand(2, 13), 5)
    assert gap["real_length"].flatten().tolist() == [4, 5, 4, 5]
    assert gap["real_return"].flatten().tolist() == [14, 20, 14, 20]
    # The first terminated: the model, which knows no ends, goes on and collects.
    assert gap["imagined_length"].flatten().tolist() == [5, 5, 5, 5]


def test_where_the_real_episode_was_cut_the_imagined_one_is_too() -> None:
    cut = line(4, 1.0, ends=(3,))
    cut["next", "truncated"] = cut["next", "done"].clone()
    cut["next", "terminated"] = torch.zeros_like(cut["next", "done"])
    for real in (cut, line(4, 1.0)):
        gap = exploitation_gap(observed_clock(), still, real, 50)
        assert gap["imagined_length"].item() == gap["real_length"].item() == 4
    early = exploitation_gap(ending_clock(at_least(2)), still, line(9, 1.0), 9)
    assert early["imagined_length"].item() == 2 and early["real_length"].item() == 9
    assert early["imagined_return"].item() == 3


def cart_model(env: GymEnv) -> WorldModelEnv:
    """CartPole's own equations as a model."""

    def step(state, action):
        x, v, angle, spin = state.unbind(-1)
        force = torch.where(action[..., 1].bool(), 10.0, -10.0)
        push = (force + 0.05 * spin**2 * angle.sin()) / 1.1
        turn = (9.8 * angle.sin() - angle.cos() * push) / (
            0.5 * (4.0 / 3.0 - 0.1 * angle.cos() ** 2 / 1.1)
        )
        speed = push - 0.05 * turn * angle.cos() / 1.1
        changes = torch.stack([v, speed, spin, turn], -1)
        return state + 0.02 * changes

    def ends(state):
        return (
            (state[..., 0].abs() > 2.4) | (state[..., 2].abs() > 0.20944)
        ).unsqueeze(-1)

    following = [("next", "observation")]
    model = WorldModel(
        Mod(nn.Identity(), ["observation"], ["observation"]),
        Mod(step, ["observation", "action"], following),
        Mod(lambda x: torch.ones_like(x[..., :1]), following, [("next", "reward")]),
        done_head=Mod(ends, following, [("next", "terminated")]),
    )
    return WorldModelEnv(model, env, batch_size=[])


def lean(td: TensorDict) -> TensorDict:
    push = (td["observation"][..., 2] > 0).long()
    return td.set("action", nn.functional.one_hot(push, 2))


@pytest.mark.parametrize("number", [1, 3])
def test_a_perfect_model_of_a_real_env_has_no_gap(number) -> None:
    real_env = GymEnv("CartPole-v1")
    env = cart_model(real_env)
    real = real_env if number == 1 else SerialEnv(number, lambda: GymEnv("CartPole-v1"))
    real.set_seed(0)
    gap = exploitation_gap(env, lean, real, 60, episodes=3)
    assert len(gap) == 3
    assert gap["real_length"].float().mean() < 60  # it falls, with this policy
    assert gap["gap"].abs().max() <= 1  # float32 against float64 at the threshold


@pytest.mark.parametrize("key", ["is_init", ("agents", "is_init")])
def test_episodes_that_only_their_beginnings_tell_apart(key) -> None:
    episodes = torch.cat([line(4, 1.0), line(6, 1.0)])
    begins = torch.zeros(10, 1, dtype=torch.bool)
    begins[[0, 4]] = True
    gap = exploitation_gap(observed_clock(), still, episodes.set(key, begins), 5)
    assert gap["real_length"].flatten().tolist() == [4, 5]
    assert gap["imagined_length"].flatten().tolist() == [4, 5]
    torch.testing.assert_close(gap["gap"], torch.tensor([[-4.0], [-5.0]]))


def test_bad_arguments() -> None:
    env = observed_clock()
    with pytest.raises(TypeError, match="GymWrapper"):
        exploitation_gap(env, still, "Pendulum-v1", 5)
    with pytest.raises(ValueError, match="horizon must be a positive int"):
        exploitation_gap(env, still, line(5, 1.0), 0)
    with pytest.raises(KeyError, match="lack the rewards"):
        exploitation_gap(env, still, line(5, 1.0).exclude(("next", "reward")), 5)
    with pytest.raises(ValueError, match="reward_key"):
        exploitation_gap(env, still, line(5, 1.0), 5, reward_key="other")
    latent = WorldModelEnv(clock_model(), clock_env())
    gap = exploitation_gap(latent, still, line(5, 1.0), 5)  # starts are encoded
    assert gap["imagined_return"].item() == 15
