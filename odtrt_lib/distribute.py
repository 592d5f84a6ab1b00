"""Maps a function over items: in this process, or as tasks of a Ray cluster.

Ray (https://docs.ray.io) does the scheduling, the transport and the retries. It is imported only if a cluster
is asked for. It sends no usage statistics, unless ``RAY_USAGE_STATS_ENABLED=1`` is in the environment. Who
reaches a port of a Ray cluster can run code there; the cluster of :data:`LOCAL` asks for a token, which Ray
does since 2.52.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import socket
from pathlib import Path
from typing import Any, Callable, Iterator, List, Optional, Sequence, TypeVar

from odtrt_lib.errors import ClusterError, InputError, MissingDependencyError, one_line

Item = TypeVar("Item")
Result = TypeVar("Result")

LOCAL = ""
"""The address of a cluster on this machine that lasts as long as the call."""
_RUNNING = "auto"
_RETRIES = 3
_OBJECT_STORE_BYTES = 256 << 20
_CONNECT_SECONDS = 5.0
_LONGEST_MESSAGE = 300


def mapped(
    work: Callable[[Item], Result],
    items: Sequence[Item],
    ray_address: Optional[str] = None,
    advance: Callable[[], None] = lambda: None,
) -> List[Result]:
    """``[work(item) for item in items]``.

    ray_address: None: in this process. :data:`LOCAL`: by a Ray cluster that is started for this call, with a
    task at a time on each core of this machine. ``auto``: by the cluster that runs on this machine.
    ``HOST:PORT``: by that one. A process that is connected to a cluster already uses that one, and stays
    connected. advance: called after each item, in their order.

    With Ray, ``work``, the items and the results are pickled. The machines of the cluster must have odtrt,
    and the files that ``work`` reads under the same names. Each item is a task on one core. A task whose
    worker process or machine is lost is started again, three times at most, so ``work`` must be repeatable.

    Raises what ``work`` raises; InputError for an address of another form; MissingDependencyError without
    Ray; ClusterError if nobody answers, or if a task is lost each time.
    """
    if ray_address is None:
        results = []
        for item in items:
            results.append(work(item))
            advance()
        return results
    ray = require_cluster(ray_address)
    with _connected(ray, ray_address):
        task = ray.remote(num_cpus=1, max_retries=_RETRIES)(_work_there)
        here = str(Path.cwd())
        pending = [task.remote(here, work, item) for item in items]
        return [_awaited(ray, one, advance) for one in pending]


def require_cluster(address: str) -> Any:
    """Finds out in a moment what would be the end of :func:`mapped`. Returns the module ``ray``.

    Raises what ``mapped`` raises if there is no Ray, or nobody at the address.
    """
    if not re.fullmatch(rf"|{_RUNNING}|\[?[\w.:-]+\]?:\d{{1,5}}", address):
        raise InputError(f"Ray cluster {address!r}: expected `auto`, or HOST:PORT as `ray start` printed it")
    ray = _imported_ray(address)
    if address not in (LOCAL, _RUNNING):
        _require_answer(address)
    return ray


def _work_there(folder: str, work: Callable[[Item], Result], item: Item) -> Result:
    """In a worker: relative names mean the same files as where the items come from."""
    with contextlib.suppress(OSError):
        os.chdir(folder)
    return work(item)


def _awaited(ray: Any, pending: Any, advance: Callable[[], None]) -> Any:
    try:
        result = ray.get(pending)
    except ray.exceptions.RayTaskError as error:
        if "failed to import on the worker" in str(error.cause):
            raise ClusterError(
                "Ray's workers cannot import odtrt_lib: install this odtrt on every machine of the cluster"
            ) from error
        if isinstance(error.cause, Exception):
            raise error.cause from None
        raise _failed(error) from error
    except ray.exceptions.RayError as error:
        raise _failed(error) from error
    advance()
    return result


def _failed(error: Exception) -> ClusterError:
    return ClusterError(f"Ray gave up a task after {_RETRIES} retries: {_shortened(error)}")


def _shortened(error: Exception) -> str:
    return one_line(error)[:_LONGEST_MESSAGE]


def _imported_ray(address: str) -> Any:
    """Ray reads these variables when it is imported, and its processes inherit them."""
    settings = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
    if address == LOCAL:
        settings.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32))
    for name, value in settings.items():
        os.environ.setdefault(name, value)
    try:
        import ray
    except ImportError as error:
        raise MissingDependencyError(
            f"Ray cannot be imported ({one_line(error)}): run `pip install ray`, or do without a cluster"
        ) from error
    return ray


@contextlib.contextmanager
def _connected(ray: Any, address: str) -> Iterator[None]:
    if ray.is_initialized():
        yield
        return
    options: Any = {"address": address or "local", "log_to_driver": False, "logging_level": "error"}
    if address == LOCAL:
        options.update(
            include_dashboard=False, object_store_memory=_OBJECT_STORE_BYTES, _node_ip_address="127.0.0.1"
        )
    try:
        try:
            ray.init(**options)
        except Exception as error:  # of ten kinds, all of them about the cluster
            if address == LOCAL:
                raise ClusterError(f"Ray starts no cluster on this machine: {_shortened(error)}") from error
            raise ClusterError(
                f"Ray cluster {address}: no connection ({_shortened(error)}); is it running, with the same "
                "versions of Ray and Python?"
            ) from error
        yield
    finally:
        ray.shutdown()


def _require_answer(address: str) -> None:
    """Ray itself would try for minutes, and write to the terminal meanwhile."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), _CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise ClusterError(
            f"Ray cluster {address}: nobody answers there ({one_line(error)}); `ray start --head` starts one"
        ) from error
