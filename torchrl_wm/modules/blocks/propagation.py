"""One ensemble, propagated in several ways by several world models."""

from __future__ import annotations

from dataclasses import replace

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase, TensorDictSequential

from torchrl_wm.modules.blocks.ensemble_dynamics import (
    DOUBTS,
    EnsembleDynamics,
    Propagation,
)
from torchrl_wm.modules.blocks.penalty import penalty_of
from torchrl_wm.modules.world_model.views import view_of
from torchrl_wm.modules.world_model.world_model import WorldModel


class SampleMember(TensorDictModuleBase):
    """The part of an encoder that draws the member which each row follows, from the elites.

    Goes behind the encoder of a world model that propagates by TSinf. A member that a row
    already has stays.

    Args:
        dynamics: the ensemble.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from torchrl.data import Unbounded
        >>> from torchrl_wm.modules import EnsembleDynamics, Entry, GaussianEnsemble, SampleMember
        >>> entries = [Entry.from_spec("observation", Unbounded((3,)))]
        >>> dynamics = EnsembleDynamics(
        ...     GaussianEnsemble(5, 3, 3, hidden=()), entries, [], propagation="tsinf"
        ... )
        >>> SampleMember(dynamics)(TensorDict({"observation": torch.zeros(7, 3)}, [7]))["member"].shape
        torch.Size([7])
    """

    def __init__(self, dynamics: EnsembleDynamics) -> None:
        super().__init__()
        self.in_keys = dynamics.in_keys[:1]
        self.out_keys = [dynamics.member_key]
        # In a list, as nn.Module would register it, and a model hold its tensors twice.
        self._dynamics = [dynamics]

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Write ``member``, ``[*B]`` int64, unless it is there."""
        (key,) = self.out_keys
        if tensordict.get(key, None) is None:
            elites, size = self._dynamics[0].elites, tensordict.batch_size
            drawn = torch.randint(len(elites), size, device=elites.device)
            tensordict.set(key, elites[drawn])
        return tensordict


def with_propagation(
    world_model: WorldModel, propagation: Propagation, *, all_members: bool = True
) -> WorldModel:
    """Return the same world model with its ensemble propagated otherwise.

    Networks, normalisers and elites are shared, so that training either trains
    both. Several envs can imagine with one model in several ways at a time.

    Args:
        world_model: a model whose dynamics are :class:`EnsembleDynamics`.
        propagation: ``"ts1"``, ``"tsinf"``, ``"expectation"`` or ``"mean"``.

    Keyword Args:
        all_members: whether the new one writes what all members say, as
            ``"disagreement"``; see :class:`EnsembleDynamics`. Without, planning and
            imagining by ``"ts1"`` cost ``E`` times less. Files do not hold this: a loaded
            model writes them.

    Returns:
        The new world model, in the same mode (training or not). With ``"tsinf"`` its
        encoder also writes ``member``, so that the env that imagines with it carries
        that as constant context.

    Raises:
        TypeError: if the dynamics are no ensemble.
        ValueError: for ``all_members=False`` with :func:`with_penalty` on what all members say.

    Examples:
        >>> from torchrl.envs import GymEnv
        >>> from torchrl_wm import WorldModelEnv
        >>> from torchrl_wm.models import make_ensemble_world_model
        >>> from torchrl_wm.modules import with_propagation
        >>> real_env = GymEnv("Pendulum-v1")
        >>> world_model, loss = make_ensemble_world_model(real_env, members=3, hidden=(32,))
        >>> env = WorldModelEnv(with_propagation(world_model, "tsinf"), real_env)
        >>> env.imagine(4, tensordict=real_env.reset().expand(10))["member"].shape
        torch.Size([10, 4])
    """
    dynamics = world_model.dynamics
    if not isinstance(dynamics, EnsembleDynamics):
        raise TypeError(
            f"with_propagation needs dynamics that are EnsembleDynamics, got "
            f"{type(dynamics).__name__}. make_ensemble_world_model(env) wires such a model."
        )
    _check_penalty(world_model, propagation, all_members)
    dynamics = dynamics.with_propagation(propagation, all_members=all_members)
    encoder = world_model.encoder
    if isinstance(encoder, TensorDictSequential) and isinstance(
        encoder[-1], SampleMember
    ):
        encoder = encoder[0] if len(encoder.module) == 2 else encoder[:-1]
    if propagation == "tsinf":
        sampler = SampleMember(dynamics)
        encoder = TensorDictSequential(encoder, sampler)
        for module in (encoder, encoder.module, sampler):
            module.training = world_model.training
    changes, recipe = {}, getattr(world_model, "recipe", None)
    if recipe is not None:
        changes["config"] = replace(recipe.config, propagation=propagation)
    return view_of(world_model, {"encoder": encoder, "dynamics": dynamics}, changes)


def _check_penalty(
    world_model: WorldModel, propagation: Propagation, all_members: bool
) -> None:
    """Refuse to silence the members whose disagreement the rewards pay for."""
    penalty = penalty_of(world_model)
    if all_members or penalty is None:
        return
    if penalty.measure in DOUBTS:
        raise ValueError(
            f"The rewards of this model pay for {penalty.measure}, which the ensemble writes only "
            f"where all members are asked. Leave out all_members=False, or the penalty: "
            f"with_propagation(without_penalty(world_model), {propagation!r}, all_members=False)."
        )
