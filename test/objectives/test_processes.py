"""Several processes train one loss: gradients are those of the joined batch.

Two processes run all cases of ``test/_processes.py`` once; the tests look at what they found.
"""

from __future__ import annotations

import pytest
import torch.distributed as dist
from _processes import outcomes

if not dist.is_available():
    pytest.skip("torch has no torch.distributed here", allow_module_level=True)

#: Relative to the gradient of one process.
EXACT = 1e-5


@pytest.fixture(scope="module")
def found() -> list[dict]:
    """What each process found, by rank."""
    return outcomes()


def each(found: list[dict], name: str) -> list:
    return [rank[name] for rank in found]


#: Processes with as many samples, of the same weight, need not know of each other.
EVEN = ["mlp", "ensemble", "frozen_parts"]
UNEVEN = [
    "rows_of_different_number",
    "masks_and_nested_keys",
    "a_mask_in_one_process",
    "nothing_valid_in_one_process",
    "open_loop",
    "sigreg",
    "sigreg_open_loop",
    "vicreg",
    "priority_weights",
    "two_weights",
    "ensemble_weighted_by_variance",
    "recurrent_gaussian",
    "recurrent_categorical_and_nested_keys",
    "a_wrapped_network",
    "compiled",
    "shards_mlp",
    "shards_ensemble",
    "shards_planet",
    "shards_dreamer-v3",
    "shards_tdmpc2",
    "shards_of_networks",
]


@pytest.mark.parametrize("name", [*EVEN, *UNEVEN])
def test_gradients_and_losses_are_those_of_the_joined_batch(found, name) -> None:
    for errors in each(found, name):
        assert errors["gradient"] < EXACT
        assert errors["loss"] < EXACT


@pytest.mark.parametrize("name", UNEVEN)
def test_a_mean_over_the_own_samples_would_be_another_gradient(found, name) -> None:
    for errors in each(found, name):
        assert errors["alone"] > 1e-2


@pytest.mark.parametrize("name", ["tdmpc2_updates", "tdmpc2_updates_with_nested_keys"])
def test_updates_of_model_values_policy_and_targets(found, name) -> None:
    for errors in each(found, name):
        assert set(errors) == {"parameters", "policy", "targets", "scale"}
        assert max(errors.values()) < EXACT


def test_processes_project_onto_the_same_directions(found) -> None:
    one, other = each(found, "directions_are_shared")
    assert one == other > 0


def test_without_a_valid_sample_nothing_is_trained(found) -> None:
    assert each(found, "nothing_valid_at_all") == [(0.0, 0.0)] * 2


def test_one_process_may_evaluate_alone(found) -> None:
    values, none = each(found, "one_process_evaluates")
    assert values[0] == values[1] and none == []


def test_sharded_losses_return_tensordicts(found) -> None:
    assert each(found, "shards_return_what_the_loss_returns") == [[True, True]] * 2


def test_sharded_losses_learn(found) -> None:
    for before, after in each(found, "shards_learn"):
        assert after < 0.8 * before


def test_shards_that_would_not_be_trained_are_an_error(found) -> None:
    for messages in each(found, "shards_that_would_not_learn"):
        places = {
            "component": "world_model.dynamics is",
            "components": "world_model.encoder is",
            "model": "world_model is",
            "policy": "policy is",
            "targets": "encoder has target parameters",
        }
        assert set(messages) == set(places)
        for way, place in places.items():
            assert messages[way].startswith(place)
            call = "DistributedData" if way == "targets" else "fully_shard(loss)"
            assert call in messages[way]


def test_ddp_is_not_asked_for_parameters_that_it_cannot_find(found) -> None:
    for message in each(found, "unused_parameters"):
        assert "decoder.requires_grad_(False)" in message
