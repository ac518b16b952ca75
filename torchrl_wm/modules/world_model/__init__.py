"""The world model: its components, how they are wired, and how they run over time.

From the calls of users down to tensors; a file imports only from those below it:

- ``world_model.py``: :class:`WorldModel`, its components and keys, and its calls.
- ``views.py``: a model that shares its components with another one, but for some.
- ``observer.py``: :class:`Observer`, the front of a policy in the real env.
- ``filtering.py``: ``Filter``, from observations to latents, a step or sequences at a time,
  and where episodes begin.
- ``sequence_pass.py``: sequences filtered in one parallel pass, and :func:`check_sequence`.
- ``compiling.py``: ``Compiler``, which keeps graphs, and that of the filter's steps.
- ``filter_steps.py``: one step of the filter and many, on tensors.
- ``transition.py``: dynamics and posterior on tensors: predict, correct.
- ``program.py``: TensorDict modules on flat entries, without the tensordicts around them.
- ``initial_state.py``: :class:`InitialState`, the first values of latents and memory.
- ``memory.py``: what is carried and not recorded: who may write to it, and who holds it.
- ``wiring.py``: checks of keys, and which of them are latents.
- ``run_components.py``: errors that name the component in which they were raised.
- ``flat.py``: entries by flat key, with the batch size and device that they share.

What a step carries is latents, which are recorded, and memory, which is not. ``wiring.py`` tells
them from other keys, ``filter_steps.py`` carries both (``filter_step`` returns the next state and,
apart from it, the entries to record), ``filtering.py`` begins them, ``torchrl_wm/envs/layout.py``
lays them out for imagination, and ``torchrl_wm/envs/unroll.py`` hands them from step to step.
"""

from __future__ import annotations

from torchrl_wm.modules.world_model.initial_state import InitialState
from torchrl_wm.modules.world_model.memory import write_memory
from torchrl_wm.modules.world_model.observer import memory_apart, Observer
from torchrl_wm.modules.world_model.sequence_pass import check_sequence
from torchrl_wm.modules.world_model.world_model import WorldModel

__all__ = [
    "InitialState",
    "Observer",
    "WorldModel",
    "check_sequence",
    "memory_apart",
    "write_memory",
]
