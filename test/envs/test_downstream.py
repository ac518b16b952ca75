"""TorchRL's planners, losses and batched envs over the imagined env."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from _models import (
    ACTION,
    clock_env,
    clock_model,
    ends_at,
    imagined_env,
    linear,
    make_model,
    OBS,
    observations,
    rssm_model,
    SpecEnv,
    times,
)
from tensordict import TensorDict
from tensordict.nn import (
    NormalParamExtractor,
    TensorDictModule as Mod,
    TensorDictSequential,
)
from torch import nn
from torchrl.data import Bounded
from torchrl.envs import EnvCreator, ParallelEnv, SerialEnv
from torchrl.modules import (
    CEMPlanner,
    MLP,
    MPPIPlanner,
    ProbabilisticActor,
    TanhNormal,
    ValueOperator,
)
from torchrl.objectives import DreamerActorLoss, DreamerV3ActorLoss
from torchrl.objectives.utils import ValueEstimators
from torchrl.objectives.value import GAE, TD0Estimator, TDLambdaEstimator

from torchrl_wm import WorldModel, WorldModelEnv


def quadratic_env(goal: float = 0.5, done=None) -> WorldModelEnv:
    """A point that the action moves; the reward is best at ``goal``."""
    model = WorldModel(
        Mod(nn.Identity(), ["observation"], ["latent"]),
        Mod(lambda x, a: x + a, ["latent", "action"], [("next", "latent")]),
        Mod(lambda x: -(x - goal).pow(2), [("next", "latent")], [("next", "reward")]),
        done_head=done,
    )
    base = SpecEnv(observation=1, action_spec=Bounded(-1.0, 1.0, (1,)))
    return WorldModelEnv(model, base)


def planner(kind: str, env: WorldModelEnv) -> nn.Module:
    if kind == "cem":
        return CEMPlanner(env, 3, optim_steps=6, num_candidates=200, top_k=20)
    advantage = TDLambdaEstimator(
        gamma=0.99,
        lmbda=0.95,
        value_network=ValueOperator(
            Mod(lambda x: 0 * x, ["latent"], ["state_value"]).module, in_keys=["latent"]
        ),
    )
    return MPPIPlanner(
        env,
        advantage,
        temperature=10.0,
        planning_horizon=3,
        optim_steps=6,
        num_candidates=200,
        top_k=20,
    )


@pytest.mark.parametrize("kind", ["cem", "mppi"])
@pytest.mark.parametrize("size", [(), (4,)])
def test_planners_find_the_goal(kind, size) -> None:
    env = quadratic_env()
    start = TensorDict({"latent": torch.zeros(*size, 1)}, size)
    with torch.no_grad():
        action = planner(kind, env)(start)["action"]
    assert action.shape == (*size, 1)
    assert (action - 0.5).abs().max() < 0.2


def test_planner_over_an_env_that_ends() -> None:
    """Finished candidates are left as they are; nothing asks for a new start."""
    head = Mod(lambda x: x > 0.3, [("next", "latent")], [("next", "terminated")])
    env = quadratic_env(done=head)
    with torch.no_grad():
        planner("cem", env)(TensorDict({"latent": torch.zeros(4, 1)}, [4]))


@pytest.mark.parametrize("estimator", [GAE, TDLambdaEstimator, TD0Estimator])
def test_targets_bootstrap_through_truncations_only(estimator) -> None:
    """At the end of an episode the target is the reward, plus the value if only time ran out."""
    value = ValueOperator(
        Mod(lambda x: x * 0 + 100.0, [], []).module, in_keys=["latent"]
    )
    kwargs = {} if estimator is TD0Estimator else {"lmbda": 0.5}
    targets = {}
    for name, model, limit in [
        ("terminated", clock_model(done=ends_at(3)), None),
        ("truncated", clock_model(), 3),
    ]:
        env = WorldModelEnv(model, clock_env(), max_steps=limit)
        out = env.rollout(10, tensordict=times(0.0))
        assert out.batch_size == (1, 3)
        estimator(gamma=0.9, value_network=value, **kwargs)(out)
        targets[name] = out["value_target"][0, -1].item()
    assert targets["terminated"] == pytest.approx(3.0)
    assert targets["truncated"] == pytest.approx(3.0 + 0.9 * 100)


def dreamer_actor(latents: int) -> ProbabilisticActor:
    net = nn.Sequential(
        MLP(latents, 2 * ACTION, num_cells=[16]), NormalParamExtractor()
    )
    return (
        ProbabilisticActor(
            Mod(
                lambda s, b: net(torch.cat([s, b], -1)),
                ["state", "belief"],
                ["loc", "scale"],
            ),
            in_keys=["loc", "scale"],
            out_keys=["action"],
            distribution_class=TanhNormal,
            return_log_prob=False,
        ),
        net,
    )


@pytest.mark.parametrize(
    "version,loss_class", [(1, DreamerActorLoss), (3, DreamerV3ActorLoss)]
)
def test_dreamer_losses_take_it_as_their_env(version, loss_class) -> None:
    """The general env stands in for DreamerEnv; gradients reach the actor alone."""
    model = rssm_model(version)
    env = WorldModelEnv(model, SpecEnv())
    latents = sum(model.initial_state(()).get(k).numel() for k in model.latent_keys)
    actor, net = dreamer_actor(latents)
    critic = linear(["state", "belief"], ["state_value"], [latents, 1])
    loss = loss_class(actor, critic, env, imagination_horizon=4)
    loss.make_value_estimator(ValueEstimators.TDLambda)
    start = model.encode(observations(6)).detach().select("state", "belief")
    out, imagined = loss(start)
    assert imagined.batch_size == (6, 4)
    out["loss_actor"].backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("creator", [False, True])
def test_serial_env(creator) -> None:
    make = partial(imagined_env, 3)
    env = SerialEnv(2, EnvCreator(make) if creator else make)
    with torch.no_grad():
        out = env.rollout(7, break_when_any_done=False)
    assert out["imagined_step"][0].flatten().tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert torch.equal(out["latent"][:, 1:3], out["next", "latent"][:, :2])


def test_parallel_env() -> None:
    env = ParallelEnv(2, partial(imagined_env, 3))
    try:
        out = env.rollout(7, break_when_any_done=False)
        assert out["imagined_step"][1].flatten().tolist() == [0, 1, 2, 0, 1, 2, 0]
        assert not out["next", "latent"].requires_grad
    finally:
        env.close()


def test_policy_of_the_real_env_acts_in_imagination() -> None:
    """With decoded observations, what was made for the real env works as it is."""
    env = WorldModelEnv(make_model(decoder=True), SpecEnv(), decode=True)
    policy = linear(["observation"], ["action"], [OBS, ACTION])
    out = env.rollout(5, policy, tensordict=observations(3))
    seen = out["observation"]
    assert torch.allclose(out["action"], policy.module(seen), atol=1e-6)


def test_encoder_and_planner_act_in_a_real_env() -> None:
    real = WorldModelEnv(
        make_model(decoder=True), SpecEnv(), decode=True, start_states=observations(3)
    )
    model = make_model()
    plan = CEMPlanner(WorldModelEnv(model, SpecEnv()), 3, 2, 20, 5)
    with torch.no_grad():
        policy = TensorDictSequential(model.encoder, plan)
        out = real.rollout(2, policy, tensordict=observations())
    assert out["action"].shape == (2, ACTION)
    with pytest.raises(KeyError, match=r"\['latent'\].*encoder before it"):
        plan(observations(2))
