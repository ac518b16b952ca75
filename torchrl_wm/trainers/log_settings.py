"""The settings of runs that learn from a log."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Union

from tensordict import TensorDictBase
from torchrl.envs import EnvBase

from torchrl_wm.trainers.logged_files import is_pattern
from torchrl_wm.trainers.logged_names import renames_of
from torchrl_wm.trainers.real_envs import EnvSource, make_real_env
from torchrl_wm.trainers.recorded_env import read_recorded
from torchrl_wm.trainers.settings import Settings, slug

#: One bound for all dims of the actions, or one for each.
Bound = Union[float, tuple[float, ...]]


@dataclass(frozen=True, kw_only=True)
class LogSettings(Settings):
    """The settings of every run that learns from a log.

    Args:
        data: an .npz, .hdf5 or .csv file, or a pattern of them such as 'logs/*.csv'; the folder
            of a replay buffer, tensordict or Minari dataset; or minari:ID of a local one.
        env: the env that was recorded, named as for train pets; None to read its specs off the
            data.
        names: what arrays or columns of other names are, such as
            state=observations,throttle=actions; several make one vector. None for common names.
        dones: what ends are if the data does not tell it: terminal or timeout. None to infer it
            from the lengths of the episodes.
        action_bounds: between which numbers actions lie, such as -1,1; or one such pair for each
            dim. None to read them off the data.
    """

    data: str
    env: str | None = None
    names: str | None = None
    dones: Literal["terminal", "timeout"] | None = None
    action_bounds: tuple[Bound, Bound] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.names, Mapping):
            text = ",".join(f"{o}={name}" for o, name in renames_of(self.names).items())
            object.__setattr__(self, "names", text)
        super().__post_init__()
        renames_of(self.names)  # refuses names that are written otherwise
        is_file = os.path.exists(self.data) or is_pattern(self.data)
        if is_file and not self.data.startswith("minari:"):
            # The run may be opened from another working directory.
            object.__setattr__(self, "data", os.path.abspath(self.data))

    @property
    def about(self) -> str:
        return self.data

    @property
    def short_name(self) -> str:
        # Without its folder and ending.
        return slug(Path(self.data.removeprefix("minari:")).stem)

    def make_env(self, source: EnvSource | None) -> EnvBase | None:
        """Return the env that was recorded, if it is given or named here."""
        source = self.env if source is None else source
        return None if source is None else make_real_env(source)

    def read(self, env: EnvBase | None) -> tuple[TensorDictBase, EnvBase]:
        """Read the log.

        Args:
            env: the env that was recorded; None to read its specs off the data.

        Returns:
            The transitions ``[N]``, and the env, or a :class:`RecordedEnv` in place of None.
        """
        return read_recorded(
            self.data,
            env=env,
            action_bounds=self.action_bounds,
            names=self.names,
            dones=self.dones,
            stacklevel=2,
        )
