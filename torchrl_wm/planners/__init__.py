"""Planners: policies that imagine candidate plans and take the first action of the best one."""

from __future__ import annotations

from torchrl_wm.planners.base import MPCPlanner
from torchrl_wm.planners.cem import CEMPlanner
from torchrl_wm.planners.icem import ICEMPlanner
from torchrl_wm.planners.mppi import MPPIPlanner

__all__ = ["CEMPlanner", "ICEMPlanner", "MPCPlanner", "MPPIPlanner"]
