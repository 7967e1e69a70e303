"""What is used of Ray beside its public interface is there, as in the release that the code was written for."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

import pytest
import ray
import ray._raylet as _raylet
from ray import tune
from ray._private import ray_constants
from ray._private.utils import get_entrypoint_name
from ray.train.backend import Backend
from ray.train.torch import TorchConfig
from ray.tune.execution import class_cache
from ray.tune.experiment import Trial
from ray.tune.trainable.function_trainable import FunctionTrainable, wrap_function

from orchestrator.cluster import ray_internals
from orchestrator.scheduling import slot


def parameters(function: Any) -> list[str]:
    return list(inspect.signature(function).parameters)


def test_ray_is_the_release_that_this_was_written_for() -> None:
    assert ray.__version__ == ray_internals.VERSION, "read ray_internals.py anew for this release"


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (get_entrypoint_name, []),
        (wrap_function, ["train_func", "name"]),
        (FunctionTrainable.setup, ["self", "config"]),
        (FunctionTrainable.cleanup, ["self"]),
        (ray_internals.canonicalize_bootstrap_address_or_die, ["addr", "temp_dir"]),
        (ray_internals.GlobalState._initialize_global_state, ["self", "gcs_options"]),
        (ray_internals.GlobalState.node_table, ["self"]),
        (ray_internals.GlobalState.actor_table, ["self", "actor_id", "job_id", "actor_state_name"]),
        (Backend.on_start, ["self", "worker_group", "backend_config"]),
        (tune.Callback.on_step_end, ["self", "iteration", "trials", "info"]),
        (tune.Callback.on_trial_recover, ["self", "iteration", "trials", "trial", "info"]),
    ],
)
def test_each_function_takes_what_it_is_given(function: Any, expected: list[str]) -> None:
    assert parameters(function) == expected


def test_the_names_that_have_no_signature_are_there() -> None:
    assert isinstance(ray_constants.ENABLE_RAY_CLUSTER, bool)
    assert ray_internals.Config.initialize and ray_internals.AuthenticationTokenLoader.instance().reset_cache
    assert ray_internals.get_authentication_mode() in (0, 1) or ray_internals.AuthenticationMode.TOKEN
    assert _raylet.InnerGcsClient.drain_node and ray_internals.GcsClientOptions.create  # GcsClient passes calls on
    assert ray_internals.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION") > 0
    assert TorchConfig().backend_cls.on_start
    assert slot.SlotProcess.__mro__[-1] is object and issubclass(slot.SlotProcess, FunctionTrainable)


def test_slots_get_no_credentials_by_command_lines_and_the_time_that_ranks_need(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On a cluster slots have their machine's environment, not the driver's, but for what Tune passes on."""
    assert {"AWS_SECRET_ACCESS_KEY"} < class_cache.ENV_VARS_TO_PROPAGATE or "AWS_" not in str(
        class_cache.ENV_VARS_TO_PROPAGATE
    )
    monkeypatch.setattr(class_cache, "ENV_VARS_TO_PROPAGATE", {"AWS_SECRET_ACCESS_KEY"})
    ray_internals.set_slot_environment()
    assert set(class_cache.ENV_VARS_TO_PROPAGATE) == {"TUNE_FUNCTION_THREAD_TIMEOUT_S"}


def test_a_trial_that_tune_gave_up_is_told_from_one_that_runs() -> None:
    assert ray_internals.is_given_up(SimpleNamespace(status=Trial.ERROR))
    assert not ray_internals.is_given_up(SimpleNamespace(status=Trial.RUNNING))
