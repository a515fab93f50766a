"""`claydist serve`: the application on one machine, with the fastest ingress that is there, and said which."""

from __future__ import annotations

import signal
import socket
import ssl
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from claydist import cluster
from claydist.errors import ClusterError, SpecError
from claydist.registry import open_registry
from claydist.serving.ingress import Ingress, choose_ingress, running_ingress
from claydist.serving.keys import ENVIRONMENT, KeyRing
from claydist.serving.settings import ServeSpec
from claydist.specfile import load_spec

APPLICATION = "claydist"
LOOPBACK = ("127.0.0.1", "localhost", "::1")
ENDED = ("DEPLOY_FAILED", "DELETING")
END_S = 30.0


def serve(
    refs: Sequence[str],
    *,
    registry: str | None = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    replicas: int | None = None,
    keys_file: str | None = None,
    address: str | None = None,
    settings: Mapping[str, Any] | None = None,
    tls: Mapping[str, str] | None = None,
    verbose: bool = False,
    say: Callable[[str], Any] = lambda text: print(text, file=sys.stderr, flush=True),
    stop: threading.Event | None = None,
) -> dict[str, Any]:
    """Serve models until Ctrl-C, SIGTERM or `stop`; what was served, as `--json` prints it.

    Must be called before Ray is imported to get HAProxy: Ray reads the environment when it is imported.

    Parameters
    ----------
    refs : references of models.
    registry : its URL; $CLAYDIST_REGISTRY or ./registry where None.
    host, port : where to listen; without keys only a loopback address is taken. A Serve that runs already stays
        where it is.
    replicas : copies of the server, one CPU each; what `settings` say, else 1, where None.
    keys_file : API keys, one a line; $CLAYDIST_API_KEYS are taken too.
    address : a cluster to join; the one that is there, else a new one where None.
    settings : further keys of `ServeSpec`, e.g. `{"limits": {"rows": 1000}}`.
    tls : `ssl_keyfile`, `ssl_certfile`, `ssl_ca_certs`, `ssl_keyfile_password` of Serve's HTTPOptions.
    say : told where it listens and what is open, line by line.
    stop : ends serving when set; for callers that have their own signals.

    Raises
    ------
    SpecError : for a setting that is wrong, or a host that is not loopback without keys.
    RegistryError, BundleError : when a model cannot be loaded.
    ClusterError : when the port is taken, Serve does not start, or one that runs has such an application already.
    """
    spec = checked(refs, registry=registry, host=host, replicas=replicas, keys_file=keys_file, settings=settings)
    _check_models(spec)
    ended = stop or threading.Event()
    cluster.prepare_environment()
    wanted = choose_ingress(spec.limits, has_tls=bool(tls))
    # Ray sets a handler of its own when it connects, which ends the process with a stack trace: ours comes after.
    with cluster.connected(address, verbose=verbose), _signals(ended):
        is_ours = _is_ours()
        if is_ours:
            _check_port(host, port)
        with _application(spec, host, port, dict(tls or {}), is_ours=is_ours) as http:
            ingress = wanted if is_ours else running_ingress()
            url = f"{'https' if http.ssl_certfile else 'http'}://{http.host}:{http.port}"
            for line in _announcement(spec, url, ingress, stays=(http.host, http.port) != (host, port)):
                say(line)
            ended.wait()
            say("stopping")
    return {"models": list(spec.models), "url": url, "ingress": ingress.name, "replicas": spec.replicas}


def checked(
    refs: Sequence[str],
    *,
    registry: str | None,
    host: str,
    replicas: int | None,
    keys_file: str | None,
    settings: Mapping[str, Any] | None = None,
) -> ServeSpec:
    """The settings as one spec, with paths that every process of this machine finds.

    Raises
    ------
    SpecError : for a setting that is wrong, or an open host without keys.
    """
    tree: dict[str, Any] = {**(settings or {}), "models": list(refs)}
    if replicas is not None:
        tree["replicas"] = replicas
    load_spec(ServeSpec, tree)
    tree["registry"] = open_registry(registry, tree.get("registry")).store.url
    if file := keys_file or tree.get("keys_file"):
        tree["keys_file"] = str(Path(file).expanduser().absolute())
    spec = load_spec(ServeSpec, tree)
    has_keys = bool(KeyRing.open(spec.keys_file))
    if host not in LOOPBACK and not has_keys:
        raise SpecError(
            f"--host {host} is reachable from elsewhere, and there are no keys: give --keys-file or ${ENVIRONMENT}, "
            f"or listen on 127.0.0.1"
        )
    return spec.model_copy(update={"require_keys": spec.require_keys or has_keys})


def tls_options(cert: Path | None, key: Path | None) -> dict[str, str]:
    """Serve's options for HTTPS by a certificate and its key; none where neither is given.

    Raises
    ------
    SpecError : for one without the other, or files that are no certificate with its key.
    """
    if cert is None and key is None:
        return {}
    if cert is None or key is None:
        raise SpecError("--tls-cert and --tls-key go together: give both, or neither")
    try:
        # The key of an encrypted file is asked for on the terminal, by every replica: there is no such terminal.
        ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(cert, key, password=lambda: b"")
    except (OSError, ValueError) as e:
        raise SpecError(
            f"--tls-cert {cert}, --tls-key {key}: expected a certificate and its private key, both PEM and the key "
            f"not encrypted ({e})"
        ) from None
    return {"ssl_certfile": str(cert.absolute()), "ssl_keyfile": str(key.absolute())}


def _check_models(spec: ServeSpec) -> None:
    """Resolve every reference here, where a mistake is one line and not a replica's traceback."""
    registry = open_registry(spec.registry)
    for ref in spec.models:
        registry.resolve(ref)


@contextmanager
def _application(spec: ServeSpec, host: str, port: int, tls: Mapping[str, str], *, is_ours: bool) -> Iterator[Any]:
    """The application for the length of the block, and the HTTPOptions by which Serve really listens.

    On a cluster that was joined the application ends with the block; so does Serve, where it was started here and has
    no other application. A cluster of our own takes both along.
    """
    from ray import serve as ray_serve
    from ray.serve.config import HTTPOptions
    from ray.serve.context import _get_global_client
    from ray.serve.exceptions import RayServeException

    from claydist.serving.deployment import build

    application = build(spec.model_dump(mode="json"))
    before = _get_global_client(raise_if_no_controller_running=False)
    if before is not None:
        # Serve ignores the options of whoever comes second.
        _check_running(spec, before.http_config, before.get_serve_details()["applications"])
    try:
        try:
            ray_serve.start(http_options=HTTPOptions(host=host, port=port, **tls))
            http = _get_global_client().http_config
            ray_serve.run(application, name=APPLICATION, route_prefix="/")
        except (RuntimeError, ValueError, OSError, RayServeException) as e:
            lines = [line for line in str(e).strip().splitlines() if line.strip()]
            raise ClusterError(f"Serve does not start: {lines[-1] if lines else type(e).__name__}") from e
        yield http
    finally:
        if not is_ours:
            if before is None and not set(ray_serve.status().applications) - {APPLICATION}:
                _end_serve()
            else:
                ray_serve.delete(APPLICATION)


def _end_serve() -> None:
    """Return once Serve has ended on this cluster, or was asked to END_S seconds ago.

    Not by `serve.shutdown`: its call waits for the death of what it asks, and Ray tells of that on standard output.
    """
    import ray
    from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE
    from ray.serve.context import _get_global_client

    client = _get_global_client(raise_if_no_controller_running=False)
    if client is None:
        return
    ray.get(client._controller.graceful_shutdown.remote(wait=False))
    deadline = time.monotonic() + END_S
    while time.monotonic() < deadline:
        try:
            ray.get_actor(SERVE_CONTROLLER_NAME, namespace=SERVE_NAMESPACE)
        except ValueError:  # it is gone
            return
        time.sleep(0.1)


def _check_running(spec: ServeSpec, http: Any, applications: Mapping[str, Any]) -> None:
    """Pass when our application may join the Serve that runs.

    Raises
    ------
    ClusterError : when it has an application of our name or route, or does not listen at all.
    SpecError : when it listens on an open interface, and there are no keys.
    """
    for name, found in sorted(applications.items()):
        if found["status"] not in ENDED and (name == APPLICATION or found.get("route_prefix") == "/"):
            raise ClusterError(
                f"Serve on this cluster has application {name!r} at route {found.get('route_prefix')}, which "
                f"this one would replace: end it first (Ctrl-C of its `claydist serve`, or `serve shutdown`), or give "
                f"--address local and another --port"
            )
    if http.host is None:
        raise ClusterError(
            "Serve on this cluster does not listen for HTTP: end it by `serve shutdown`, and serve again"
        )
    if http.host not in LOOPBACK and not spec.require_keys:
        raise SpecError(
            f"Serve on this cluster listens on {http.host}, whatever --host says, and there are no keys: give "
            f"--keys-file or ${ENVIRONMENT}, or end that Serve by `serve shutdown`"
        )


def _is_ours() -> bool:
    """True when this process started the cluster that it is connected to."""
    import ray

    node = ray._private.worker._global_node
    return node is not None and node.is_head()


def _announcement(spec: ServeSpec, url: str, ingress: Ingress, *, stays: bool) -> Iterator[str]:
    yield f"serving {', '.join(spec.models)} at {url} (docs at {url}/docs)"
    yield f"ingress: {ingress.name}" + (f": {ingress.note}" if ingress.note else "")
    for port in ingress.ports:
        yield f"also open: port {port}"
    if spec.require_keys:
        yield "keys: needed, as 'Authorization: Bearer KEY'"
    else:
        yield "keys: none, so only this machine can ask"
    if stays:
        yield "host and port are those of the Serve that ran before, and not what was asked for"


def _check_port(host: str, port: int) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as e:
            raise ClusterError(f"cannot listen on {host}:{port}: {e.strerror}; choose another --port") from None


@contextmanager
def _signals(ended: threading.Event) -> Iterator[None]:
    """Ctrl-C and SIGTERM set the event, in the main thread; elsewhere they are the caller's."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    kinds = (signal.SIGINT, signal.SIGTERM)
    before = {kind: signal.signal(kind, lambda *_: ended.set()) for kind in kinds}
    try:
        yield
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler or signal.SIG_DFL)
