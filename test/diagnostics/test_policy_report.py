"""The report on a policy: how far what it does departs from the data, and what is said of that."""

from __future__ import annotations

import math

import pytest
import torch
from _diagnosed import padded, walk
from _models import rssm_model, SpecEnv, transitions
from tensordict import TensorDict
from tensordict.nn import TensorDictModule as Mod
from torch import nn
from torchrl.data import Bounded

from torchrl_wm import WorldModel, WorldModelEnv
from torchrl_wm.diagnostics import (
    policy_disagreement,
    policy_distance,
    policy_return,
    write_policy_report,
    write_report,
)
from torchrl_wm.diagnostics.policy_measures import nearest_distances
from torchrl_wm.diagnostics.policy_verdicts import Trust, trusted
from torchrl_wm.modules import with_penalty
from torchrl_wm.modules.keys import join

pytest.importorskip("matplotlib")


def known(
    key="observation", *, ensemble: bool = True, penalty: bool = False
) -> WorldModelEnv:
    """The walk without its noise, whose members differ by how far it is from zero."""
    following = join("next", key)

    def step(place, action):
        return place + action, place.norm(dim=-1, keepdim=True)

    def only(place, action):
        return place + action

    writes = [following, ("next", "disagreement")][: 2 if ensemble else 1]
    model = WorldModel(
        Mod(nn.Identity(), [key], [key]),
        Mod(step if ensemble else only, [key, "action"], writes),
        Mod(lambda x: x.sum(-1, True), [following], [("next", "reward")]),
    )
    if penalty:
        model = with_penalty(model, 2.0, limit=0.1)
    spec = SpecEnv(
        observation=2, observation_key=key, action_spec=Bounded(-1.0, 1.0, (2,))
    )
    return WorldModelEnv(model, spec)


def still(td):
    return td.set("action", torch.zeros(*td.batch_size, 2))


def away(td):
    return td.set("action", torch.ones(*td.batch_size, 2))


def log(*size: int, key="observation") -> TensorDict:
    """Walks around zero: places of spread 1, and not of one that goes on and on."""
    data = walk(*size, noise=0.5, key=key)
    place = torch.randn(*size, 2)
    following = place + data["action"]
    data.set(key, place).set(join("next", key), following)
    data["next", "done"][..., -1, :] = data["next", "truncated"][..., -1, :] = True
    return data.set(("next", "reward"), following.sum(-1, True))


def starts(data, key) -> float:
    return float(data[:, 0].get(key).sum(-1).mean())


def small(env, policy, data, path=None, **kwargs):
    settings = {"horizons": (2, 12), "rollouts": 30, "fitted_steps": 5, **kwargs}
    return write_policy_report(env, policy, data, path, **settings)


@pytest.mark.parametrize("key", ["observation", ("sensors", "place")])
def test_a_policy_that_leaves_the_data_is_not_trusted_there(tmp_path, key) -> None:
    torch.manual_seed(0)
    env, data = known(key), log(20, 15, key=key)
    path = tmp_path / "new" / "policy.html"
    report = small(env, still, data, path, fitted_steps=150, gamma=0.9)
    assert report.verdict.startswith("Trust: for 12 steps, at most 10% of the rollouts")
    assert report.trusted_steps == 12
    text = path.read_text(encoding="utf-8")
    assert report.path == path and "Trust: for 12 steps" in text
    left = small(env, away, data)
    assert left.path is None
    assert left.verdict.startswith("Do not trust") or left.trusted_steps < 6
    assert "beyond the data&#x27;s" not in left.verdict
    assert left.numbers["disagreement/share of imagined steps beyond it"] > 0.5
    assert set(report.left_out) == {"importance", "exploitation_gap"}
    value = report.numbers[
        "fitted_q/value"
    ]  # nothing moves: the reward of the start, again and again
    assert report.score == value == pytest.approx(10 * starts(data, key), abs=3)
    assert math.isnan(left.score)
    assert "fitted Q evaluation did not settle" in left.verdict


def test_disagreement_along_rollouts_is_that_of_the_model() -> None:
    data = log(20, 15)
    found = policy_disagreement(known(), away, data, 4, rollouts=40)
    starts = data[:, 0]["observation"].repeat(2, 1)
    for step in range(4):
        expected = (starts + step).norm(dim=-1)
        torch.testing.assert_close(found["values"][:, step], expected)
    recorded = data["observation"].norm(dim=-1).flatten()
    torch.testing.assert_close(found["edge"], recorded.quantile(0.99))
    share = (found["values"] > found["edge"]).float().mean(0)
    torch.testing.assert_close(found["beyond"], share)
    with_padding = policy_disagreement(known(), away, padded(data, 3), 4, rollouts=40)
    torch.testing.assert_close(with_padding, found)


def test_distances_are_in_units_of_the_data() -> None:
    data = log(20, 15)
    found = policy_distance(known(), still, data, 3)
    wide = data.clone()
    for name in ("observation", ("next", "observation")):
        wide[name] = 100 * wide[name]
    torch.testing.assert_close(
        policy_distance(known(), still, wide, 3)["values"][:, 0], found["values"][:, 0]
    )
    far = policy_distance(known(), away, data, 12)
    assert far["beyond"][-1] == 1 and far["quantiles"][-1, 1] > 3 * far["edge"]
    held = data.clone()
    held["action"] = torch.zeros_like(held["action"])  # and the policy's are not
    assert policy_distance(known(), away, held, 1)["values"].min() > 0.5
    constant = data.exclude("next").apply(torch.zeros_like).set("next", data["next"])
    with pytest.raises(ValueError, match="nothing changes in the data"):
        policy_distance(known(), still, constant, 3)


@pytest.mark.parametrize("offset", [300.0, 3000.0])
def test_distances_do_not_depend_on_where_zero_is(offset) -> None:
    data, moved = log(10, 12), []
    for shift in (0.0, offset):
        given = data.clone()
        given["observation"] += shift
        given["next", "observation"] += shift
        moved.append(policy_distance(known(), away, given, 5))
    torch.testing.assert_close(*moved, rtol=0.02, atol=0.01)


@pytest.mark.parametrize("what", ["place", "doubt"])
def test_what_is_no_number_is_beyond_the_data(what) -> None:
    def step(place, action):
        following, doubt = place + action, place.norm(dim=-1, keepdim=True)
        off = place[..., :1] > 6
        if what == "place":
            return torch.where(off, math.nan, following), doubt
        return following, torch.where(off, math.nan, doubt)

    env = known()
    model = WorldModel(
        env.world_model.encoder,
        Mod(
            step,
            ["observation", "action"],
            [("next", "observation"), ("next", "disagreement")],
        ),
        env.world_model.reward_head,
    )
    spec = SpecEnv(observation=2, action_spec=Bounded(-1.0, 1.0, (2,)))
    env = WorldModelEnv(model, spec)
    beyond = policy_disagreement(env, away, log(6, 10), 20)["beyond"]
    assert (beyond[12:] == 1).all()
    report = small(env, away, log(6, 10))
    assert report.trusted_steps < 12
    if what == "place":
        assert (policy_distance(env, away, log(6, 10), 20)["beyond"][12:] == 1).all()


def test_rewards_without_a_dim_of_their_own() -> None:
    data = log(6, 10)
    flat = data.clone().set(("next", "reward"), data["next", "reward"].squeeze(-1))
    numbers = [small(known(), still, given).numbers for given in (data, flat)]
    assert numbers[1] == pytest.approx(numbers[0], nan_ok=True)


def test_nearest_rows_of_other_groups() -> None:
    queries, data = torch.randn(50, 3), torch.randn(80, 3)
    groups = torch.arange(80) % 5
    expected = torch.stack(
        [
            ((q - data[groups != n % 5]).pow(2).mean(-1)).min().sqrt()
            for n, q in enumerate(queries)
        ]
    )
    found = nearest_distances(queries, data, torch.arange(50) % 5, groups)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_returns_with_and_without_the_penalty() -> None:
    data = log(20, 15)
    found = policy_return(
        known(), away, data, 3, gamma=0.5, coefficient=2.0, rollouts=20
    )
    place = data[:, 0]["observation"]
    reward = torch.stack([(place + k).sum(-1) for k in (1, 2, 3)], 1)
    doubt = torch.stack([(place + k).norm(dim=-1) for k in range(3)], 1)
    discount = torch.tensor([1.0, 0.5, 0.25])
    torch.testing.assert_close(found["return"], (reward * discount).cumsum(1))
    expected = ((reward - 2 * doubt) * discount).cumsum(1)
    torch.testing.assert_close(found["penalised"], expected)
    own = policy_return(known(penalty=True), away, data, 3, gamma=0.5, rollouts=20)
    torch.testing.assert_close(own["return"], found["return"])
    torch.testing.assert_close(own["penalised"], found["penalised"])
    default = policy_return(known(), away, data, 3)["coefficient"]
    edge = policy_disagreement(known(), away, data, 3)["edge"]
    torch.testing.assert_close(default * edge, data["next", "reward"].std())


def test_without_an_ensemble_the_rest_stands() -> None:
    report = small(known(ensemble=False), still, log(10, 15))
    assert "make_ensemble_world_model(env) makes one" in report.left_out["disagreement"]
    assert "distance/data, median" in report.numbers
    assert not any("penalty" in name for name in report.numbers)
    assert report.trusted_steps == 12


def test_the_doubts_of_a_model_with_memory_are_not_known_along_rollouts() -> None:
    model = WorldModel(
        Mod(nn.Identity(), ["observation"], ["observation"]),
        Mod(
            lambda x, a, n: (x + a, n + 1, x.norm(dim=-1, keepdim=True)),
            ["observation", "action", "count"],
            [("next", "observation"), ("next", "count"), ("next", "disagreement")],
        ),
        Mod(lambda x: x.sum(-1, True), [("next", "observation")], [("next", "reward")]),
        memory=["count"],
        initial_state=TensorDict({"count": torch.zeros(1)}),
    )
    spec = SpecEnv(observation=2, action_spec=Bounded(-1.0, 1.0, (2,)))
    env = WorldModelEnv(model, spec)
    with pytest.raises(ValueError, match=r"carries \['count'\].*policy_distance"):
        policy_disagreement(env, still, log(4, 6), 3)
    assert policy_distance(env, still, log(4, 6), 3)["beyond"].shape == (3,)
    assert policy_return(env, still, log(4, 6), 3).get("penalised", None) is None


def test_a_recurrent_model_acts_from_filtered_latents() -> None:
    model, data = rssm_model(), transitions(4, 12)
    env = WorldModelEnv(model, SpecEnv())
    policy = Mod(lambda x: x[..., :2].tanh(), ["belief"], ["action"])
    report = small(env, policy, data, horizons=(3,))
    assert {"distance", "returns", "fitted_q"} <= set(report.verdicts), report.left_out


def test_a_simulator_tells_the_gap(tmp_path) -> None:
    from torchrl.envs import GymEnv

    from torchrl_wm.models import make_ensemble_world_model

    real_env = GymEnv("Pendulum-v1")
    model, _ = make_ensemble_world_model(
        real_env, members=2, hidden=(8,), normalize=False, termination="none"
    )
    policy = Mod(lambda x: x[..., :1], ["observation"], ["action"])
    data = [real_env.rollout(15) for _ in range(3)]
    settings = {"real_env": real_env, "real_episodes": 2, "horizons": (5,)}
    report = small(WorldModelEnv(model, real_env), policy, data, **settings)
    numbers = {
        k: v for k, v in report.numbers.items() if k.startswith("exploitation_gap")
    }
    gap = (
        numbers["exploitation_gap/imagined return"]
        - numbers["exploitation_gap/real return"]
    )
    assert numbers["exploitation_gap/gap"] == pytest.approx(gap, rel=1e-4)
    assert "exploitation_gap/discounted gap" in numbers
    assert "the real env pays" in report.verdict
    path = tmp_path / "report.html"
    whole = write_report(
        path, WorldModelEnv(model, real_env), data, horizon=3, sections=report.sections
    )
    assert report.verdict[:40] in whole.path.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "beyond, steps, good",
    [
        ([0.0, 0.1, 0.1], 3, True),
        ([0.0, 0.2, 0.0], 1, False),
        ([0.0, 0.1, 0.3], 2, None),
    ],
)
def test_the_rules(beyond, steps, good) -> None:
    found = {"distance": TensorDict({"beyond": torch.tensor(beyond)}, [])}
    trust = trusted(found, (2, 3))
    assert (trust.steps, trust.good) == (steps, good)
    assert trusted({}, (2, 3)) is None
    assert Trust(3, (2, 3)).words.startswith("Trust:")


def test_wrong_arguments(tmp_path) -> None:
    env, data = known(), log(3, 5)
    with pytest.raises(IsADirectoryError, match="name a file in it"):
        small(env, still, data, tmp_path)
    with pytest.raises(ValueError, match="horizons must be a positive int, got 0"):
        small(env, still, data, horizons=(0,))
    with pytest.raises(ValueError, match="horizons must name at least one"):
        small(env, still, data, horizons=())
    with pytest.raises(ValueError, match="gamma must be above 0 and below 1"):
        small(env, still, data, gamma=1.0)
    with pytest.raises(TypeError, match="needs a WorldModelEnv"):
        small(SpecEnv(), still, data)
