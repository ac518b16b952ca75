"""The loops that the benchmarks compare, and how they are timed."""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
import random
import statistics
import time
import weakref
from collections.abc import Callable
from pathlib import Path

import torch
from tensordict import TensorDict
from tensordict.nn import NormalParamExtractor, TensorDictModule as Mod
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torchrl.data import Bounded, Composite, Unbounded
from torchrl.envs import EnvBase
from torchrl.envs.model_based import WorldModelEnv as TorchRLEnv
from torchrl.modules import (
    MLP,
    ProbabilisticActor,
    RSSMPosterior,
    RSSMPrior,
    RSSMRollout,
    TanhNormal,
    WorldModel as TorchRLModel,
)

from torchrl_wm import WorldModel, WorldModelEnv

LATENT, ACTION, HIDDEN = 64, 6, [256, 256]

Loop = Callable[[], object]


class SpecsOnly(EnvBase):
    """The base of envs that only have specs."""

    def _reset(self, tensordict, **kwargs):
        raise NotImplementedError

    def _step(self, tensordict):
        raise NotImplementedError

    def _set_seed(self, seed):
        return seed


class Reference(SpecsOnly):
    """The reference env of models of latents."""

    def __init__(
        self, batch_size: list[int], latent: int = LATENT, action: int = ACTION
    ) -> None:
        super().__init__(batch_size=batch_size)
        size = self.batch_size
        self.observation_spec = Composite(latent=Unbounded((*size, latent)), shape=size)
        self.action_spec = Unbounded((*size, action))  # TorchRL refuses a Bounded one
        self.reward_spec = Unbounded((*size, 1))


class RepairedTorchRLEnv(TorchRLEnv):
    """TorchRL's env with whole specs and the latent among its observations.

    As it ships, its latent stands still.
    """

    def __init__(self, world_model, base_env: EnvBase) -> None:
        super().__init__(
            world_model, base_env, observation_spec=base_env.observation_spec.clone()
        )
        self.full_action_spec = base_env.full_action_spec.clone()
        self.full_reward_spec = base_env.full_reward_spec.clone()
        self.full_done_spec = base_env.full_done_spec.clone()


def make_parts(
    done: bool, tanh_normal: bool, activation: type[nn.Module] = nn.Tanh
) -> dict[str, nn.Module]:
    """The components of a model, and a policy: MLPs of two layers of 256."""

    def net(inputs: int, outputs: int) -> MLP:
        return MLP(inputs, outputs, num_cells=HIDDEN, activation_class=activation)

    parts = {
        "encoder": Mod(nn.Identity(), ["observation"], ["latent"]),
        "dynamics": Mod(
            net(LATENT + ACTION, LATENT), ["latent", "action"], [("next", "latent")]
        ),
        "reward_head": Mod(net(LATENT, 1), [("next", "latent")], [("next", "reward")]),
    }
    if done:
        # A bool, which TorchRL's env needs; never True, so that all horizons are full.
        head = net(LATENT, 1)
        parts["done_head"] = Mod(
            Threshold(head), [("next", "latent")], [("next", "done")]
        )
    if not tanh_normal:
        parts["policy"] = Mod(net(LATENT, ACTION), ["latent"], ["action"])
    else:
        stats = nn.Sequential(net(LATENT, 2 * ACTION), NormalParamExtractor())
        parts["policy"] = ProbabilisticActor(
            Mod(stats, ["latent"], ["loc", "scale"]),
            in_keys=["loc", "scale"],
            distribution_class=TanhNormal,
        )
    return parts


class Threshold(nn.Module):
    """A head's logits as a bool that is never True."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    def forward(self, latent: torch.Tensor) -> torch.Tensor:
        return self.head(latent) > 1e9


def variants(
    batch: int, horizon: int, *, done: bool = False, tanh_normal: bool = False
) -> dict[str, Loop]:
    """The loops to compare; the first is the floor, what the networks alone cost.

    The hand loop also keeps and stacks what the networks give, on bare tensors.
    """
    parts = make_parts(done, tanh_normal)
    policy = parts.pop("policy")
    heads = [parts["reward_head"]] + ([parts["done_head"]] if done else [])
    reference = Reference([batch])
    ours = WorldModelEnv(WorldModel(**parts), reference)
    theirs = RepairedTorchRLEnv(TorchRLModel(**parts), reference)
    start = TensorDict({"latent": torch.randn(batch, LATENT)}, [batch])
    dynamics = parts["dynamics"].module
    if tanh_normal:
        stats = policy.module[0].module

        def act(latent: torch.Tensor) -> torch.Tensor:
            loc, scale = stats(latent)
            return TanhNormal(loc, scale).deterministic_sample

    else:
        act = policy.module

    def networks() -> None:
        latent = start["latent"]
        for _ in range(horizon):
            latent = dynamics(latent, act(latent))
            for head in heads:
                head.module(latent)

    def hand() -> list[torch.Tensor]:
        latent = start["latent"]
        steps = []
        for _ in range(horizon):
            action = act(latent)
            following = dynamics(latent, action)
            steps.append(
                (latent, action, following, *(head.module(following) for head in heads))
            )
            latent = following
        return [torch.stack(column, 1) for column in zip(*steps)]

    return {
        "networks": networks,
        "hand loop": hand,
        "rollout": lambda: ours.rollout(horizon, policy, tensordict=start),
        "imagine": lambda: ours.imagine(horizon, policy, start),
        "TorchRL": lambda: theirs.rollout(horizon, policy, tensordict=start.clone()),
    }


def compiled_variants(batch: int, horizon: int) -> dict[str, Loop]:
    """A compiled loop on tensors that keeps what a rollout returns, and compiled imagine."""
    parts = make_parts(False, False)
    policy = parts.pop("policy")
    env = WorldModelEnv(WorldModel(**parts), Reference([batch])).compile()
    start = TensorDict({"latent": torch.randn(batch, LATENT)}, [batch])
    act, dynamics = policy.module, parts["dynamics"].module
    reward = parts["reward_head"].module

    def loop(latent: torch.Tensor) -> tuple[torch.Tensor, ...]:
        columns = [], [], [], []
        for _ in range(horizon):
            action = act(latent)
            following = dynamics(latent, action)
            for column, value in zip(
                columns, (latent, action, following, reward(following))
            ):
                column.append(value)
            latent = following
        return tuple(torch.stack(column, 1) for column in columns)

    compiled = torch.compile(loop, fullgraph=True, dynamic=False)
    return {
        "tensor loop": lambda: compiled(start["latent"]),
        "imagine": lambda: env.imagine(horizon, policy, start),
    }


def rssm_parts() -> dict[str, nn.Module]:
    """TorchRL's RSSM of 64 units as the components of a world model."""
    units, state = 64, 30
    latents = [("next", "state"), ("next", "belief")]
    prior = RSSMPrior(
        Bounded(-1.0, 1.0, (ACTION,)),
        hidden_dim=units,
        rnn_hidden_dim=units,
        state_dim=state,
        action_dim=ACTION,
    )
    posterior = RSSMPosterior(
        hidden_dim=units,
        state_dim=state,
        rnn_hidden_dim=units,
        obs_embed_dim=units,
    )
    return {
        "encoder": Mod(nn.Identity(), ["observation"], ["encoded_latents"]),
        "dynamics": Mod(
            prior,
            ["state", "belief", "action"],
            [("next", "prior_mean"), ("next", "prior_std"), *latents],
        ),
        "reward_head": Mod(
            MLP(state + units, 1, num_cells=[units]), latents, [("next", "reward")]
        ),
        "posterior": Mod(
            posterior,
            [("next", "belief"), ("next", "encoded_latents")],
            [("next", "posterior_mean"), ("next", "posterior_std"), ("next", "state")],
        ),
        "initial_state": TensorDict(
            {"state": torch.zeros(state), "belief": torch.zeros(units)}
        ),
    }


def filter_variants(
    batch: int, length: int, *, train: bool = False, compiled: bool = True
) -> dict[str, Loop]:
    """TorchRL's loop over time, and ours, eager and with a compiled step, on one RSSM.

    Args:
        train: backwards, too.
        compiled: whether the compiled step is among them; it takes a while to make.
    """
    parts = rssm_parts()
    rollout = RSSMRollout(parts["dynamics"], parts["posterior"])
    embedding = torch.randn(batch, length, 64)
    data = TensorDict(
        {
            "action": torch.randn(batch, length, ACTION),
            "state": torch.zeros(batch, length, 30),
            "belief": torch.zeros(batch, length, 64),
            "next": {"observation": embedding, "encoded_latents": embedding},
        },
        [batch, length],
    )

    def loop(function: Callable[[TensorDict], TensorDict]) -> Loop:
        def run() -> None:
            with torch.set_grad_enabled(train):
                out = function(data.clone())
                if train:
                    out["next", "state"].sum().backward()

        return run

    loops = {"TorchRL": loop(rollout), "eager": loop(WorldModel(**parts).observe)}
    if compiled:
        model = WorldModel(**parts).compile_rollout()
        loops["compiled step"] = loop(model.observe)
    return loops


@torch.no_grad()
def measure(
    loops: dict[str, Loop],
    seconds: float = 2.0,
    clock: Callable[[], float] | None = None,
) -> dict[str, float]:
    """Seconds of one call, where what is compared is measured side by side.

    All loops take turns, in another order each round. The first one's seconds are the minimum
    over the rounds; the others' are those times the median of their ratios to the
    first one in the same round: a processor changes its speed by more, and more
    slowly, than what is to be seen here.

    Args:
        loops: what is measured, at least seven times; the first is the reference.
        seconds: for how long at least.
        clock: the time, in seconds. On one thread it is the processor's by default,
            which does not count what else the machine does.
    """
    if clock is None:
        alone = torch.get_num_threads() == 1
        clock = time.process_time if alone else time.perf_counter
    for loop in loops.values():
        loop(), loop()
    order, shuffle = list(loops.items()), random.Random(0).shuffle
    rounds: list[dict[str, float]] = []
    until = time.perf_counter() + seconds
    while time.perf_counter() < until or len(rounds) < 7:
        rounds.append({})
        shuffle(order)  # what ran before leaves its data in the caches
        for name, loop in order:
            began = clock()
            loop()
            rounds[-1][name] = clock() - began
    first = next(iter(loops))
    least = min(times[first] for times in rounds)
    return {
        name: least * statistics.median(times[name] / times[first] for times in rounds)
        for name in loops
    }


class PeakMemory(TorchDispatchMode):
    """Counts the bytes of the tensors alive at once that are made while it is on."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._users: dict[int, int] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self._made(tensor, storage.data_ptr(), storage.nbytes())
        return out

    def _made(self, tensor: torch.Tensor, place: int, size: int) -> None:
        users = self._users
        users[place] = users.get(place, 0) + 1
        if users[place] == 1:
            self.now += size
            self.peak = max(self.peak, self.now)
        weakref.finalize(tensor, self._gone, place, size)

    def _gone(self, place: int, size: int) -> None:
        self._users[place] -= 1
        if not self._users[place]:
            self.now -= size


@torch.no_grad()
def peak_ratio(loop: Loop, networks: Loop) -> float:
    """Peak memory beside the networks' activations, as a ratio to what is returned."""
    with PeakMemory() as activations:
        networks()
    with PeakMemory() as all_of_it:
        out = loop()
    returned = sum(value.untyped_storage().nbytes() for value in out.values(True, True))
    return (all_of_it.peak - activations.peak) / returned


def parser(description: str, seconds: float) -> argparse.ArgumentParser:
    """What all benchmarks are told on the command line."""
    out = argparse.ArgumentParser(description=description.splitlines()[0])
    out.add_argument("--seconds", type=float, default=seconds)
    out.add_argument("--threads", type=int, default=1)
    out.add_argument("--out", type=Path)
    return out


def begin(args: argparse.Namespace) -> None:
    """Seeds and threads; prints what the figures depend on."""
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    print(machine())


def finish(args: argparse.Namespace, text: list[str]) -> None:
    """Write the report, if that is asked for."""
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text("\n".join(text))


def machine() -> str:
    """What the figures depend on."""
    pandas = importlib.util.find_spec("pandas") is not None
    return (
        f"{platform.machine()}, {os.cpu_count()} CPU cores, {torch.get_num_threads()} thread(s), "
        f"Python {platform.python_version()}, torch {torch.__version__}, pandas "
        f"{'importable' if pandas else 'not importable'}"
    )
