"""Nested multi-agent envs: sub-batch dims, endings of groups, resets of shared latents."""

from __future__ import annotations

import pytest
import torch
from _models import ACTION, LATENT, linear, OBS
from tensordict import TensorDict, unravel_key
from tensordict.nn import TensorDictModule as Mod
from torchrl.collectors import Collector
from torchrl.data import Bounded, Categorical, Composite, Unbounded
from torchrl.envs import EnvBase, RewardSum, TransformedEnv
from torchrl.envs.utils import check_env_specs, step_mdp

from torchrl_wm import WorldModel, WorldModelEnv
from torchrl_wm.envs.endings import Endings
from torchrl_wm.modules.keys import strip_next
from torchrl_wm.modules.world_model.flat import Placement

N = 3


class TeamEnv(EnvBase):
    """The specs of a team of agents; done entries at the root, with the agents, or both."""

    def __init__(self, batch_size=(), done=("agents",)) -> None:
        super().__init__(batch_size=batch_size)
        self.group_map = {"agents": [f"agent_{i}" for i in range(N)]}
        size = self.batch_size

        def agents(**leaves) -> Composite:
            inner = Composite(leaves, shape=(N,))
            return Composite(agents=inner, shape=()).expand(size).clone()

        self.observation_spec = agents(observation=Unbounded((N, OBS)))
        self.action_spec = agents(action=Bounded(-1.0, 1.0, (N, ACTION)))
        self.reward_spec = agents(reward=Unbounded((N, 1)))
        flag = partial_flag
        spec = Composite(shape=())
        if "agents" in done:
            spec["agents"] = Composite(done=flag((N, 1)), shape=(N,))
        if "root" in done:
            spec["done"] = flag((1,))
        self.done_spec = spec.expand(size).clone()

    def _reset(self, tensordict, **kwargs):
        raise AssertionError("the reference env must not be reset")

    _step = _reset

    def _set_seed(self, seed):
        return seed


def partial_flag(shape) -> Categorical:
    return Categorical(2, shape, dtype=torch.bool)


def team_model(latent=("agents", "latent"), done=None) -> WorldModel:
    """Each agent has a latent of its own, or, with a root key, they share one."""
    own = isinstance(latent, tuple)
    next_latent = ("next", *latent) if own else ("next", latent)
    reward = Mod(
        torch.nn.Linear(LATENT, 1) if own else (lambda z: z[..., :N].unsqueeze(-1)),
        [next_latent],
        [("next", "agents", "reward")],
    )
    if own:
        encoder = linear([("agents", "observation")], [latent], [OBS, LATENT])
        dynamics = linear(
            [latent, ("agents", "action")], [next_latent], [LATENT + ACTION, LATENT]
        )
    else:
        encoder = Mod(
            lambda x: x.flatten(-2)[..., :LATENT], [("agents", "observation")], [latent]
        )
        dynamics = Mod(
            lambda z, a: z + 1, [latent, ("agents", "action")], [next_latent]
        )
    return WorldModel(encoder, dynamics, reward, done_head=done)


def team_observations(*size: int) -> TensorDict:
    agents = TensorDict({"observation": torch.zeros(*size, N, OBS)}, (*size, N))
    return TensorDict({"agents": agents}, size)


@pytest.mark.parametrize("size", [(), (4,), (2, 3)])
@pytest.mark.parametrize("latent", [("agents", "latent"), "latent"])
@pytest.mark.parametrize("done", [("agents",), ("root",), ("agents", "root")])
@pytest.mark.parametrize("max_steps", [None, 2])
def test_specs(size, latent, done, max_steps) -> None:
    env = WorldModelEnv(
        team_model(latent),
        TeamEnv(done=done),
        batch_size=size,
        start_states=team_observations(9),
        max_steps=max_steps,
    )
    check_env_specs(env)
    assert env.full_reward_spec["agents"].shape == (*size, N)
    assert env.group_map == {"agents": ["agent_0", "agent_1", "agent_2"]}
    out = env.rollout(4, break_when_any_done=False)
    assert out["agents"].batch_size == (*size, 4, N)
    assert out["next", "agents"].batch_size == (*size, 4, N)
    assert out["next", "agents", "reward"].shape == (*size, 4, N, 1)


def test_inside_torchrl_parts() -> None:
    env = WorldModelEnv(
        team_model(),
        TeamEnv([2], done=("agents", "root")),
        start_states=team_observations(9),
        max_steps=3,
    )
    wrapped = TransformedEnv(env, RewardSum(in_keys=[("agents", "reward")]))
    check_env_specs(wrapped)
    collector = Collector(env, None, frames_per_batch=12, total_frames=12)
    batch = next(iter(collector))
    collector.shutdown()
    assert batch["next", "agents", "reward"].shape == (2, 6, N, 1)


def test_shared_latent_begins_anew_when_all_agents_are_done() -> None:
    head = Mod(
        lambda z: (z[..., :1] >= 3).unsqueeze(-2).expand(*z.shape[:-1], N, 1),
        [("next", "latent")],
        [("next", "agents", "done")],
    )
    env = WorldModelEnv(
        team_model("latent", done=head),
        TeamEnv([2]),
        start_states=team_observations(5),
        max_steps=100,
    )
    start = TensorDict({"latent": torch.zeros(2, LATENT)}, [2])
    start["latent"][1] = 1.0
    out = env.rollout(6, tensordict=start, break_when_any_done=False)
    assert out["latent"][..., 0].tolist() == [
        [0.0, 1.0, 2.0, 0.0, 1.0, 2.0],
        [1.0, 2.0, 0.0, 1.0, 2.0, 0.0],
    ]
    assert out["imagined_step"][1].flatten().tolist() == [0, 1, 0, 1, 2, 0]


def test_partial_reset_by_the_agents_mask() -> None:
    env = WorldModelEnv(
        team_model("latent"), TeamEnv([3]), start_states=team_observations(5)
    )
    start = TensorDict({"latent": torch.ones(3, LATENT)}, [3])
    td = step_mdp(env.rand_step(env.reset(start)), action_keys=[("agents", "action")])
    mask = torch.zeros(3, N, 1, dtype=torch.bool)
    mask[0] = True  # all agents
    mask[1, 0] = True  # one of them
    td["agents"].set("_reset", mask)
    out = env.reset(td)
    assert out["latent"][:, 0].tolist() == [0.0, 2.0, 2.0]


def group_spec(*names: str, root=("done", "terminated")) -> Composite:
    spec = Composite({name: partial_flag((1,)) for name in root}, shape=())
    if names:
        spec["agents"] = Composite(
            {name: partial_flag((N, 1)) for name in names}, shape=(N,)
        )
    return spec


def read(spec: Composite, written: dict) -> dict:
    endings = Endings(spec, written, time_limit=False)
    endings = Endings(spec, written, time_limit=False)
    predicted = {unravel_key(("next", key)): value for key, value in written.items()}
    out = endings.read(predicted, Placement(torch.Size([2]), None))
    out = {strip_next(key): flag for key, flag in out.items()}
    for group in endings.groups:
        truncated = out.get(group.key("truncated"))
        ended = out[group.key("terminated")]
        ended = ended if truncated is None else ended | truncated
        assert torch.equal(out[group.key("done")], ended)
    return out


class TestGroups:
    some = torch.tensor([[[True], [False], [True]], [[True], [True], [True]]])
    full = torch.ones(2, N, 1, dtype=torch.bool)

    def test_root_ends_when_all_agents_have(self) -> None:
        out = read(group_spec("done", "terminated"), {("agents", "done"): self.some})
        assert out["done"].flatten().tolist() == [False, True]
        assert out["terminated"].flatten().tolist() == [False, True]

    def test_agents_truncations_reach_the_root(self) -> None:
        out = read(
            group_spec("done", "truncated"), {("agents", "truncated"): self.some}
        )
        assert out["done"].flatten().tolist() == [False, True]
        assert not out["terminated"].any()
        assert out["truncated"].flatten().tolist() == [False, True]

    def test_agents_end_in_different_ways(self) -> None:
        written = {
            ("agents", "terminated"): self.some,
            ("agents", "truncated"): ~self.some,
        }
        out = read(group_spec("done", "terminated"), written)
        assert out["done"].all()
        assert out["terminated"].flatten().tolist() == [False, True]

    def test_end_of_the_root_is_the_end_of_the_agents(self) -> None:
        flag = torch.tensor([[True], [False]])
        out = read(group_spec("done", "terminated"), {"truncated": flag})
        expected = flag.unsqueeze(-2).expand(2, N, 1)
        assert torch.equal(out["agents", "done"], expected)
        assert torch.equal(out["agents", "truncated"], expected)
        assert not out["agents", "terminated"].any()
