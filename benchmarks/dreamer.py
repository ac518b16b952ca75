"""An update of Dreamer beside TorchRL's own, everything measured in this process.

    python benchmarks/dreamer.py --out docs/benchmarks/dreamer_cost.md

An update is model, actor, critic, optimizer and slow critic on a batch that is there already:
ours is that of ``torchrl-wm train dreamer``, TorchRL's that of ``DreamerV3Loss`` in a
``DreamerV3OptimizationStepper``, with networks and batches of the same sizes. Observations are
vectors, actions choices, and episodes end. ``--compile`` names sizes in which both are compared
compiled, too. TorchRL's graph is the whole update, which takes long to make; ours are single steps.
"""

from __future__ import annotations

import argparse
from itertools import product
from types import SimpleNamespace

import common
import gymnasium
import numpy as np
import torch
from common import Loop, machine, measure
from tensordict import TensorDict
from tensordict.nn import TensorDictModule as Mod, TensorDictSequential
from torch import nn
from torchrl.data import Composite, OneHot, Unbounded
from torchrl.envs.model_based import DreamerEnv
from torchrl.modules import (
    DreamerV3DiscreteActor,
    DreamerV3MLP,
    RSSMPosteriorV3,
    RSSMPriorV3,
    RSSMRolloutV3,
    SymExpTwoHot,
    symlog,
    WorldModelWrapper,
)
from torchrl.objectives import (
    DreamerV3ActorLoss,
    DreamerV3Loss,
    DreamerV3ModelLoss,
    DreamerV3ValueLoss,
    SoftUpdate,
)
from torchrl.objectives.utils import ValueEstimators
from torchrl.trainers.algorithms import DreamerV3OptimizationStepper, DreamerV3Optimizer

from torchrl_wm.trainers import DreamerTrainer

OBSERVATION, OPTIONS, BINS, HORIZON = 8, 4, 255, 15
#: Belief, hidden layers, cells, depth, categoricals, classes.
SIZES = {
    "small": (128, 64, 64, 2, 16, 16),
    "1M": (512, 64, 64, 3, 32, 4),
}


class Still(gymnasium.Env):
    """An env that is all specs."""

    observation_space = gymnasium.spaces.Box(-10, 10, (OBSERVATION,))
    action_space = gymnasium.spaces.Discrete(OPTIONS)

    def reset(self, *, seed=None, options=None):
        return np.zeros(OBSERVATION, np.float32), {}

    def step(self, action):
        return np.zeros(OBSERVATION, np.float32), 0.0, False, False, {}


def ours(size: tuple[int, ...], every: int, args: argparse.Namespace, compiled: bool):
    """The recipe of this package."""
    belief, hidden, cells, depth, categoricals, classes = size
    return DreamerTrainer(
        env=Still,
        device="cpu",
        preset="small",
        belief_size=belief,
        hidden_size=hidden,
        num_cells=cells,
        depth=depth,
        categoricals=categoricals,
        classes=classes,
        batch_size=args.batch,
        batch_length=args.length,
        imagine_every=every,
        horizon=HORIZON,
        gamma=0.997,
        replay_capacity=10_000,
        compile=compiled,
    ).recipe


class Symlogged(nn.Module):
    """A network of a symlogged vector."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        return self.network(symlog(value))


class Distribution(nn.Module):
    """A network of logits over bins, and the number that they stand for."""

    def __init__(self, network: nn.Module, bins: int = BINS) -> None:
        super().__init__()
        self.network, self.bins = network, SymExpTwoHot(bins)

    def forward(self, *latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits = self.network(*latents)
        return logits, self.bins(logits)


def theirs(size: tuple[int, ...], compiled: bool):
    """TorchRL's stepper, in the same size."""
    belief, hidden, cells, depth, categoricals, classes = size
    features = belief + categoricals * classes

    def mlp(inputs: int, outputs: int) -> DreamerV3MLP:
        return DreamerV3MLP(inputs, outputs, depth=depth, num_cells=cells)

    prior = RSSMPriorV3(
        action_shape=(OPTIONS,),
        action_dim=OPTIONS,
        hidden_dim=hidden,
        rnn_hidden_dim=belief,
        num_categoricals=categoricals,
        num_classes=classes,
        recurrent_model="block_gru",
        unimix=0.01,
    )
    posterior = RSSMPosteriorV3(
        hidden_dim=hidden,
        rnn_hidden_dim=belief,
        obs_embed_dim=cells,
        num_categoricals=categoricals,
        num_classes=classes,
        use_rms_norm=True,
        unimix=0.01,
    )
    latents = ["state", "belief"]
    below = [("next", key) for key in latents]
    steps = RSSMRolloutV3(
        Mod(prior, [*latents, "action"], [("next", "prior_logits"), *below]),
        Mod(
            posterior,
            [("next", "belief"), ("next", "encoded")],
            [("next", "posterior_logits"), ("next", "state")],
        ),
        reset_key="is_init",
    )
    reward, goes_on = Distribution(mlp(features, BINS)), mlp(features, 1)
    model = TensorDictSequential(
        Mod(
            Symlogged(mlp(OBSERVATION, cells)),
            [("next", "observation")],
            [("next", "encoded")],
        ),
        steps,
        Mod(mlp(features, OBSERVATION), below, [("next", "reco_pixels")]),
        Mod(reward, below, [("next", "reward_logits"), ("next", "reward")]),
        Mod(goes_on, below, [("next", "continue_pred")]),
    )
    imagination = WorldModelWrapper(
        Mod(prior, [*latents, "action"], ["_", *latents]),
        Mod(reward, latents, ["_", "reward"]),
    )
    env = DreamerEnv(
        imagination, prior_shape=(features - belief,), belief_shape=(belief,)
    )
    env.observation_spec = Composite(
        state=Unbounded(features - belief), belief=Unbounded(belief)
    )
    env.state_spec = env.observation_spec.clone()
    env.action_spec, env.reward_spec = OneHot(OPTIONS), Unbounded((1,))
    actor = DreamerV3DiscreteActor(features, OPTIONS, depth=depth, num_cells=cells)
    critic = Mod(
        Distribution(mlp(features, BINS)),
        latents,
        ["state_value_logits", "state_value"],
    )
    probability = nn.Sequential(goes_on, nn.Sigmoid())
    actor_loss = DreamerV3ActorLoss(
        actor,
        critic,
        env,
        continuation_model=Mod(
            lambda state, belief: probability[1](goes_on(state, belief)),
            latents,
            ["continuation"],
        ),
        imagination_horizon=HORIZON,
        use_reinforce=True,
    )
    actor_loss.make_value_estimator(ValueEstimators.TDLambda, gamma=0.997, lmbda=0.95)
    value_loss = DreamerV3ValueLoss(
        critic, "two_hot", actor_loss=actor_loss, slow_critic_regularization=1.0
    )
    model_loss = DreamerV3ModelLoss(
        model, lambda_continue=1.0, kl_mode="separate", unimix=0.01, detach_output=False
    )
    model_loss.set_keys(pixels="observation")
    loss = DreamerV3Loss(model_loss, actor_loss, value_loss)
    return DreamerV3OptimizationStepper(
        loss,
        DreamerV3Optimizer(loss.parameters(), lr=1e-3),
        SoftUpdate(value_loss, tau=0.02),
        compile_train_step=compiled,
        cudagraph=False,
    )


def sequences(size: tuple[int, ...], args: argparse.Namespace) -> TensorDict:
    """A batch of real steps, ``[batch, length]``, in which some episodes end."""
    belief, _, _, _, categoricals, classes = size
    shape = (args.batch, args.length)
    observed = torch.randn(*shape, OBSERVATION)
    ended = torch.rand(*shape, 1) < 0.02
    action = nn.functional.one_hot(torch.randint(OPTIONS, shape), OPTIONS)
    return TensorDict(
        {
            "observation": observed,
            "action": action,
            "state": torch.zeros(*shape, categoricals * classes),
            "belief": torch.zeros(*shape, belief),
            "is_init": ended.roll(1, 1),
            "next": {
                "observation": torch.randn(*shape, OBSERVATION),
                "reward": torch.randn(*shape, 1),
                "done": ended,
                "terminated": ended,
                "truncated": torch.zeros_like(ended),
            },
        },
        shape,
    )


def loops(
    size: tuple[int, ...], args: argparse.Namespace, compiled: bool = False
) -> dict[str, Loop]:
    """What is compared."""
    batch, stepper = sequences(size, args), theirs(size, compiled)
    if compiled:
        with torch.enable_grad():
            stepper.warmup(batch.copy())

    def update(every: int) -> Loop:
        recipe = ours(size, every, args, compiled)
        recipe.sample = batch.copy
        recipe.ratio = lambda total: 1
        steps = SimpleNamespace(total=0)
        return torch.enable_grad()(lambda: recipe.learn(steps))

    return {
        "TorchRL": torch.enable_grad()(lambda: stepper.step(None, batch.copy())),
        "every 1": update(1),
        "every 4": update(4),
    }


def rows(args: argparse.Namespace) -> list[str]:
    """The table."""
    table = [
        "| networks | TorchRL, ms | all starts, ms | ratio | every 4th start, ms | ratio |",
        "|---|---|---|---|---|---|",
    ]
    for name, compiled in product(args.sizes, (False, True)):
        if compiled and name not in args.compile:
            continue
        times = measure(loops(SIZES[name], args, compiled), args.seconds)
        base = times.pop("TorchRL")
        cells = [f"{1e3 * t:.0f} | {t / base:.2f}" for t in times.values()]
        label = f"{name}, compiled" if compiled else name
        table.append(f"| {label} | {1e3 * base:.0f} | {' | '.join(cells)} |")
        print(table[-1], flush=True)
    return table


def main() -> None:
    """Measure, print and, if asked, write the table."""
    parser = common.parser(__doc__, seconds=30.0)
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=SIZES)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=32)
    parser.add_argument("--compile", nargs="+", default=[], choices=SIZES)
    args = parser.parse_args()
    common.begin(args)
    text = [
        f"Machine: {machine()}.",
        "",
        f"{args.batch} sequences of {args.length} steps; {HORIZON} imagined steps from each of "
        f"their {args.batch * args.length} states, or from every fourth. Observations of "
        f"{OBSERVATION} numbers, {OPTIONS} options, {BINS} bins.",
        "",
        *rows(args),
        "",
    ]
    common.finish(args, text)


if __name__ == "__main__":
    main()
