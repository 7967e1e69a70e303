"""Everything that this project uses of Ray and that is not Ray's public interface.

Written for the release `VERSION`; tests/scheduling/test_ray_internals.py checks that release and each name. Tune's parts
are imported where they are used, since a process that only watches a machine needs no Tune.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ray._private.utils
from ray._private import ray_constants
from ray._private.services import canonicalize_bootstrap_address_or_die
from ray._private.state import GlobalState
from ray._raylet import (  # type: ignore[attr-defined]
    AuthenticationMode,
    AuthenticationTokenLoader,
    Config,
    GcsClient,
    GcsClientOptions,
    get_authentication_mode,
)
from ray.core.generated.autoscaler_pb2 import DrainNodeReason

VERSION = "2.60.0"
SLOT, RANK = "ResourceTrainable", "RayTrainWorker"  # class names of the actors of slots, and of the ranks of groups

__all__ = ["DrainNodeReason", "GcsClient", "GcsClientOptions", "GlobalState", "canonicalize_bootstrap_address_or_die"]


# ------------------------------------------------------------------------------------------------------------- Ray core


def hide_command_line() -> None:
    """Keeps the command line, which may hold a password in --tracking-uri, from Ray's dashboard."""
    ray._private.utils.get_entrypoint_name = lambda: "python -m orchestrator.sweep"


def listen_on_loopback() -> None:
    """Makes Ray take 127.0.0.1 as this machine's address. The switch is named for two systems that need it off.

    Ray decides from a node's address where its processes listen: on every address of the machine, unless that is loopback.
    Takes effect together with RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0, which Ray's processes read.
    """
    ray_constants.ENABLE_RAY_CLUSTER = False  # read from the environment when Ray was imported


def reload_authentication() -> None:
    """Makes Ray read RAY_AUTH_MODE and the token again, as at its import."""
    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()


def requires_token() -> bool:
    return bool(get_authentication_mode() == AuthenticationMode.TOKEN)


# ----------------------------------------------------------------------------------------------------------------- Tune


def set_slot_environment() -> None:
    """Sets which variables Tune passes from the driver to slots.

    Tune passes them by command lines, which every user of a machine can read: no credentials. A slot itself reads
    TUNE_FUNCTION_THREAD_TIMEOUT_S, the time that ranks have to leave a trial.
    """
    from ray.tune.execution import class_cache

    names = class_cache.ENV_VARS_TO_PROPAGATE
    names.difference_update([name for name in names if "AWS_" in name])
    names.add("TUNE_FUNCTION_THREAD_TIMEOUT_S")


def function_trainable(function: Callable[[dict[str, Any]], None]) -> Any:
    """Returns the class that Tune makes of a function: for a subclass with `setup` and `cleanup` of its own."""
    from ray.tune.trainable.function_trainable import wrap_function

    return wrap_function(function)


def is_given_up(trial: Any) -> bool:
    """Returns whether Tune has given up a trial. No callback tells of one whose actor could not be used again."""
    from ray.tune.experiment import Trial

    return bool(trial.status == Trial.ERROR)
