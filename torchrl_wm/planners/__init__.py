"""Planners: policies that imagine candidate plans and act on the best one; scores say which that is."""

from __future__ import annotations

from torchrl_wm.planners.base import MPCPlanner
from torchrl_wm.planners.cem import CEMPlanner
from torchrl_wm.planners.gradient import GradientPlanner
from torchrl_wm.planners.icem import ICEMPlanner
from torchrl_wm.planners.mppi import MPPIPlanner
from torchrl_wm.planners.scores import Score, StepScore, TrajectoryScore
from torchrl_wm.planners.step_scores import (
    ActionCost,
    DisagreementPenalty,
    GoalDistance,
    PredictedReward,
)

__all__ = [
    "ActionCost",
    "CEMPlanner",
    "DisagreementPenalty",
    "GoalDistance",
    "GradientPlanner",
    "ICEMPlanner",
    "MPCPlanner",
    "MPPIPlanner",
    "PredictedReward",
    "Score",
    "StepScore",
    "TrajectoryScore",
]
