"""The imagined and the real env, each one step at a time."""

from __future__ import annotations

from collections.abc import Sequence

from tensordict import NestedKey, TensorDict, TensorDictBase
from torchrl.envs import EnvBase
from torchrl.envs.utils import step_mdp

from torchrl_wm import _upstream
from torchrl_wm.envs import WorldModelEnv
from torchrl_wm.modules.errors import MissingEntryError
from torchrl_wm.modules.keys import as_tuple, missing_from, unique
from torchrl_wm.modules.modes import evaluation_mode
from torchrl_wm.trainers.dreaming.with_disagreement import disagreement_keys
from torchrl_wm.trainers.episode_seeds import EpisodeSeeds
from torchrl_wm.trainers.gym_actions import layers
from torchrl_wm.trainers.trainer import EVALUATION_EPISODES


class Side:
    """An env in the midst of an episode.

    Attributes:
        reward: the reward of the last step; None at the start, or if there is none.
        terminated, truncated: whether the episode is over, and why.
    """

    env: EnvBase
    reward: float | None = None
    terminated = truncated = False

    @property
    def ended(self) -> bool:
        """Whether the episode is over."""
        return self.terminated or self.truncated

    def _begin(self) -> None:
        self.reward, self.terminated, self.truncated = None, False, False

    def _note(self, following: TensorDictBase) -> None:
        """Note reward and ends of what follows a step."""
        rewards = [following.get(key, None) for key in self.env.reward_keys]
        rewards = [float(value.sum()) for value in rewards if value is not None]
        self.reward = sum(rewards) if rewards else None
        ends = {"terminated": False, "done": False}
        for key in self.env.done_keys:
            value = following.get(key, None)
            name = "terminated" if as_tuple(key)[-1] == "terminated" else "done"
            # All agents of several.
            ends[name] |= value is not None and bool(value.all())
        self.terminated = ends["terminated"]
        self.truncated = ends["done"] and not self.terminated


class ImaginedSide(Side):
    """The imagined env.

    Args:
        env: an imagined env of batch size ``[]``.

    Attributes:
        state: the present state, ``[1]``.
        disagreement: that of the last step; None if the env has none.
    """

    def __init__(self, env: WorldModelEnv) -> None:
        self.env, self.state = env, TensorDict({}, batch_size=[1])
        self.disagreement: float | None = None
        self._spread = disagreement_keys(env)

    def begin(self, start: TensorDictBase) -> None:
        """Begin at latents or observations, ``[1]``."""
        self._begin()
        with evaluation_mode(self.env.world_model):
            self.state = self.env.reset(start)
        self.disagreement = None

    def step(self, actions: TensorDictBase) -> None:
        """Imagine a step."""
        with evaluation_mode(self.env.world_model):
            step = self.env.step(self.state.copy().update(actions))
        following = step.get("next")
        self._note(following)
        spreads = [float(following.get(key).max()) for key in self._spread]
        self.disagreement = max(spreads) if spreads else None
        self.state = step_mdp(step, keep_other=True)

    def acted_on(self) -> TensorDictBase:
        """Return what a policy acts on, ``[1]``: the state, with the model's memory."""
        return self.state.copy().update(self.env.memory)


class RealSide(Side):
    """The real env, and what the world model makes of all it has shown.

    Args:
        env: a real env of batch size ``[]``.
        imagined: the imagined env, whose model looks at it.

    Attributes:
        root: what the env shows, ``[]``.
        latents: the model's latents of it and of all before it, with its memory, ``[1]``.
    """

    def __init__(self, env: EnvBase, imagined: WorldModelEnv) -> None:
        self.env, self.model = env, imagined.world_model
        self._device = imagined.device
        latents = set(imagined.latent_keys)
        self._inputs = unique(self.model.encoder.in_keys)
        context = [key for key in imagined.start_keys if key not in latents]
        self._seen = unique([*self._inputs, *context])
        if env.batch_size:
            raise ValueError(
                f"A dream has one real env at its side, of batch size [], and this one has "
                f"{tuple(env.batch_size)}."
            )
        lacking = [k for k in imagined.action_keys if k not in set(env.action_keys)]
        if lacking:
            raise MissingEntryError(
                f"The imagined env has the actions {imagined.action_keys}, and the real env "
                f"{env.action_keys}: give the env that the model was made for."
            )
        self._actions: Sequence[NestedKey] = imagined.action_keys
        self.root = self.latents = TensorDict({}, batch_size=[])

    def begin(self, seed: int) -> None:
        """Begin the episode that the seed determines."""
        self._begin()
        _seed(self.env, seed)
        self.root = self.env.reset()
        lacking = missing_from(self.root, self._inputs)
        if lacking:
            raise MissingEntryError(
                f"The model reads {lacking}, and the real env shows "
                f"{list(self.root.keys(True, True))}: give the env that the model was made for."
            )
        self.latents = self._look(self.seen())

    def step(self, actions: TensorDictBase) -> None:
        """Take a step, by actions of batch size ``[1]``, and look at what follows."""
        root = self.root.copy()
        for key in self._actions:
            root.set(key, actions.get(key)[0].to(self.env.device or "cpu"))
        step = self.env.step(root)
        self._note(step.get("next"))
        self.root = _upstream.following_root(self.env, step)
        self.latents = self._look(self.latents.update(actions).update(self.seen()))

    def seen(self) -> TensorDictBase:
        """Return what the model reads of the env, ``[1]``."""
        seen = self.root.select(*self._seen, strict=False).unsqueeze(0)
        return seen if self._device is None else seen.to(self._device)

    def start(self) -> TensorDictBase:
        """Return a start for the imagined env, ``[1]``, with memory of its own."""
        return self.seen().update(self.latents).clone()

    def acted_on(self) -> TensorDictBase:
        """Return what a policy acts on, ``[1]``."""
        return self.start()

    def _look(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Return latents and memory after the newest observation."""
        with evaluation_mode(self.model):
            found = self.model.filter.observe_step(tensordict)
        keys = [*self.model.latent_keys, *self.model.memory_keys]
        return found.select(*keys, strict=False)


def _seed(env: EnvBase, seed: int) -> None:
    """Seed how the next episode begins, as evaluations do."""
    transforms = [each for layer in layers(env) for each in layer]
    for each in transforms:
        if isinstance(each, EpisodeSeeds):
            each.seed, each.episode = seed, EVALUATION_EPISODES
            return
    env.set_seed(seed)
