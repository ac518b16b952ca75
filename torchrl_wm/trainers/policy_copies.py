"""Copies of a policy on another device, with all that it holds."""

from __future__ import annotations

import io
from typing import Any

import cloudpickle
import torch
from tensordict.nn import TensorDictModuleBase


class _Pickler(cloudpickle.Pickler):
    """A pickler that puts all tensors, and all that names their device, on another device."""

    def __init__(self, file: io.BytesIO, device: torch.device) -> None:
        super().__init__(file)
        self._device = device

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, torch.device):
            return torch.device, (str(self._device),)
        is_plain = type(obj) is torch.Tensor
        if is_plain and obj.device.type != self._device.type:
            return obj.detach().to(self._device).__reduce_ex__(2)
        return super().reducer_override(obj)


def copied_policy(
    policy: TensorDictModuleBase, device: torch.device | str
) -> TensorDictModuleBase:
    """Return a copy of a policy on a device: its networks, the env it plans in, its bounds.

    ``policy.to(device)`` would leave what is no parameter or buffer where it is, such as the
    specs of an env. Graphs are not copied: the copy of a compiled planner is eager.

    Args:
        policy: the policy.
        device: the device of the copy.

    Raises:
        ValueError: if the policy cannot be pickled.
    """
    file = io.BytesIO()
    try:
        _Pickler(file, torch.device(device)).dump(policy)
    except Exception as err:  # whatever the policy holds
        raise ValueError(
            f"The policy, a {type(policy).__name__}, cannot be sent to other processes "
            f"({type(err).__name__}: {err}). Make what it holds picklable, or use "
            f"collector='single'."
        ) from err
    return cloudpickle.loads(file.getvalue())
