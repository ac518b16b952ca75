"""Heads: train on logits, step on bools; Gaussians; functions that are known."""

from __future__ import annotations

import pytest
import torch
from _models import linear, SpecEnv
from tensordict import TensorDict
from tensordict.nn import set_interaction_type, TensorDictModule as Mod
from torch import nn
from torchrl.data import Composite, Unbounded
from torchrl.envs.utils import check_env_specs

from torchrl_wm import WorldModel, WorldModelEnv, WorldModelLoss
from torchrl_wm.modules import (
    ContinueHead,
    Entry,
    FunctionHead,
    GaussianHead,
    TerminationHead,
)
from torchrl_wm.modules.keys import join
from torchrl_wm.objectives import GaussianNLLTerm

NESTED = ("agents", "done")


class Fixed(nn.Module):
    """Gives the first feature as it is, so that logits can be chosen."""

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        return value[..., :1]


def latents(*values: float) -> TensorDict:
    value = torch.tensor(values).unsqueeze(-1)
    return TensorDict({"next": {"latent": value}}, batch_size=[len(values)])


@pytest.mark.parametrize("done_key", ["done", NESTED])
@pytest.mark.parametrize("threshold", [0.1, 0.5, 0.9])
def test_terminations_by_a_threshold(done_key, threshold) -> None:
    head = TerminationHead(
        Fixed(), [("next", "latent")], done_key=done_key, threshold=threshold
    )
    logits = [-3.0, -0.1, 0.1, 3.0]
    out = head(latents(*logits))["next"]
    place = out if done_key == "done" else out["agents"]
    assert place["terminated_logits"].flatten().tolist() == pytest.approx(logits)
    probability = torch.tensor(logits).sigmoid()
    assert torch.allclose(place["continue_prob"].flatten(), 1 - probability)
    expected = (probability > threshold).tolist()
    assert place["terminated"].flatten().tolist() == expected


def test_a_continue_head_says_the_opposite() -> None:
    network = Fixed()
    ends = TerminationHead(network, [("next", "latent")], threshold=0.3)
    goes_on = ContinueHead(network, [("next", "latent")], threshold=0.3)
    one = ends(latents(-2.0, -0.5, 2.0))["next"]
    other = goes_on(latents(2.0, 0.5, -2.0))["next"]
    assert torch.equal(other["continue_pred"], -one["terminated_logits"])
    for key in ("terminated", "continue_prob"):
        assert torch.equal(one[key], other[key])


@pytest.mark.parametrize("kind", [TerminationHead, ContinueHead])
def test_terminations_by_chance(kind) -> None:
    head = kind(Fixed(), [("next", "latent")], sample=True)
    sign = 1 if kind is TerminationHead else -1
    td = latents(*([-1.0 * sign] * 4000))
    torch.manual_seed(0)
    rate = head(td.clone())["next", "terminated"].float().mean()
    assert abs(rate - torch.tensor(-1.0).sigmoid()) < 0.03
    with set_interaction_type("deterministic"):
        assert not head(td.clone())["next", "terminated"].any()


@pytest.mark.parametrize("threshold", [0.0, 1.0, -1.0])
def test_thresholds_are_probabilities(threshold) -> None:
    with pytest.raises(ValueError, match=f"got {threshold}"):
        TerminationHead(Fixed(), ["x"], threshold=threshold)


def model_with(done_head) -> WorldModel:
    return WorldModel(
        linear(["observation"], ["latent"], [6, 4]),
        linear(["latent", "action"], [("next", "latent")], [6, 4]),
        linear([("next", "latent")], [("next", "reward")], [4, 1]),
        done_head=done_head,
    )


@pytest.mark.parametrize("kind", [TerminationHead, ContinueHead])
def test_one_head_trains_and_steps(kind) -> None:
    model = model_with(kind(nn.Linear(4, 1), [("next", "latent")]))
    loss = WorldModelLoss(model, losses=["done"])
    size = [8]
    batch = TensorDict(
        {
            "observation": torch.randn(8, 6),
            "action": torch.randn(8, 2),
            "next": {"terminated": torch.rand(8, 1) > 0.5},
        },
        size,
    )
    out = loss(batch)["loss_done"]
    td = model(batch.clone())["next"]
    logits = td.get("terminated_logits", None)
    logits = -td["continue_pred"] if logits is None else logits
    label = batch["next", "terminated"].float()
    expected = -(
        label * torch.log(logits.sigmoid())
        + (1 - label) * torch.log(1 - logits.sigmoid())
    )
    assert torch.allclose(out, expected.mean(), atol=1e-6)
    out.backward()
    assert model.done_head.module.network.weight.grad.abs().sum() > 0
    env = WorldModelEnv(
        model,
        SpecEnv(),
        start_states=batch.select("observation"),
        observation_spec=Composite(continue_prob=Unbounded((1,))),
    )
    check_env_specs(env)
    imagined = env.imagine(4)
    assert torch.equal(
        imagined["next", "terminated"], imagined["next", "continue_prob"] < 0.5
    )
    env.rollout(3)
    assert env.slow_because is None


def test_heads_of_other_shapes() -> None:
    head = TerminationHead(
        nn.Linear(4, 3), [("next", "latent")], done_key=NESTED, shape=(3, 1)
    )
    td = TensorDict({"next": {"latent": torch.randn(5, 4)}}, [5])
    assert head(td)["next", "agents", "terminated"].shape == (5, 3, 1)
    with pytest.raises(ValueError, match="must write 1 numbers.*writes 4"):
        TerminationHead(nn.Identity(), [("next", "latent")])(td)


@pytest.mark.parametrize("key", ["reward", ("agent", "reward")])
@pytest.mark.parametrize("sample", [False, True])
def test_a_gaussian_head(key, sample) -> None:
    head = GaussianHead(
        nn.Linear(4, 6),
        [("next", "latent")],
        join("next", key),
        shape=(3,),
        sample=sample,
    )
    td = TensorDict({"next": {"latent": torch.randn(2000, 4)}}, [2000])
    out = head(td)
    value, loc, log_var = (out.get(k) for k in head.out_keys)
    expected = "reward_loc" if key == "reward" else ("agent", "reward_loc")
    assert head.out_keys[1] == join("next", expected)
    assert value.shape == loc.shape == log_var.shape == (2000, 3)
    if sample:
        standard = (value - loc) / (log_var / 2).exp()
        assert (
            standard.mean(0).abs().max() < 0.1
            and (standard.std(0) - 1).abs().max() < 0.1
        )
        with set_interaction_type("deterministic"):
            assert torch.equal(head(td.clone()).get(head.out_keys[0]), loc)
    else:
        assert torch.equal(value, loc)


def test_a_gaussian_head_is_trained_by_its_likelihood() -> None:
    model = model_with(None)
    model.reward_head = GaussianHead(
        nn.Linear(4, 2), [("next", "latent")], ("next", "reward")
    )
    term = GaussianNLLTerm.of_head("reward_head", "reward", bound_weight=0.0)
    loss = WorldModelLoss(model, losses=[term])
    batch = TensorDict(
        {
            "observation": torch.randn(8, 6),
            "action": torch.randn(8, 2),
            "next": {"reward": torch.randn(8, 1)},
        },
        [8],
    )
    predicted = model(batch.clone())["next"]
    normal = torch.distributions.Normal(
        predicted["reward_loc"], (predicted["reward_log_var"] / 2).exp()
    )
    expected = -normal.log_prob(batch["next", "reward"]).mean()
    assert torch.allclose(loss(batch)["loss_nll"], expected, atol=1e-6)
    with pytest.raises(ValueError, match="must write 2 numbers"):
        GaussianHead(nn.Linear(4, 3), ["x"], "y")(TensorDict({"x": torch.zeros(4)}))


OBS = [Entry.from_spec("observation", Unbounded((2,)))]
TWO = [*OBS, Entry.from_spec(("robot", "speed"), Unbounded(()))]
ACT = [Entry.from_spec("action", Unbounded((1,)))]
REWARD = Entry.from_spec("reward", Unbounded((1,)))
ENDED = Entry("terminated", (1,), torch.bool)


@pytest.mark.parametrize("size", [(), (4,), (2, 3)])
@pytest.mark.parametrize("column", [False, True])
def test_a_function_of_the_user(size, column) -> None:
    def reward(observation, action, next_observation):
        assert observation.shape == next_observation.shape == (*size, 2)
        value = next_observation[..., 0] - observation[..., 0] * action[..., 0]
        return value.unsqueeze(-1) if column else value

    head = FunctionHead(reward, OBS, ACT, REWARD)
    td = TensorDict({"observation": torch.randn(*size, 2)}, size)
    td["action"] = torch.randn(*size, 1)
    td["next", "observation"] = torch.randn(*size, 2)
    out = head(td)["next", "reward"]
    expected = (
        td["next", "observation"][..., :1] - td["observation"][..., :1] * td["action"]
    )
    assert out.shape == (*size, 1) and torch.equal(out, expected)


def test_a_function_of_several_observations_gets_them_by_key() -> None:
    def ended(observation, action, next_observation):
        return next_observation["robot", "speed"] > observation["observation"][..., 0]

    head = FunctionHead(ended, TWO, ACT, ENDED)
    td = TensorDict(
        {"observation": torch.zeros(3, 2), "action": torch.zeros(3, 1)}, [3]
    )
    td["robot", "speed"] = torch.zeros(3)
    td["next"] = td.select("observation", "robot").clone()
    td["next", "robot", "speed"] = torch.tensor([1.0, -1.0, 2.0])
    out = head(td)["next", "terminated"]
    assert out.dtype is torch.bool and out.flatten().tolist() == [True, False, True]


def test_what_a_function_gives_is_checked() -> None:
    td = TensorDict(
        {"observation": torch.zeros(3, 2), "action": torch.zeros(3, 1)}, [3]
    )
    td["next", "observation"] = torch.zeros(3, 2)

    def summed(observation, action, next_observation):
        return observation.sum()

    with pytest.raises(
        ValueError, match=r"summed must give 'reward' of the shape \(3,\)"
    ):
        FunctionHead(summed, OBS, ACT, REWARD)(td)
    with pytest.raises(ValueError, match="as torch.bool, and gave torch.float32"):
        FunctionHead(lambda o, a, n: o[..., 0], OBS, ACT, ENDED)(td)
    with pytest.raises(ValueError, match="gave float"):
        FunctionHead(lambda o, a, n: 1.0, OBS, ACT, REWARD)(td)
    with pytest.raises(TypeError, match="must be callable"):
        FunctionHead(1.0, OBS, ACT, REWARD)


def test_heads_leave_a_plain_module_plain() -> None:
    """Hooks and forwards of their own would cost imagination its fast path."""
    from torchrl_wm.modules.world_model.program import is_plain

    assert is_plain(TerminationHead(Fixed(), [("next", "latent")]))
    assert is_plain(GaussianHead(nn.Linear(4, 2), ["x"], "y"))
    assert is_plain(FunctionHead(lambda o, a, n: o, OBS, ACT, REWARD))
    assert isinstance(TerminationHead(Fixed(), ["x"]), Mod)


@pytest.mark.parametrize("kind", ["deterministic", "mode", "mean", "median", "random"])
@pytest.mark.parametrize("key", ["y", ("deep", "y")])
def test_heads_draw_only_where_drawing_is_asked_for(kind, key) -> None:
    head = GaussianHead(nn.Linear(3, 2), ["x"], key, sample=True)
    ending = TerminationHead(nn.Linear(3, 1), [("next", "x")], sample=True)
    nn.init.zeros_(ending.module.network.weight)
    nn.init.constant_(ending.module.network.bias, 0.1)
    x = torch.ones(100, 3)
    with set_interaction_type(kind):
        td = head(TensorDict({"x": x, "next": {"x": x}}, [100]))
        ended = ending(td)["next", "terminated"]
    loc = join(key[:-1], "y_loc") if isinstance(key, tuple) else "y_loc"
    assert torch.equal(td.get(key), td.get(loc)) is (kind != "random")
    assert ended.all().item() is (kind != "random")
