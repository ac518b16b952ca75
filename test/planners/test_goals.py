"""Plans for goals: as latents, or as observations that are encoded once a plan."""

from __future__ import annotations

import pytest
import torch
from _points import point_env, points, SMALL, STEP
from tensordict import TensorDict

from torchrl_wm.modules.errors import MissingEntryError
from torchrl_wm.planners import CEMPlanner, GoalDistance

SOME = {"planning_horizon": 1, "optim_steps": 8, "num_candidates": 128, "top_k": 12}


def reached(planner: CEMPlanner, state: TensorDict) -> torch.Tensor:
    """Where the first step leads from the origin."""
    return STEP * planner(state)["action"]


@pytest.mark.parametrize("distance", ["squared", "euclidean"])
@pytest.mark.parametrize("steps", ["all", "last"])
def test_rows_follow_their_goals(distance, steps) -> None:
    goal = (torch.rand(2, 3, 2) * 2 - 1) * STEP
    score = GoalDistance("latent", goal="goal", distance=distance, steps=steps)
    planner = CEMPlanner(point_env(), **SOME, score=score)
    found = reached(planner, points(2, 3, goal=goal))
    torch.testing.assert_close(found, goal, atol=0.01, rtol=0)


def test_the_direction_is_what_a_cosine_compares() -> None:
    score = GoalDistance(goal="goal", distance="cosine")
    trajectory = TensorDict(
        {"goal": torch.eye(2), "next": {"latent": 5 * torch.ones(2, 2)}}, [2]
    )
    torch.testing.assert_close(
        score(trajectory.unsqueeze(1)), torch.full((2,), 0.5**0.5 - 1)
    )


@pytest.mark.parametrize("goal", ["goal_image", ("task", "image")])
@pytest.mark.parametrize("observation", ["observation", ("camera", "image")])
def test_observations_are_encoded_once_a_plan(goal, observation) -> None:
    env = point_env(observation=observation)
    seen = env.world_model.encoder.module
    near = (torch.rand(3, 2) * 2 - 1) * STEP
    state = points(3)
    state.set(goal, 2 * near)
    score = GoalDistance("latent", goal={observation: goal})
    # Another score of the same goal, which is encoded once for both.
    score = score + GoalDistance("latent", goal={observation: goal}, steps="last")
    planner = CEMPlanner(env, **SOME, score=score)
    seen.calls = 0
    found = reached(planner, state)
    torch.testing.assert_close(found, near, atol=0.01, rtol=0)
    assert seen.calls == 1 and goal in planner.in_keys
    assert not any("encoded" in key for key in state.keys(True, True))


def test_a_model_that_reads_the_goal_as_context_has_it_once() -> None:
    score = GoalDistance("latent", goal="goal")
    state = points(2, goal=torch.ones(2, 2))
    env = point_env()
    rollout = env.rollout(3, CEMPlanner(env, **SMALL, score=score), tensordict=state)
    assert torch.equal(rollout["goal"], torch.ones(2, 3, 2))


class TestErrors:
    def test_a_goal_of_another_shape(self) -> None:
        planner = CEMPlanner(point_env(), **SMALL, score=GoalDistance(goal="goal"))
        with pytest.raises(ValueError, match=r"'goal'.*\(3,\).*'latent'.*\(2,\)"):
            planner(points(2, goal=torch.zeros(2, 3)))

    @pytest.mark.parametrize(
        ("goal", "error", "message"),
        [
            ({"observation": "wide"}, ValueError, r"'wide'.*\(3,\).*\(2,\)"),
            ({"observation": "none"}, MissingEntryError, r"\['none'\].*'wide'"),
            ({"pixels": "wide"}, ValueError, r"reads \['observation'\].*'pixels'"),
        ],
    )
    def test_goal_observations(self, goal, error, message) -> None:
        planner = CEMPlanner(point_env(), **SMALL, score=GoalDistance(goal=goal))
        with pytest.raises(error, match=message):
            planner(points(2, wide=torch.zeros(2, 3)))

    def test_a_latent_that_no_encoder_writes(self) -> None:
        score = GoalDistance("belief", goal={"observation": "seen"})
        with pytest.raises(ValueError, match=r"writes \['latent'\], not 'belief'"):
            CEMPlanner(point_env(), **SMALL, score=score)(
                points(2, seen=torch.zeros(2, 2))
            )

    def test_settings(self) -> None:
        with pytest.raises(ValueError, match="distance 'l1'"):
            GoalDistance(goal="goal", distance="l1")
        with pytest.raises(ValueError, match="goal={}"):
            GoalDistance(goal={})
