"""Fit a world model to recorded transitions."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from tensordict import NestedKey, TensorDictBase
from torch import nn
from torchrl.data import ReplayBuffer

from torchrl_wm.modules import EnsembleDynamics, fit_normalizers, WorldModel
from torchrl_wm.modules.blocks.normalizer import valid_rows
from torchrl_wm.modules.world_model.compiling import Compiler
from torchrl_wm.objectives import GaussianNLLTerm, WorldModelLoss

#: How many batches are drawn from a buffer at once: drawing them one by one is slower than a step.
_DRAWN_AT_ONCE = 64
#: How many transitions are counted at once: hashing takes several times their memory.
_COUNTED_AT_ONCE = 16384
#: How many gradient steps pass between two checks of losses on devices other than the CPU.
_CHECK_INTERVAL = 50


class NonFiniteLossError(FloatingPointError):
    """A loss became NaN or infinite.

    Attributes:
        batch: the batch that it was computed from.
    """

    def __init__(self, message: str, batch: TensorDictBase) -> None:
        super().__init__(message)
        self.batch = batch


class ModelLearner:
    """A learner that trains a world model by its loss, repeatedly while transitions come in.

    The optimiser goes on from round to round. Each round fits the normalisers again. If an
    ensemble has fewer elites than members, the elites are chosen by the error on transitions
    held out of the round (MBPO, arXiv 1906.08253).

    Args:
        world_model: the model.
        loss: its loss.

    Keyword Args:
        learning_rate, weight_decay: settings of AdamW.
        batch_size: the transitions in a batch.
        held_out: the share of transitions to choose elites by. Not used by models that
            have no elites to choose.

    Examples:
        >>> from torchrl.envs import GymEnv
        >>> from torchrl_wm.models import make_ensemble_world_model
        >>> from torchrl_wm.trainers import ModelLearner
        >>> env = GymEnv("Pendulum-v1")
        >>> world_model, loss = make_ensemble_world_model(env, members=3, hidden=(32,))
        >>> learner = ModelLearner(world_model, loss, batch_size=32)
        >>> sorted(learner.fit(env.rollout(100), steps=20))
        ['loss_done', 'loss_nll']
    """

    def __init__(
        self,
        world_model: WorldModel,
        loss: WorldModelLoss,
        *,
        learning_rate: float = 1e-3,
        weight_decay: float = 1e-5,
        batch_size: int = 256,
        held_out: float = 0.1,
    ) -> None:
        if batch_size < 1 or not 0 <= held_out < 1:
            raise ValueError(
                f"batch_size must be at least 1 and held_out a share below 1, got {batch_size} "
                f"and {held_out}."
            )
        self.world_model, self.loss = world_model, loss
        self.batch_size, self.held_out = batch_size, held_out
        parameters = list(loss.parameters())
        self.optimizer = torch.optim.AdamW(
            parameters,
            lr=learning_rate,
            weight_decay=weight_decay,
            fused=all(parameter.is_floating_point() for parameter in parameters),
        )
        #: The gradient steps so far.
        self.steps = 0

    def fit(
        self,
        data: TensorDictBase | ReplayBuffer,
        steps: int,
        on_step: Callable[[int, int], Any] | None = None,
    ) -> dict[str, torch.Tensor]:
        """Make gradient steps on transitions.

        Args:
            data: transitions ``[N]``, or a replay buffer of them.
            steps: how many gradient steps to make.
            on_step: called with the number of each step and of all steps, for progress bars.

        Returns:
            The mean of each loss over the last tenth of the steps, on the model's device.

        Raises:
            NonFiniteLossError: if a loss is NaN or infinite. The parameters are those before that
                step.
        """
        rows = data[:] if isinstance(data, ReplayBuffer) else data
        # Moved to the model's device once; batches are drawn there.
        rows = valid_rows(rows).reshape(-1).to(self.device)
        train, held_out = self._divided(rows)
        fit_normalizers(self.world_model, train)
        train = self._counted(train, steps)
        tail, sums = max(1, steps // 10), {}
        for step, batch in enumerate(self._batches(train, steps)):
            losses = self.loss(batch).select(*self.loss.out_keys)
            total = losses.sum(reduce=True)
            check_losses(losses, total, batch, "The world model", self.steps)
            self.optimizer.zero_grad()
            total.backward()
            self.optimizer.step()
            self.steps += 1
            if step >= steps - tail:
                for name, value in losses.items():
                    sums[name] = sums.get(name, 0.0) + value.detach().double() / tail
            if on_step is not None:
                on_step(step, steps)
        if held_out is not None:
            self.world_model.dynamics.choose_elites(held_out)
        return sums

    @property
    def device(self) -> torch.device:
        """The device of the model."""
        return next(self.loss.parameters()).device

    def state_dict(self) -> dict[str, Any]:
        """Return the states of the model and the optimiser, and the count of steps."""
        return {
            "world_model": self.world_model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "steps": self.steps,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        self.world_model.load_state_dict(state_dict["world_model"])
        self.optimizer.load_state_dict(state_dict["optimizer"])
        self.steps = state_dict["steps"]

    def _divided(
        self, rows: TensorDictBase
    ) -> tuple[TensorDictBase, TensorDictBase | None]:
        """Return the rows to train on, and those that elites are chosen by."""
        dynamics = self.world_model.dynamics
        number = int(self.held_out * len(rows))
        if (
            not isinstance(dynamics, EnsembleDynamics)
            or len(dynamics.elites) == dynamics.ensemble.members
            or not number
        ):
            return rows, None
        order = torch.randperm(len(rows), device=self.device)
        return rows[order[number:]], rows[order[:number]]

    def _counted(self, rows: TensorDictBase, steps: int) -> TensorDictBase:
        """Return the rows with their bootstrap counts, so that batches need not compute them."""
        if len(rows) > steps * self.batch_size:
            return rows  # most rows are in no batch
        dynamics = self.world_model.dynamics
        terms = [t for t in self.loss.terms if isinstance(t, GaussianNLLTerm)]
        if not isinstance(dynamics, EnsembleDynamics) or len(terms) != 1:
            return rows
        of_dynamics = terms[0].bootstrap and terms[0].component == "dynamics"
        if not of_dynamics or "member_weight" in rows.keys():
            return rows
        members = dynamics.ensemble.members
        counts = [
            terms[0].member_counts(part, self.loss, members).float()
            for part in rows.split(_COUNTED_AT_ONCE)
        ]
        return rows.copy().set("member_weight", torch.cat(counts))

    def _batches(self, rows: TensorDictBase, number: int) -> Iterator[TensorDictBase]:
        while number > 0:
            drawn = min(number, _DRAWN_AT_ONCE)
            index = torch.randint(
                len(rows), (drawn, self.batch_size), device=self.device
            )
            yield from rows[index].unbind(0)
            number -= drawn


def compiled_loss(loss: nn.Module) -> Callable[[TensorDictBase], TensorDictBase]:
    """Return a loss as a function whose forward and backward passes are one graph each.

    The loss itself stays as it is, with the keys of its state dict. The first call for each shape
    of a batch makes the graphs. Without a compiler, it warns, and the function stays eager.

    Args:
        loss: the loss, such as a :class:`~torchrl_wm.WorldModelLoss`.

    Raises:
        RuntimeError: that of torch, at the first call, if the loss cannot be traced: a term of the
            user's own may need the values of tensors on the host.
    """
    compiler = Compiler({}, "An update", "compile=False")
    return compiler.wrap(lambda batch: loss(batch), [loss], (), ())


def descend(
    terms: TensorDictBase,
    optimizer: torch.optim.Optimizer,
    batch: TensorDictBase,
    who: str,
    step: int,
    clip: float | None = None,
) -> None:
    """Make a gradient step on the sum of some terms.

    Args:
        terms: the terms of a loss, scalars.
        optimizer: the optimizer of what they train.
        batch: the batch, for the error.
        who: the name of what learns, for the error.
        step: how many such steps have been made.
        clip: the greatest norm of the gradient; None for no limit.

    Raises:
        NonFiniteLossError: if the sum is not finite.
    """
    total = terms.sum(reduce=True)
    check_losses(terms, total, batch, who, step)
    optimizer.zero_grad()
    total.backward()
    if clip is not None:
        trained = [p for group in optimizer.param_groups for p in group["params"]]
        nn.utils.clip_grad_norm_(trained, clip)
    optimizer.step()


def check_losses(
    losses: TensorDictBase,
    total: torch.Tensor,
    batch: TensorDictBase,
    who: str,
    step: int,
) -> None:
    """Refuse losses that are NaN or infinite.

    Raises:
        NonFiniteLossError: if one is.
    """
    # A check waits for the device; a loss that stays NaN is found some steps later there.
    if total.device.type != "cpu" and step % _CHECK_INTERVAL:
        return
    if total.isfinite():
        return
    values = {name: value.item() for name, value in losses.items()}
    raise NonFiniteLossError(
        f"{who}'s loss is not finite at gradient step {step}: {values}. Look at the batch for "
        f"NaN or very large values (rewards, observations without bounds); then lower the "
        f"learning rate, or clip or rescale what is extreme.",
        batch,
    )


def check_transitions(
    rows: TensorDictBase, step: int, computed: Collection[NestedKey] = ()
) -> None:
    """Refuse transitions that are not finite, before the recipe learns from them.

    Args:
        rows: the transitions, ``[N]``.
        step: how many real steps have been made.
        computed: the entries that model and policy compute, and not the real env.

    Raises:
        NonFiniteLossError: if some are not.
    """
    bad = [
        key
        for key, value in rows.items(True, True)
        if value.is_floating_point() and not value.isfinite().all()
    ]
    if not bad:
        return
    own = [key for key in bad if key in computed]
    if own:
        raise NonFiniteLossError(
            f"World model and policy made {own} of the observations, with NaN or infinite values, "
            f"up to real step {step}, after their last gradient step. Lower the learning rate.",
            rows,
        )
    raise NonFiniteLossError(
        f"The real env gave {bad} with NaN or infinite values, up to real step {step}. Look "
        f"at what it computes there; nothing was learnt from this step.",
        rows,
    )
