"""The connection of a run to Ray: started here, or a cluster that there is."""

from __future__ import annotations

import ipaddress
import logging
import math
import os
import platform
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from types import ModuleType

from torchrl_wm._interrupts import blocked_interrupts

#: For how long an address may not answer.
ANSWER_SECONDS = 5.0
#: For how long a cluster may not answer that something listens for.
CONNECT_SECONDS = 60.0
#: What Ray's processes are started with here. Workers would have the least priority, niceness
#: 15, and starve beside anything else; and how Ray is used would be reported.
_ENVIRONMENT = {"RAY_worker_niceness": "0", "RAY_USAGE_STATS_ENABLED": "0"}
_PROBE = "import ray, sys; ray.init(sys.argv[1], log_to_driver=False)"


class RayConnection:
    """The connection of this process to Ray.

    Without an address, the connection that this process has is used, or else Ray is started here.

    Args:
        address: that of a cluster, ``"host:port"``; "auto" for the one in the environment variable
            RAY_ADDRESS or on this machine; None for this machine only.
        cpus: the CPUs that all workers ask for.
    """

    def __init__(self, address: str | None, cpus: float) -> None:
        self._address, self._cpus = address, cpus
        self._is_own = False

    def check(self) -> None:
        """Refuse what :meth:`open` would refuse; nothing stays open.

        Raises:
            ImportError: if Ray is not installed.
            ConnectionError: if nobody answers, or the cluster has another version of Ray or Python.
            ValueError: if there are fewer CPUs.
        """
        ray = _ray()
        if self._address is None and not ray.is_initialized():
            _check_cpus(self._cpus, _own_cpus(), "this machine has")
        else:
            self.open()
            self.close()

    def open(self) -> None:
        """Connect to the cluster, or start Ray here.

        Raises:
            ImportError, ConnectionError, ValueError: as :meth:`check`.
        """
        ray, address = _ray(), self._address
        if address is None and not ray.is_initialized():
            _check_cpus(self._cpus, _own_cpus(), "this machine has")
            with _quiet_start():
                ray.init(
                    "local",
                    num_cpus=math.ceil(self._cpus),
                    num_gpus=0,
                    include_dashboard=False,
                    log_to_driver=False,
                    logging_level=logging.ERROR,
                )
            self._is_own = True
        elif not ray.is_initialized():
            self._join(address)
            self._is_own = True  # this process's connection, not the cluster
        elif address is not None:
            _check_is(address, ray.get_runtime_context().gcs_address)
        try:
            there = ray.cluster_resources().get("CPU", 0.0)
            _check_cpus(self._cpus, there, "the Ray cluster has")
        except ValueError:
            self.close()
            raise

    def close(self) -> None:
        """End what was begun here: Ray itself, or the connection to a cluster."""
        if self._is_own:
            import ray

            ray.shutdown()
            self._is_own = False

    @staticmethod
    def _join(address: str) -> None:
        """Connect to a cluster within a bounded time."""
        import ray

        given, address = address, _resolved(address)
        # Ray itself waits for minutes, and then ends the process.
        if ":" in address:
            _check_listens(address, given)
        if address != "local":
            try:
                subprocess.run(
                    [sys.executable, "-c", _PROBE, address],
                    capture_output=True,
                    timeout=CONNECT_SECONDS,
                )
            except subprocess.TimeoutExpired:
                raise ConnectionError(
                    f"What listens at ray_address={given!r} does not answer as Ray does within "
                    f"{CONNECT_SECONDS:g} s. Give the address that `ray start --head` prints, "
                    f"host:port."
                ) from None
        try:
            ray.init(address, log_to_driver=False, logging_level=logging.ERROR)
        except ConnectionError as err:
            raise ConnectionError(
                f"There is no Ray cluster at ray_address={given!r} that takes this process ({err}). "
                f"If it asks for a token, set RAY_AUTH_MODE=token before the run starts. Without "
                f"ray_address, Ray is started on this machine."
            ) from err
        except RuntimeError as err:
            raise ConnectionError(
                f"The Ray cluster at ray_address={given!r} does not take this process, with Ray "
                f"{ray.__version__} and Python {platform.python_version()}: {err} Install the "
                f"same versions on all machines."
            ) from err


def _ray() -> ModuleType:
    if find_spec("ray") is None:
        raise ImportError("collector='ray' needs Ray: pip install 'torchrl-wm[ray]'.")
    import ray

    return ray


def _resolved(address: str) -> str:
    """Return the address that "auto" stands for."""
    name, found = "ray_address", address
    if address == "auto" and os.environ.get("RAY_ADDRESS"):
        name, found = "RAY_ADDRESS", os.environ["RAY_ADDRESS"]
    if "://" in found:
        raise ValueError(
            f"{name}={found!r} is one of Ray's client, through which workers cannot be watched. "
            f"Run on a machine of the cluster, and give host:port, such as "
            f"ray_address='10.0.0.1:6379'."
        )
    return found


def _check_listens(address: str, given: str) -> None:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=ANSWER_SECONDS).close()
    except (OSError, ValueError, OverflowError) as err:
        raise ConnectionError(
            f"Nobody answers at ray_address={given!r} ({err}). Give the address that `ray start "
            f"--head` prints, host:port."
        ) from err


def _check_is(address: str, connected: str) -> None:
    """Refuse another cluster than that which this process is connected to."""
    if address != "auto" and not _places(address) & _places(connected):
        raise ValueError(
            f"This process is connected to Ray at {connected!r}, and ray_address={address!r}. Call "
            f"ray.shutdown() first, or leave out ray_address."
        )


def _places(address: str) -> set[tuple[str, str]]:
    """Return the numeric hosts of an address, each with its port."""
    host, _, port = address.rpartition(":")
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError:
        return {(host, port)}
    hosts = {place[0] for *_, place in found}
    if any(ipaddress.ip_address(host).is_loopback for host in hosts):
        import ray

        # Ray names this machine by the address that others have for it.
        hosts.add(ray.util.get_node_ip_address())
    return {(host, port) for host in hosts}


def _check_cpus(asked: float, there: float, who: str) -> None:
    # Ray would wait for more, for ever.
    if asked > there:
        raise ValueError(
            f"The workers ask for {asked:g} CPUs, ray_cpus for each of num_envs, and {who} "
            f"{there:g}. Give fewer envs, or a smaller ray_cpus, such as 0.25 for envs that "
            f"mostly wait."
        )


def _own_cpus() -> int:
    """Return how many CPUs this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@contextmanager
def _quiet_start() -> Iterator[None]:
    """Start Ray's processes with settings that suit, and out of the reach of Ctrl-C."""
    added = {key: value for key, value in _ENVIRONMENT.items() if key not in os.environ}
    logger = logging.getLogger("ray")
    level = logger.level
    os.environ.update(added)
    logger.setLevel(logging.ERROR)
    try:
        with blocked_interrupts():
            yield
    finally:
        logger.setLevel(level)
        for key in added:
            del os.environ[key]
