"""What the transformer world model costs beside loops by hand: ratios, all in this process.

    python benchmarks/transformer.py --out docs/benchmarks/transformer.md

The loops by hand run the same networks on bare tensors: a loss step is one parallel pass over the
sequences with its losses and their gradients; imagination writes keys and values into a cache in
place, and keeps and stacks what a rollout records. "Step by step" is the same loss without the
model's parallel pass. Bytes are those of float32. On one CPU thread it is the processor's time
that counts, so that other work on the machine does not.
"""

from __future__ import annotations

import time

import torch
import torch.nn.functional as F

from common import begin, finish, Loop, machine, measure, parser, SpecsOnly
from tensordict import TensorDict
from torchrl.data import Unbounded
from torchrl_wm import WorldModelEnv
from torchrl_wm.models import make_transformer_world_model, TransformerConfig
from torchrl_wm.modules import fit_normalizers

OBSERVATION, ACTION = 17, 6


class Reference(SpecsOnly):
    """An env that only has specs."""

    def __init__(self) -> None:
        super().__init__()
        self.observation_spec["observation"] = Unbounded((OBSERVATION,))
        self.action_spec = Unbounded((ACTION,))
        self.reward_spec = Unbounded((1,))


def sequences(batch: int, length: int) -> TensorDict:
    seen = torch.randn(batch, length + 1, OBSERVATION)
    return TensorDict(
        {
            "observation": seen[:, :-1],
            "action": torch.rand(batch, length, ACTION) * 2 - 1,
            "next": {
                "observation": seen[:, 1:],
                "reward": torch.randn(batch, length, 1),
            },
        },
        [batch, length],
    )


def made(data: TensorDict, **settings):
    model, loss = make_transformer_world_model(
        Reference(), termination="none", **settings
    )
    fit_normalizers(model, data)
    return model, loss


def loss_loops(batch: int, length: int) -> dict[str, Loop]:
    """Forward and backward of a loss."""
    data = sequences(batch, length)
    model, loss = made(data)
    encoder, dynamics = model.encoder.module, model.dynamics.module
    decoder, reward = model.decoder.module, model.reward_head.module
    observation, action = data["observation"], data["action"]
    following, target = data["next", "observation"], data["next", "reward"]

    def parallel() -> dict[str, torch.Tensor]:
        latent = encoder(torch.cat([observation, following[:, -1:]], 1))
        tokens = dynamics.transformer(dynamics.embed(latent[:, :-1], action))
        predicted, belief = dynamics.predict(latent[:, :-1], tokens)
        error = (decoder(predicted) - following) / decoder.scale("observation")
        return {
            "loss_latent": F.mse_loss(predicted, latent[:, 1:].detach()),
            "loss_reconstruction": error.pow(2).mean(),
            "loss_reward": ((reward(belief) - target) / reward.scale("reward"))
            .pow(2)
            .mean(),
        }

    def alone() -> TensorDict:
        sequence, model.sequence = model.sequence, None
        out = loss(data)
        model.sequence = sequence
        return out

    functions = {"by hand": parallel, "loss": lambda: loss(data), "step by step": alone}
    expected = parallel()
    for name, function in functions.items():
        found = function()
        for key, value in expected.items():
            torch.testing.assert_close(
                found[key], value, rtol=1e-3, atol=1e-4, msg=name
            )
    parameters = list(model.parameters())

    def trained(function: Loop) -> Loop:
        def run() -> None:
            with torch.enable_grad():
                total = sum(function().values())
                torch.autograd.grad(total, parameters, allow_unused=True)

        return run

    return {name: trained(function) for name, function in functions.items()}


def imagination_loops(batch: int, horizon: int) -> dict[str, Loop]:
    """Imagination with given actions, from segments."""
    data = sequences(batch, 4)
    model, _ = made(data)
    env = WorldModelEnv(model, Reference())
    start = model.burn_in(data)
    actions = torch.rand(batch, horizon, ACTION) * 2 - 1
    dynamics, reward = model.dynamics.module, model.reward_head.module

    def by_hand() -> TensorDict:
        latent, belief = start["latent"], start["belief"]
        cache, count = start["cache"].clone(), start["step_in_context"]
        steps = []
        for action in actions.unbind(1):
            tokens = dynamics.embed(latent, action)
            tokens, cache = dynamics.transformer.step(tokens, cache, count)
            count = count + 1
            following, believed = dynamics.predict(latent, tokens)
            steps.append(
                (latent, belief, action, following, believed, reward(believed))
            )
            latent, belief = following, believed
        names = ["latent", "belief", "action", "z", "h", "reward"]
        return dict(zip(names, (torch.stack(column, 1) for column in zip(*steps))))

    def ours() -> TensorDict:
        return env.imagine(horizon, tensordict=start, actions=actions)

    torch.testing.assert_close(by_hand()["z"], ours()["next", "latent"])
    return {"by hand": by_hand, "imagine": ours}


def recorded(config: TransformerConfig) -> tuple[int, int, float]:
    """The bytes of a row that a step records and that its memory has; a forward in milliseconds."""
    model, _ = make_transformer_world_model(Reference(), config, termination="none")
    model.eval()
    start = TensorDict({"observation": torch.randn(1, OBSERVATION)}, [1])
    env, start = WorldModelEnv(model, Reference()), model.encode(start)
    out = env.imagine(2, tensordict=start)
    env.imagine(2, tensordict=start)
    began = time.process_time()
    env.imagine(1, tensordict=start)
    took = time.process_time() - began
    a_step = sum(value[:, 0].nbytes for value in out.values(True, True))
    memory = sum(value.nbytes for value in env.memory.values(True, True))
    return a_step, memory, 1000 * took


def report(args) -> list[str]:
    text = [f"Machine: {machine()}.", ""]
    text += ["| loss step | by hand, ms | loss | step by step |", "|---|---|---|---|"]
    for batch, length in ((16, 64), (64, 16)):
        times = measure(loss_loops(batch, length), args.seconds)
        floor = times["by hand"]
        text.append(
            f"| {batch} sequences of {length} steps | {1000 * floor:.1f} | "
            f"{times['loss'] / floor:.2f} | {times['step by step'] / floor:.1f} |"
        )
    text += ["", "| imagination | by hand, ms | imagine |", "|---|---|---|"]
    with torch.no_grad():
        for batch, horizon in ((1, 15), (64, 15), (512, 15)):
            times = measure(imagination_loops(batch, horizon), args.seconds)
            floor = times["by hand"]
            text.append(
                f"| {batch} trajectories of {horizon} steps | {1000 * floor:.1f} | "
                f"{times['imagine'] / floor:.2f} |"
            )
    text += [
        "",
        "Bytes of one trajectory, from vectors, and the processor's time of one imagined step:",
        "",
        "| sizes | a step records, kB | memory, kB | 64 trajectories of 20 steps record, MB | "
        "with the memory among the latents, MB | step, ms |",
        "|---|---|---|---|---|---|",
    ]
    configs = {
        "default": TransformerConfig(),
        "STORM": TransformerConfig.storm(),
        "IRIS": TransformerConfig.iris(),
    }
    with torch.no_grad():
        for name, config in configs.items():
            step, memory, took = recorded(config)
            steps = 64 * 20
            # At the root and below "next".
            both = steps * (step + 2 * memory)
            text.append(
                f"| {name} | {step / 1e3:.1f} | {memory / 1e3:,.1f} | {steps * step / 1e6:.1f} | "
                f"{both / 1e6:,.0f} | {took:.1f} |"
            )
    return text


def main() -> None:
    args = parser(__doc__, 4.0).parse_args()
    begin(args)
    text = report(args)
    print("\n".join(text))
    finish(args, [*text, ""])


if __name__ == "__main__":
    main()
