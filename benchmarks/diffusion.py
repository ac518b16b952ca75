"""What a diffusion world model costs beside loops written by hand: ratios, in this process.

    python benchmarks/diffusion.py --out docs/benchmarks/diffusion.md

"Denoising" is forward and backward of the loss of next frames; by hand, frames are made of the
observations, stacked, noised and given to the same network. "Whole loss" adds the heads of reward and
termination; by hand, an LSTM over features of all transitions at once for images, one network for
all transitions of vectors. "Imagination" draws ``H`` frames and judges each; by hand, the networks
run in a plain loop that keeps frames, rewards and ends. The last columns are the bytes that a
rollout records for a step, and those that would be if the frames of the context were latents; and
how often the sampler ran in a loss.
"""

from __future__ import annotations

import torch
from common import begin, finish, Loop, machine, measure, parser, SpecsOnly
from tensordict import TensorDict
from torch.nn import functional as F
from torchrl.data import Bounded, Composite, Unbounded

from torchrl_wm import WorldModel, WorldModelEnv, WorldModelLoss
from torchrl_wm.models import DiffusionConfig, make_diffusion_world_model
from torchrl_wm.modules import DiffusionSampler, draw_sigma, fit_normalizers

ACTION = 2


class Specs(SpecsOnly):
    """An env that only has specs.

    Args:
        observation: the shape of its observations: images of bytes, or vectors.
    """

    def __init__(self, observation: tuple[int, ...]) -> None:
        super().__init__()
        spec = Unbounded(observation)
        if len(observation) > 1:
            spec = Bounded(0, 255, observation, dtype=torch.uint8)
        self.observation_spec = Composite(observation=spec)
        self.action_spec = Bounded(-1, 1, (ACTION,))
        self.reward_spec = Unbounded((1,))


def batch_of(env: Specs, rows: int, steps: int) -> TensorDict:
    """Random sequences, ``[rows, steps]``."""
    torch.manual_seed(0)
    size = (rows, steps)
    spec = env.full_observation_spec["observation"]
    drawn = spec.expand(rows, steps + 1, *spec.shape).rand()
    begins = torch.zeros(*size, 1, dtype=torch.bool)
    return TensorDict(
        {
            "observation": drawn[:, :-1],
            "action": 2 * torch.rand(*size, ACTION) - 1,
            "is_init": begins,
            "next": {
                "observation": drawn[:, 1:],
                "reward": torch.randn(*size, 1),
                "terminated": begins,
                "done": begins,
            },
        },
        size,
    )


class ByHand:
    """The same networks, without the package around them.

    Args:
        model: whose networks are used.
        is_image: whether frames are images.
    """

    def __init__(self, model: WorldModel, is_image: bool) -> None:
        self.model, self.is_image = model, is_image
        self.dynamics = model.dynamics
        self.frames = self.dynamics.model
        self.context = self.dynamics.context
        self.sigma_data = self.frames.denoiser.sigma_data
        self.offset = self.frames.denoiser.offset_noise
        self.network = self.frames.denoiser.network
        self.normalizer = None if is_image else model.encoder.module.normalizer
        if is_image:
            lstm, reward = model.reward_head.module
            self.lstm, self.reward = lstm.module, reward.module
            self.done = model.done_head.module.network
        else:
            self.reward = model.reward_head.module
            self.done = model.done_head.module.network

    def frame(self, observation: torch.Tensor) -> torch.Tensor:
        """Frames of observations."""
        if self.is_image:
            return observation.movedim(-1, -3).float() * (2 / 255) - 1
        return (observation - self.normalizer.mean) / self.normalizer.std

    def denoising(
        self, frames: torch.Tensor, following: torch.Tensor, action: torch.Tensor
    ) -> torch.Tensor:
        """EDM's loss of all next frames of ``[B, T]``; episodes do not begin within."""
        rows, steps = frames.shape[:2]
        shape = frames.shape[2:]
        actions = torch.cat([action, torch.ones_like(action[..., :1])], -1)
        before = self.context - 1
        padded = torch.cat([frames.new_zeros(rows, before, *shape), frames], 1)
        padded_actions = torch.cat([actions.new_zeros(rows, before, 3), actions], 1)
        stack = torch.stack([padded[:, t : t + steps] for t in range(before + 1)], 2)
        acts = torch.stack(
            [padded_actions[:, t : t + steps] for t in range(before + 1)], 2
        )
        clean = following
        if not self.is_image:
            clean = self.sigma_data * self.frames.changes(following - frames)
            moved = self.frames.changes(stack[:, :, 1:] - stack[:, :, :-1])
            stack = torch.cat([moved * acts[:, :, :-1, -1:], stack[:, :, -1:]], 2)
        else:
            stack = stack / self.sigma_data
        number = rows * steps
        clean, stack = clean.flatten(0, 1), stack.flatten(0, 1)
        one = (number, *(1,) * len(shape))
        sigma = draw_sigma(clean.new_empty(one))
        noise = sigma * torch.randn_like(clean)
        if self.offset:
            noise = noise + self.offset * torch.randn(number, shape[0], 1, 1)
        noisy = clean + noise
        level = (sigma**2 + self.offset**2).sqrt()
        variance = level**2 + self.sigma_data**2
        out = self.network(
            noisy / variance.sqrt(),
            level.flatten().log() / 4,
            stack,
            acts.flatten(0, 1),
        )
        target = clean - self.sigma_data**2 / variance * noisy
        target = target / (level * self.sigma_data / variance.sqrt())
        return F.mse_loss(out, target)

    def heads(
        self,
        frames: torch.Tensor,
        following: torch.Tensor,
        action: torch.Tensor,
        batch: TensorDict,
    ) -> torch.Tensor:
        """The losses of reward and termination."""
        if self.is_image:
            rows, steps = frames.shape[:2]
            both = (frames.flatten(0, 1), following.flatten(0, 1), action.flatten(0, 1))
            features = self.lstm.features(*both).unflatten(0, (rows, steps))
            size = self.lstm.cell.hidden_size
            state = features.new_zeros(rows, size), features.new_zeros(rows, size)
            hidden = []
            for t in range(steps):
                state = self.lstm.cell(features[:, t], state)
                hidden.append(state[0])
            judged = (torch.stack(hidden, 1),)
        else:
            judged = (frames, action, following)
        reward, logits = self.reward(*judged), self.done(*judged)
        label = batch["next", "terminated"].float()
        scale = self.reward.normalizer.std
        return F.mse_loss(
            reward / scale, batch["next", "reward"] / scale
        ) + F.binary_cross_entropy_with_logits(logits, label)

    def loss(self, batch: TensorDict, heads: bool) -> torch.Tensor:
        """The loss of a batch."""
        frames = self.frame(batch["observation"])
        following, action = self.frame(batch["next", "observation"]), batch["action"]
        value = self.denoising(frames, following, action)
        if heads:
            value = value + self.heads(frames, following, action, batch)
        return value

    def imagine(self, frame: torch.Tensor, actions: torch.Tensor) -> list[torch.Tensor]:
        """Draw the frames after ``frame``, ``[N, *S]``, and judge them."""
        number, horizon = actions.shape[:2]
        past = frame.new_zeros(number, self.context - 1, *frame.shape[1:])
        past_actions = actions.new_zeros(number, self.context - 1, ACTION + 1)
        state = None
        if self.is_image:
            zeros = frame.new_zeros(number, self.lstm.cell.hidden_size)
            state = zeros, zeros
        kept: list[list[torch.Tensor]] = [[], [], []]
        for t in range(horizon):
            action = actions[:, t]
            flagged = torch.cat([action, torch.ones_like(action[:, :1])], -1)
            frames = torch.cat([past, frame.unsqueeze(1)], 1)
            acts = torch.cat([past_actions, flagged.unsqueeze(1)], 1)
            following = self.frames(frames, acts)
            if state is not None:
                features = self.lstm.features(frame, following, action)
                state = self.lstm.cell(features, state)
                judged = state[:1]
            else:
                judged = (frame, action, following)
            ended = self.done(*judged) > 0
            for row, value in zip(kept, (following, self.reward(*judged), ended)):
                row.append(value)
            past, past_actions, frame = frames[:, 1:], acts[:, 1:], following
        return [torch.stack(row, 1) for row in kept]


class CountedSampler(DiffusionSampler):
    """A sampler that counts how often it ran."""

    calls = 0

    def forward(self, *args, **kwargs):
        """Draw samples."""
        self.calls += 1
        return super().forward(*args, **kwargs)


def loops_of(
    observation: tuple[int, ...], rows: int, steps: int, horizon: int
) -> tuple[dict[str, dict[str, Loop]], dict[str, int]]:
    """What is compared, by name; and bytes and calls."""
    env = Specs(observation)
    torch.manual_seed(0)
    config = DiffusionConfig(lstm_size=64)
    model, whole = make_diffusion_world_model(env, config)
    batch = batch_of(env, rows, steps)
    fit_normalizers(model, batch)
    with torch.no_grad():
        for (
            parameter
        ) in model.parameters():  # some begin at zero, and would hide differences
            parameter.add_(0.02 * torch.randn_like(parameter))
    sampler = model.dynamics.model.sampler = CountedSampler()
    hand = ByHand(model, len(observation) > 1)
    denoising = WorldModelLoss(model, losses=[whole.terms[0]])
    parameters = list(model.parameters())

    def trained(loss) -> Loop:
        @torch.enable_grad()
        def run() -> float:
            for parameter in parameters:
                parameter.grad = None
            value = loss()
            value.backward()
            return value.item()

        return run

    def ours(loss: WorldModelLoss) -> Loop:
        return trained(lambda: loss(batch).sum(reduce=True))

    losses = {
        "denoising": {
            "by hand": trained(lambda: hand.loss(batch, False)),
            "ours": ours(denoising),
        },
        "whole loss": {
            "by hand": trained(lambda: hand.loss(batch, True)),
            "ours": ours(whole),
        },
    }
    for pair in losses.values():
        found = []
        for loop in pair.values():
            torch.manual_seed(1)
            found.append(loop())
        # The same noise; the sum of the same terms.
        torch.testing.assert_close(*found, rtol=1e-3, atol=1e-3)
    calls = sampler.calls
    imagined = WorldModelEnv(model, env)
    start = model.encode(batch.select("observation")[:, 0])
    actions = 2 * torch.rand(rows, horizon, ACTION) - 1

    @torch.no_grad()
    def by_hand() -> list[torch.Tensor]:
        return hand.imagine(start["frame"], actions)

    @torch.no_grad()
    def imagine() -> TensorDict:
        return imagined.imagine(horizon, tensordict=start, actions=actions)

    torch.manual_seed(1)
    expected = by_hand()[0]
    torch.manual_seed(1)
    made = imagine()
    torch.testing.assert_close(made["next", "frame"], expected, rtol=1e-3, atol=1e-3)
    step = made[0, 0]
    recorded = sum(v.numel() * v.element_size() for v in step.values(True, True))
    frame = start["frame"][0]
    stack = (model.dynamics.context - 1) * (frame.numel() + ACTION + 1)
    facts = {
        "recorded": recorded,
        "as latents": recorded + 2 * stack * frame.element_size(),
        "calls": calls,
    }
    return {**losses, "imagination": {"by hand": by_hand, "ours": imagine}}, facts


def main() -> None:
    arguments = parser(__doc__, 20.0).parse_args()
    begin(arguments)
    sizes = {
        "images, 64 x 64 x 3, [4, 8]": ((64, 64, 3), 4, 8, 5),
        "images, 16 x 16 x 3, [16, 8]": ((16, 16, 3), 16, 8, 15),
        "vectors of 17, [32, 16]": ((17,), 32, 16, 15),
    }
    text = [
        f"Machine: {machine()}.",
        "",
        "| frames, batch | denoising, ms by hand | ours | whole loss, ms by hand | ours "
        "| imagination, ms by hand | ours | bytes a step | if latents | sampler calls in losses |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, size in sizes.items():
        loops, facts = loops_of(*size)
        cells = []
        for pair in loops.values():
            best = measure(pair, arguments.seconds)
            cells += [f"{1e3 * best['by hand']:.0f}"]
            cells += [f"{best['ours'] / best['by hand']:.2f}"]
        cells += [f"{value:,}" for value in facts.values()]
        text.append(f"| {name} | {' | '.join(cells)} |")
        print(text[-1], flush=True)
    finish(arguments, [*text, ""])


if __name__ == "__main__":
    main()
