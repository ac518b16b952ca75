"""A dream, one step at a time: an imagined env beside the real one, from the same start."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from torchrl.envs import EnvBase
from torchrl.envs.utils import ExplorationType, set_exploration_type

from torchrl_wm.diagnostics.drawn_observations import Render
from torchrl_wm.diagnostics.recording import check_env, CONTEXT, Episodes
from torchrl_wm.envs import WorldModelEnv
from torchrl_wm.modules.errors import MissingEntryError
from torchrl_wm.modules.keys import leaf_keys, strip_next, unique
from torchrl_wm.modules.modes import evaluation_mode
from torchrl_wm.trainers.acting import carried_keys
from torchrl_wm.trainers.dreaming.controls import Controls
from torchrl_wm.trainers.dreaming.moments import Done, facts_of, Moment
from torchrl_wm.trainers.dreaming.recorded import RecordedStarts, usual_disagreement
from torchrl_wm.trainers.dreaming.sides import ImaginedSide, RealSide
from torchrl_wm.trainers.dreaming.views import Viewer
from torchrl_wm.trainers.dreaming.with_disagreement import with_disagreement
from torchrl_wm.trainers.episode_seeds import episode_seed
from torchrl_wm.trainers.evaluation import forked_random


class DreamSession:
    """An imagined env that one steps by hand, beside the real env, from the same start.

    Both take the same actions, each until its episode ends. The global random states are left as
    they were, and a seed and the actions determine all that happens.

    Args:
        env: an imagined env of batch size ``[]``. While the session lasts, nothing else steps it.

    Keyword Args:
        real_env: the real env, of batch size ``[]``, which is reset and stepped. Without one,
            episodes begin as ``env.start_states`` says, or at recorded steps of ``data``.
        policy: acts on states of the imagined env, ``[1]``: for a model of latents on latents. It
            acts on the real side once the imagined episode has ended.
        data: recorded transitions, ``[*B, T]``, or a list of them: what the disagreement is
            compared with, and where episodes begin if nothing else says so.
        render: draws observations, see :func:`~torchrl_wm.trainers.film_policy`. By default
            images are shown as they are, and pendulum, cart-pole and MuJoCo envs are drawn.
        labels: a name for each dim of an observation, by its key.
        seed: the seed of the first episode.
        burn_in: how many real steps a recurrent model sees before it imagines, by the policy, or
            at random without one.
        exploration: the exploration type of the policy.
        title: what is dreamt of.

    Attributes:
        controls: what sets the actions.
        moments: all moments since the start.
        names: the names of the numbers that are shown, by entry.
        notes: what is not shown, and why.
        usual_disagreement: the median of the disagreement along ``data`` and its 95 % quantile,
            as ``"median"`` and ``"high"``; None if there is none.

    Raises:
        TypeError: if ``env`` is no WorldModelEnv.
        ValueError: if it is batch-locked, or nothing says where episodes begin.

    Examples:
        >>> from torchrl.envs import GymEnv
        >>> from torchrl_wm import WorldModelEnv
        >>> from torchrl_wm.models import make_ensemble_world_model
        >>> from torchrl_wm.trainers import DreamSession
        >>> real_env = GymEnv("Pendulum-v1")
        >>> world_model, _ = make_ensemble_world_model(real_env, hidden=(8,), normalize=False)
        >>> session = DreamSession(WorldModelEnv(world_model, real_env), real_env=real_env)
        >>> moment = session.step([0.5])
        >>> moment.step, moment.action, sorted(moment.real.values)
        (1, [0.5], ['observation'])
        >>> session.back().step
        0
    """

    def __init__(
        self,
        env: WorldModelEnv,
        *,
        real_env: EnvBase | None = None,
        policy: Callable[[TensorDictBase], TensorDictBase] | None = None,
        data: Episodes | None = None,
        render: Render | None = None,
        labels: Mapping[NestedKey, Sequence[str]] | None = None,
        seed: int = 0,
        burn_in: int = CONTEXT - 1,
        exploration: ExplorationType = ExplorationType.DETERMINISTIC,
        title: str = "A dream",
    ) -> None:
        check_env(env, "DreamSession")
        self.title, self.policy, self.seed = title, policy, _checked(seed)
        self._exploration = exploration
        self._burn_in = burn_in if env.world_model.is_recurrent else 0
        env = with_disagreement(env)
        self._imagined = ImaginedSide(env)
        self._real = None if real_env is None else RealSide(real_env, env)
        self._starts: RecordedStarts | None = None
        if real_env is None and env.start_states is None:
            self._starts = RecordedStarts(env, data)
        self.controls = Controls(env)
        self._viewer = Viewer(env, real_env, render=render, labels=labels)
        self.names, self.notes = self._viewer.names, self._viewer.notes
        with forked_random(seed):
            self.usual_disagreement = usual_disagreement(env, data)
        self.moments: list[Moment] = []
        self._done: list[Done] = []
        # What the policy carries from step to step, and the real steps before the start.
        self._carried: dict[NestedKey, torch.Tensor] = {}
        self._burnt: list[TensorDictBase] | None = None
        self._is_torn = False
        self.reset()

    # What one does --------------------------------------------------------

    @property
    def has_real(self) -> bool:
        """Whether there is a real env."""
        return self._real is not None

    @property
    def is_over(self) -> bool:
        """Whether the episodes of both sides have ended."""
        return self._imagined.ended and (self._real is None or self._real.ended)

    @torch.no_grad()
    def reset(self, seed: int | None = None) -> Moment:
        """Begin an episode.

        Args:
            seed: the seed of the episode; by default that of the one before, which begins anew.
        """
        before = self.seed, self._carried, self._burnt
        self.seed = before[0] if seed is None else _checked(seed)
        try:
            with self._as_a_whole():
                self._begin()
                begun = self._moment("start", None)
        except BaseException:
            # The episode before goes on.
            self.seed, self._carried, self._burnt = before
            raise
        self._begun_with = self._carried
        self._done, self.moments = [], [begun]
        return begun

    @torch.no_grad()
    def step(self, action: str | Sequence[float] = "policy") -> Moment:
        """Let both sides take an action.

        Args:
            action: "policy", "random", or numbers, one for each of the :attr:`controls`.

        Raises:
            ValueError: if the action is not valid, or there is no policy.
            RuntimeError: if both episodes have ended.
        """
        if self.is_over:
            raise RuntimeError(
                f"The episode is over after {self.moments[-1].step} steps: begin another one "
                f"(reset), or take steps back (back)."
            )
        self._mend()
        number = len(self._done)
        actor = action if isinstance(action, str) else "you"
        with forked_random(episode_seed(self.seed, 2 * number)):
            actions = self._chosen(action)
        with self._as_a_whole():
            self._advance(actions, number)
            moment = self._moment(actor, actions)
        self._done.append(Done(actions, self._carried))
        self.moments.append(moment)
        return moment

    @torch.no_grad()
    def look(self) -> Moment:
        """Let the model look at the real env again: imagination goes on from the real state.

        Raises:
            ValueError: if there is no real env.
            RuntimeError: if its episode has ended.
        """
        if self._real is None:
            raise ValueError("There is no real env to look at.")
        if self._real.ended:
            raise RuntimeError(
                "The real episode has ended: there is nothing to go on from. Begin another one "
                "(reset), or take steps back (back)."
            )
        self._mend()
        with self._as_a_whole():
            self._advance(None, len(self._done))
            moment = self._moment("look", None)
        self._done.append(Done(None, self._carried))
        self.moments.append(moment)
        return moment

    @torch.no_grad()
    def back(self) -> Moment:
        """Take back the last step or look.

        Both sides begin anew and repeat the actions before, so that the real env must repeat
        itself: its seed and the actions must determine it.

        Raises:
            RuntimeError: at the start.
        """
        if not self._done:
            raise RuntimeError("This is the start: there is no step to take back.")
        self._done.pop()
        self.moments.pop()
        self._repeat()
        return self.moments[-1]

    # How it goes on -------------------------------------------------------

    def _begin(self, again: bool = False) -> None:
        """Begin the episode of the seed on both sides; ``again`` repeats the real steps before it."""
        if not again:
            self._carried, self._burnt = {}, None
        with forked_random(self.seed):
            if self._real is not None:
                self._burn()
                start = self._real.start()
            elif self._starts is not None:
                start = self._starts.draw()
            else:
                device = self._imagined.env.device
                start = TensorDict({}, batch_size=[1], device=device)
            self._imagined.begin(start)

    def _burn(self) -> None:
        """Let the real env take the steps that the model sees, fewer if its episode ends before."""
        real = self._real
        real.begin(self.seed)
        if self._burnt is None:
            taken = []
            while len(taken) < self._burn_in and not real.ended:
                # Apart from what the model draws, which is drawn again by `back`.
                with forked_random(episode_seed(self.seed, len(taken))):
                    actions = self.controls.random()
                    if self.policy is not None:
                        actions = self._acted(real.acted_on(), not taken)
                real.step(actions)
                taken.append(actions)
            ended = real.ended
            self._burnt = taken[:-1] if ended else taken
            if not ended:
                real.reward = None
                return
            self._carried = {}
            real.begin(self.seed)
        for actions in self._burnt:
            real.step(actions)
        real.reward = None

    def _chosen(self, action: str | Sequence[float]) -> TensorDictBase:
        """Return the actions, ``[1]``."""
        if not isinstance(action, str):
            return self.controls.actions(action)
        if action == "random":
            return self.controls.random()
        if action != "policy":
            raise ValueError(
                f'An action is "policy", "random" or a list of numbers, got {action!r}.'
            )
        if self.policy is None:
            raise ValueError(
                "There is no policy that could act: act yourself, or at random."
            )
        acts_on = self._real if self._imagined.ended else self._imagined
        return self._acted(acts_on.acted_on(), not self._done and not self._carried)

    def _acted(self, state: TensorDictBase, is_first: bool) -> TensorDictBase:
        """Return the policy's actions, ``[1]``, and keep what it carries to the next step."""
        policy, env = self.policy, self._imagined.env
        for key, value in self._carried.items():
            state.set(key, value)
        state.set("is_init", torch.full((1, 1), is_first, device=env.device))
        there = leaf_keys(state)
        try:
            with set_exploration_type(self._exploration), evaluation_mode(policy):
                acted = policy(state)
        except KeyError as err:
            raise MissingEntryError(
                f"The policy reads an entry that the imagined env does not have ({err}): there "
                f"are {there}. Give one that acts on these; or let the env show observations, "
                f"WorldModelEnv(..., decode=True)."
            ) from err
        keys = carried_keys(policy) if hasattr(policy, "in_keys") else []
        # What the env shows at each step is not carried, though a policy may write it anew.
        shown = set(unique(env.observation_spec.keys(True, True)))
        keys = [key for key in keys if strip_next(key) not in shown]
        found = {
            strip_next(k): acted.get(k, acted.get(strip_next(k), None)) for k in keys
        }
        self._carried = {k: v.clone() for k, v in found.items() if v is not None}
        return acted.select(*env.action_keys)

    @contextmanager
    def _as_a_whole(self) -> Iterator[None]:
        """Note that the sides are not at the newest moment, if what is done inside fails."""
        # A step may have moved one side and not the other, or be without its picture.
        self._is_torn = True
        yield
        self._is_torn = False

    def _advance(self, actions: TensorDictBase | None, number: int) -> None:
        """Let both sides take the step of a number, or let the model look at the real side."""
        with forked_random(episode_seed(self.seed, 2 * number + 1)):
            if actions is not None:
                self._take(actions)
            else:
                self._real.reward = None
                self._imagined.begin(self._real.start())

    def _mend(self) -> None:
        """Bring both sides back to the newest moment, after a step that failed."""
        if self._is_torn:
            self._repeat()

    def _take(self, actions: TensorDictBase) -> None:
        self._imagined.reward = self._imagined.disagreement = None
        if not self._imagined.ended:
            self._imagined.step(actions)
        if self._real is not None:
            self._real.reward = None
            if not self._real.ended:
                self._real.step(actions)

    def _repeat(self) -> None:
        """Begin anew, and do again all that was done."""
        with self._as_a_whole():
            self._begin(again=True)
            for number, done in enumerate(self._done):
                self._advance(done.actions, number)
        self._carried = self._done[-1].carried if self._done else self._begun_with

    def _moment(self, actor: str, actions: TensorDictBase | None) -> Moment:
        """Return what both sides show now."""
        last = None if actor == "start" else self.moments[-1]
        imagined, real, beside = self._imagined, self._real, None
        facts = facts_of(imagined, None if last is None else last.imagined)
        shown = self._viewer.imagined(imagined.state, **facts)
        if real is not None:
            facts = facts_of(real, None if last is None else last.real)
            beside = self._viewer.real(real.root.unsqueeze(0), real.latents, **facts)
        return Moment(
            step=0 if last is None else last.step + (actions is not None),
            actor=actor,
            action=None if actions is None else self.controls.numbers(actions),
            imagined=shown,
            real=beside,
            disagreement=imagined.disagreement,
        )


def _checked(seed: int) -> int:
    """Return a seed, if it is one of all random numbers, NumPy's among them."""
    is_int = isinstance(seed, int) and not isinstance(seed, bool)
    if not is_int or not 0 <= seed < 2**32:
        shown = f"an int of {seed.bit_length()} bits" if is_int else repr(seed)
        raise ValueError(f"seed must be an int from 0 to 2**32 - 1, got {shown}.")
    return seed
