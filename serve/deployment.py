"""What runs in the cluster: the replicas of each model, and the root application that speaks for all of them."""

from __future__ import annotations

import asyncio
import importlib.metadata
import math
import time
from pathlib import Path
from typing import Any

import ray
import ray.serve
from ray.serve.config import AutoscalingConfig
from ray.serve.schema import LoggingConfig
from ray.util.metrics import Counter, Gauge
from starlette.types import ASGIApp, Receive, Scope, Send

from pipelines.artifact import Artifact
from serve.config import ReplicaConfig
from serve.directory import MODEL, standings
from serve.errors import RequestError, respond
from serve.meter import COUNTERS, AccessLog
from serve.overview import Standing, build_root
from serve.routes import ModelApp, build_app, logger
from serve.spec import ServeSpec

# Read by the process of a replica when it starts, so they hold on a Ray that someone else started too.
_ENVIRONMENT = {
    # Requests in flight are counted 50 times in the look-back window, not 5, and told each second, not each tenth.
    "RAY_SERVE_AUTOSCALING_METRIC_RECORD_INTERVAL_FACTOR": "0.02",
    "RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "1",
    # A replica that is to end stays reachable so long, not 30 s. HAProxy knows within a second; later it retries elsewhere.
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "3",
}
_STALE_S = 1.0
_WATCH_S = 1.0
# Serve makes a record of each request at INFO, even where no one keeps it: 3 % of a one-row request.
_LOGGING = LoggingConfig(enable_access_log=False, log_level="WARNING")


def model_application(name: str, config: ReplicaConfig) -> ray.serve.Application:
    """Return the Serve application of one model."""
    spec = config.spec
    replicas = spec.replicas
    deployment: ray.serve.Deployment = ray.serve.deployment(
        name=MODEL,
        user_config=config.model_dump(mode="json"),
        # Where replicas have to be replaced (other `cpus`, another release) the new one is there before the old one goes.
        max_surge_percent=100,
        rolling_update_percentage=1.0,  # a change of `user_config` reaches all at once: each answers on while it loads
        ray_actor_options={"num_cpus": spec.cpus, "runtime_env": _runtime_env()},
        # The replica refuses what is over its limit itself, in the one shape of errors; Serve's own queue stays out of the way.
        max_ongoing_requests=max(1000, 4 * spec.limits.in_flight),
        graceful_shutdown_timeout_s=spec.limits.timeout_s + 5,  # no request lasts longer
        graceful_shutdown_wait_loop_s=0.5,
        logging_config=_LOGGING,
        health_check_period_s=5,
        health_check_timeout_s=10,
        **_scaling(spec) if replicas.max > replicas.min else {"num_replicas": replicas.min},
    )(ModelReplica)
    # With a version of its own a changed `user_config` reaches the running replicas; without one, each deploy replaces them all.
    deployment = deployment.options(version=_code_version(), _internal=True)
    return deployment.bind(name, max(1, math.ceil(spec.cpus)))


def _runtime_env() -> dict[str, Any]:
    """That of the job, of which Serve would keep only the working_dir, with the environment above."""
    job = dict(ray.get_runtime_context().runtime_env)
    return job | {"env_vars": job.get("env_vars", {}) | _ENVIRONMENT}


def _code_version() -> str:
    """What tells replicas of one release from those of another, which has to replace them."""
    try:
        return importlib.metadata.version("heliostat")
    except importlib.metadata.PackageNotFoundError:  # run from a checkout
        return "0"


def root_application() -> ray.serve.Application:
    """Return the Serve application at `/`."""
    deployment: ray.serve.Deployment = ray.serve.deployment(
        name="root",
        ray_actor_options={"num_cpus": 0, "runtime_env": _runtime_env()},
        graceful_shutdown_wait_loop_s=0.5,
        logging_config=_LOGGING,
    )(RootReplica)
    return deployment.bind()


def _scaling(spec: ServeSpec) -> dict[str, Any]:
    """Follow the requests in flight.

    One request after the other is answered, so a few in flight on average are a busy replica: 4 are 80 % of its time.
    """
    config = AutoscalingConfig(
        min_replicas=spec.replicas.min,
        max_replicas=spec.replicas.max,
        target_ongoing_requests=max(1.0, spec.limits.in_flight / 16),
        look_back_period_s=spec.replicas.look_back_s,
        upscale_delay_s=spec.replicas.up_after_s,
        downscale_delay_s=spec.replicas.down_after_s,
    )
    return {"autoscaling_config": config}


@ray.serve.ingress()
class ModelReplica:
    """One replica of one model. A new Artifact takes over between two requests, once it has loaded and passed its check."""

    def __init__(self, name: str, threads: int) -> None:
        self._name, self._threads = name, threads
        self._id = ray.serve.get_replica_context().replica_id.unique_id
        self._config: ReplicaConfig | None = None
        self._settled, self._problem = "", None  # type: str, str | None
        self._switch = _Switch()
        self._taking_over: asyncio.Task[None] | None = None
        self._watching: asyncio.Task[None] | None = None
        node = ray._private.worker.global_worker.node
        assert node is not None, "a replica is a worker of Ray"
        self._log = AccessLog(Path(node.get_logs_dir_path()) / "serve" / f"access_{name}_{self._id}.jsonl")
        self._counters = {key: Counter(key, help, labels) for key, (help, labels) in COUNTERS.items()}
        self._version = Gauge("heliostat_version", "1 for the version that answers, 0 for those before.", ("model", "version"))

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Take over what the config names; Serve calls this at the start and at every change.

        Until it returns Serve leads no requests here, so only a replica that answers none yet lets it wait.
        """
        config = ReplicaConfig.model_validate(user_config)
        if self._taking_over:
            self._taking_over.cancel()
        if self._switch.app is None:
            self._adopt(config, await asyncio.to_thread(self._build, config))
            self._watching = asyncio.create_task(self._watch())
        else:
            self._taking_over = asyncio.create_task(self._take_over(config))

    async def _take_over(self, config: ReplicaConfig) -> None:
        try:
            self._adopt(config, await asyncio.to_thread(self._build, config))
        except Exception as error:  # noqa: BLE001 - an Artifact may fail in any way; this replica goes on with what it has
            logger.exception("%s goes on with %s", self._name, self._config and self._config.artifact)
            self._problem, self._settled = str(error), config.digest

    def _adopt(self, config: ReplicaConfig, app: ModelApp) -> None:
        app.log = self._log if config.spec.access_log else None
        if (before := self._switch.app) is not None:
            self._hand_on(before)
            self._version.set(0, {"model": self._name, "version": before.artifact.version})
        self._switch.app, self._config = app, config
        self._problem, self._settled = None, config.digest

    async def _watch(self) -> None:
        """Hand the counts on to Ray, whose agent shows them to Prometheus, and the log's lines to its file."""
        while True:
            await asyncio.sleep(_WATCH_S)
            try:
                if (app := self._switch.app) is not None:
                    self._hand_on(app)
                    self._version.set(1, {"model": self._name, "version": app.artifact.version})
                self._log.flush()
            except Exception:  # noqa: BLE001 - a full disk must not end the counting, nor the counting the answers
                logger.exception("%s cannot be watched", self._name)

    def _hand_on(self, app: ModelApp) -> None:
        for grown in app.meter.drain():
            self._counters[grown.name].inc(grown.value, grown.labels)

    def _build(self, config: ReplicaConfig) -> ModelApp:
        running = self._switch.app
        same = running is not None and self._config is not None and self._config.artifact == config.artifact
        artifact = running.artifact if running is not None and same else Artifact.load(config.artifact)
        return build_app(artifact, self._name, limits=config.spec.limits, tokens=config.tokens, threads=self._threads)

    def __serve_build_asgi_app__(self) -> ASGIApp:
        return self._switch

    async def check_health(self) -> None:
        """Called by Serve; what is asked is whether the event loop still turns, so an answer is enough."""

    def card(self) -> dict[str, Any]:
        """What the root application tells about this model."""
        app = self._switch.app
        assert app is not None, "Serve shows a replica to others only once it is configured"
        return {**app.card().model_dump(), "problem": self._problem, "replica": self._id, "settled": self._settled}


class _Switch:
    """The ASGI application that Serve holds for good; the one behind it may change between two requests."""

    app: ModelApp | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self.app is not None:
            await self.app(scope, receive, send)
        elif scope["type"] == "http":
            loading = RequestError(503, "the model is being loaded", headers={"retry-after": "1"})
            await respond(send, loading.status, loading.body, loading.headers)


@ray.serve.ingress()
class RootReplica:
    """The application at `/`. It holds no state of its own: what it says is asked of Serve and of the models."""

    def __init__(self) -> None:
        self._standings: list[Standing] = []
        self._asked_at = -math.inf
        self._asking = asyncio.Lock()

    def __serve_build_asgi_app__(self) -> ASGIApp:
        return build_root(self._current)

    async def _current(self) -> list[Standing]:
        async with self._asking:
            if time.monotonic() - self._asked_at > _STALE_S:
                known = {standing.name: standing.card for standing in self._standings if standing.card}
                self._standings = await asyncio.to_thread(standings, known)
                self._asked_at = time.monotonic()
            return self._standings
