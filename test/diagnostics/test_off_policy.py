"""Values of policies by a log alone: against worlds whose answers are known."""

from __future__ import annotations

import math

import pytest
import torch
from _diagnosed import padded
from tensordict import TensorDict
from tensordict.nn import NormalParamExtractor, TensorDictModule as Mod
from torch import nn
from torchrl.modules import MLP, ProbabilisticActor, TanhNormal

from torchrl_wm.diagnostics import fitted_q_value, importance_weighted_value
from torchrl_wm.modules.keys import join

GAMMA = 0.9


def bandit(
    number: int = 60,
    length: int = 8,
    *,
    terminates: bool = False,
    key="observation",
    action="action",
    reward="reward",
    scale: float = 1.0,
) -> TensorDict:
    """Episodes ``[N, T]`` that pay ``scale * a`` for random actions in [-1, 1], whatever is seen."""
    seen = torch.rand(number, length + 1, 2)
    done = torch.zeros(number, length, 1, dtype=torch.bool)
    done[:, -1] = True
    out = TensorDict({}, batch_size=[number, length])
    out.set(key, seen[:, :-1]).set(join("next", key), seen[:, 1:])
    out.set(action, torch.rand(number, length, 1) * 2 - 1)
    out.set(join("next", reward), scale * out.get(action))
    out.set(("next", "done"), done)
    out.set(("next", "terminated"), done & terminates)
    return out.set(("next", "truncated"), done & (not terminates))


def always(value: float, key="action"):
    return lambda td: td.set(key, torch.full((*td.batch_size, 1), value))


def fitted(policy, data, **kwargs) -> TensorDict:
    settings = {"gamma": GAMMA, "steps": 150, "members": 3, "hidden": (32,), **kwargs}
    return fitted_q_value(policy, data, **settings)


@pytest.mark.parametrize("scale", [1.0, 1000.0])
@pytest.mark.parametrize("action", [-0.5, 0.5])
def test_a_time_limit_does_not_end_the_value(action, scale) -> None:
    out = fitted(always(action), bandit(scale=scale), batch_size=64)
    expected = scale * action / (1 - GAMMA)
    assert float(out["value"]) == pytest.approx(expected, abs=0.1 * abs(expected))
    assert out["low"] <= out["value"] <= out["high"]
    assert out["members"].shape == (3,)


def test_a_termination_ends_the_value() -> None:
    """One-step episodes are worth their reward, not what would follow."""
    data = bandit(400, 1, terminates=True)
    assert float(fitted(always(0.5), data)["value"]) == pytest.approx(0.5, abs=0.05)
    data["next", "terminated"] = torch.zeros_like(data["next", "terminated"])
    assert float(fitted(always(0.5), data)["value"]) == pytest.approx(5.0, abs=0.5)


def test_what_the_episodes_of_the_log_were_worth() -> None:
    data = bandit(10, 5, terminates=True)
    discount = GAMMA ** torch.arange(5.0)[:, None]
    sums = (data["next", "reward"] * discount).sum(1).squeeze(-1)
    out = fitted(always(0.0), data, steps=1)
    torch.testing.assert_close(out["log_value"], sums.mean())
    torch.testing.assert_close(out["best_log_value"], sums.max())
    cut = bandit(10, 5)
    cut["next", "reward"] = torch.ones(10, 5, 1)  # an episode that goes on as it was
    value = fitted(always(0.0), cut, steps=1)["log_value"]
    assert float(value) == pytest.approx(1 / (1 - GAMMA), rel=1e-4)


def test_nested_keys_padding_and_lists_give_the_same() -> None:
    torch.manual_seed(0)
    data = bandit(12, 5, terminates=True)
    expected = fitted(always(0.3), data, steps=5)
    for given in (padded(data, 3), list(data.unbind(0)), data.reshape(3, 4, 5)):
        torch.testing.assert_close(fitted(always(0.3), given, steps=5), expected)
    torch.manual_seed(0)
    keys = {
        "key": ("sensors", "place"),
        "action": ("arm", "force"),
        "reward": ("task", "pay"),
    }
    nested = bandit(12, 5, terminates=True, **keys)
    found = fitted(
        always(0.3, ("arm", "force")),
        nested,
        steps=5,
        action_keys=[("arm", "force")],
        reward_key=("task", "pay"),
    )
    torch.testing.assert_close(found, expected)


def test_the_random_state_is_put_back() -> None:
    data, policy = bandit(4, 3), actor(0.5)  # which draws
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    found = fitted(policy, data, steps=2)
    assert torch.equal(torch.rand(1), expected)
    torch.testing.assert_close(fitted(policy, data, steps=2), found)


def test_what_the_log_lacks_is_named() -> None:
    data = bandit(4, 3)
    with pytest.raises(KeyError, match=r"needs the rewards \[\('next', 'reward'\)\]"):
        fitted(always(0.0), data.exclude(("next", "reward")))
    with pytest.raises(KeyError, match=r"lacks the actions \['action'\]"):
        fitted(always(0.0), data.exclude("action"))
    with pytest.raises(KeyError, match="observations at the root and below 'next'"):
        fitted(always(0.0), data.exclude(("next", "observation")))
    with pytest.raises(KeyError, match=r"policy writes no \['action'\]"):
        fitted(lambda td: td, data)
    with pytest.raises(KeyError, match="say where they end"):
        fitted(
            always(0.0), data.exclude(*(("next", n) for n in ("done", "terminated")))
        )
    with pytest.raises(ValueError, match="gamma must be above 0 and below 1"):
        fitted(always(0.0), data, gamma=1.0)
    endless = data.clone()
    endless["next", "observation"][0, 0, 1] = math.inf
    with pytest.raises(ValueError, match=r"\('next', 'observation'\) is not finite"):
        fitted(always(0.0), endless)
    data["next", "reward"][1, 2] = math.nan
    with pytest.raises(ValueError, match="reward 5 of the log is nan"):
        fitted(always(0.0), data)


def test_actions_that_are_no_numbers_are_named() -> None:
    with pytest.raises(ValueError, match="The policy's actions .*NaN.* in 12 of 12"):
        fitted(always(math.nan), bandit(4, 3))
    data = bandit(4, 3)
    data["action"][1, 2] = math.inf
    with pytest.raises(ValueError, match="The log's actions .*infinite in 1 of 12"):
        fitted(always(0.0), data)


def test_values_that_are_no_numbers_have_not_settled() -> None:
    out = fitted(always(0.0), bandit(4, 3), steps=20, learning_rate=1e20)
    assert out["value"].isnan() and out["unsettled"] == 1


def test_rewards_and_ends_in_other_forms_say_the_same() -> None:
    data = bandit(4, 6, terminates=True)
    data["next", "terminated"][:, 2] = data["next", "done"][:, 2] = True
    expected = fitted(always(0.3), data, steps=5)
    flat = data.clone().set(("next", "reward"), data["next", "reward"].squeeze(-1))
    without = data.exclude(("next", "done"))
    for given in (flat, without):
        torch.testing.assert_close(fitted(always(0.3), given, steps=5), expected)


@pytest.mark.gpu
def test_on_a_gpu() -> None:
    """Slow sums differ a little; what matters is that nothing stays on the CPU."""
    data = drawn(0.0, 40)
    expected = fitted(always(0.5), data)
    found = fitted(lambda td: always(0.5)(td).to("cuda"), data.to("cuda"))
    assert float(found["value"]) == pytest.approx(float(expected["value"]), abs=0.5)
    out = importance_weighted_value(actor(0.2).to("cuda"), data.to("cuda"))
    assert out["value"].isfinite()


def test_values_that_no_rewards_add_up_to_are_told() -> None:
    """Steps away from zero that never come back: a policy that speeds up has no finite value."""
    data = bandit(40, 4)
    data["next", "observation"] = 3 * data["observation"] + data["action"]
    data["next", "reward"] = data["observation"].sum(-1, True)
    out = fitted(always(0.0), data, gamma=0.95, steps=300)
    assert out["unsettled"] > 0.1
    low, high = (float(data["next", "reward"].aminmax()[n]) / 0.05 for n in (0, 1))
    assert low - 1e-3 <= float(out["value"]) <= high + 1e-3
    assert fitted(always(0.0), bandit(40, 4))["unsettled"] == 0


# Importance weights ---------------------------------------------------------------


def actor(mean: float, key="observation", action="action") -> ProbabilisticActor:
    """A policy that draws around a mean, whatever it sees."""
    network = nn.Sequential(MLP(2, 2, num_cells=[]), NormalParamExtractor())
    network[0][0].weight.data.zero_()
    network[0][0].bias.data.copy_(torch.tensor([mean, 0.0]))
    return ProbabilisticActor(
        Mod(network, [key], ["loc", "scale"]),
        in_keys=["loc", "scale"],
        out_keys=[action],
        distribution_class=TanhNormal,
        return_log_prob=True,
        log_prob_key="action_log_prob"
        if action == "action"
        else (*action[:-1], "action_log_prob"),
        default_interaction_type="random",
    )


def drawn(mean: float, number: int = 2000, length: int = 3, **keys) -> TensorDict:
    """Episodes by an actor that pay its action."""
    data = bandit(number, length, **keys)
    names = {k: v for k, v in keys.items() if k in ("key", "action")}
    with torch.no_grad():
        acted = actor(mean, **names)(data.exclude("next"))
    data = acted.select(*acted.keys(True, True)).set("next", data["next"])
    action = keys.get("action", "action")
    return data.set(("next", "reward"), data.get(action).clone())


@pytest.mark.parametrize(
    "keys", [{}, {"key": ("sensors", "place"), "action": ("arm", "force")}]
)
def test_episodes_weighed_by_another_policy(keys) -> None:
    torch.manual_seed(0)
    log, truth = drawn(0.0, **keys), drawn(0.4, **keys)
    discount = GAMMA ** torch.arange(3.0)[:, None]
    expected = float((truth["next", "reward"] * discount).sum(1).mean())
    action = keys.get("action", "action")
    out = importance_weighted_value(
        actor(0.4, **keys), log, gamma=GAMMA, action_key=action
    )
    assert out["low"] < expected < out["high"]
    assert float(out["value"]) == pytest.approx(expected, abs=0.1)
    assert 100 < out["effective_episodes"] < 2000 == out["episodes"]


def test_its_own_episodes_count_alike() -> None:
    log = drawn(0.2, 50)
    out = importance_weighted_value(actor(0.2), log, gamma=GAMMA)
    discount = GAMMA ** torch.arange(3.0)[:, None]
    expected = (log["next", "reward"] * discount).sum(1).mean()
    torch.testing.assert_close(out["value"], expected)
    assert float(out["effective_episodes"]) == pytest.approx(50)


def test_importance_weights_need_both_policies() -> None:
    log = drawn(0.0, 5)
    with pytest.raises(TypeError, match="needs a policy that draws, with get_dist"):
        importance_weighted_value(always(0.0), log)
    with pytest.raises(KeyError, match="return_log_prob=True"):
        importance_weighted_value(actor(0.0), log.exclude("action_log_prob"))


class Never:
    """A policy that can do nothing of what was recorded."""

    def get_dist(self, td):
        return self

    def log_prob(self, action):
        return torch.full(action.shape[:-1], -math.inf)


def test_a_policy_that_made_no_episode_has_no_value() -> None:
    out = importance_weighted_value(Never(), drawn(0.0, 5))
    assert out["effective_episodes"] == 0
    for name in ("value", "low", "high"):
        assert out[name].isnan()


def test_samples_without_the_longest_episodes_do_not_pull_the_interval() -> None:
    """One of three episodes is longer: what follows is known from it alone."""
    log = [drawn(0.0, 1, length)[0] for length in (1, 1, 9)]
    for episode in log:
        episode["next", "reward"].fill_(1.0)
    out = importance_weighted_value(actor(0.0), log, gamma=GAMMA)
    total = (1 - GAMMA**9) / (1 - GAMMA)
    for name in ("value", "low", "high"):
        assert float(out[name]) == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize("value", [math.nan, -math.inf, math.inf])
def test_log_probabilities_that_are_no_numbers_are_named(value) -> None:
    log = drawn(0.0, 5)
    log["action_log_prob"][2, 1] = value
    with pytest.raises(
        ValueError, match="'action_log_prob' are NaN or infinite in 1 of 15"
    ):
        importance_weighted_value(actor(0.0), log)
    policy = actor(math.nan)
    with pytest.raises(ValueError, match="policy's log-probability of 15 of 15"):
        importance_weighted_value(policy, drawn(0.0, 5))


def test_log_probabilities_of_each_dim_are_added_up() -> None:
    log = drawn(0.0, 20)
    log["action"] = log["action"].expand(20, 3, 2).contiguous()
    log["action_log_prob"] = torch.randn(20, 3, 2)

    class Normal(Never):
        def log_prob(self, action):
            return torch.distributions.Normal(0.0, 1.0).log_prob(action)

    class Whole(Normal):
        def log_prob(self, action):
            return super().log_prob(action).sum(-1)

    found = importance_weighted_value(Normal(), log)
    torch.testing.assert_close(found, importance_weighted_value(Whole(), log))
