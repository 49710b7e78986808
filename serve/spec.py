"""The section of the Spec that says how a model is served: how many replicas, how large, for whom, within which limits."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from pipelines.spec import Frozen


class ReplicasSpec(Frozen):
    """How many replicas answer; between the two the number follows the requests in flight."""

    min: Annotated[int, Field(ge=1, le=1000)] = 1
    """Replicas kept ready without any load."""
    max: Annotated[int, Field(ge=1, le=1000)] = 4
    """Replicas at the most."""
    look_back_s: Annotated[float, Field(ge=1, le=3600)] = 12
    """Seconds over which the requests in flight are averaged; later versions of Serve will demand more than 10."""
    up_after_s: Annotated[float, Field(gt=0, le=3600)] = 12
    """Seconds that the load must ask for more replicas before they come."""
    down_after_s: Annotated[float, Field(gt=0, le=86_400)] = 72
    """Seconds that the load must ask for fewer replicas before they go."""

    @model_validator(mode="after")
    def _ordered(self) -> ReplicasSpec:
        if self.max < self.min:
            raise ValueError(f"max is {self.max}, which is less than min, {self.min}; make max at least min")
        for name in ("up_after_s", "down_after_s"):
            # Else a decision rests on load from before the one before it, and the number of replicas swings.
            if (delay := getattr(self, name)) < self.look_back_s:
                least = f"look_back_s, {self.look_back_s:g}"
                raise ValueError(
                    f"{name} is {delay:g}, which is less than {least}; make it at least as long, or replicas come and go"
                )
        return self


class LimitsSpec(Frozen):
    """What one replica takes on; beyond it a request is refused, not queued."""

    body_mb: Annotated[float, Field(gt=0, le=1024)] = 16
    """Size of a request's body in MiB; a larger one is answered 413."""
    rows: Annotated[int, Field(ge=1, le=10_000_000)] = 10_000
    """Rows in one request; more are answered 413."""
    in_flight: Annotated[int, Field(ge=1, le=4096)] = 64
    """Requests that one replica works on at the same time; further ones are answered 429 with Retry-After."""
    timeout_s: Annotated[float, Field(gt=0, le=3600)] = 10
    """Time for one request, from its first byte to its answer; a slower one is answered 504."""

    @property
    def body_bytes(self) -> int:
        return int(self.body_mb * 2**20)


class ServeSpec(Frozen):
    """How a model is served over HTTP."""

    replicas: ReplicasSpec = ReplicasSpec()
    cpus: Annotated[float, Field(gt=0, le=1024)] = 0.5
    """Slots that each replica reserves; fractions are fine."""
    batch: Literal["auto", "off"] = "auto"
    """Whether requests in flight share one call of the model; auto: not while the model takes under about 1 ms."""
    auth: Literal["token", "none"] = "token"
    """token: every request but health needs `Authorization: Bearer TOKEN`; none: open to all who reach the port."""
    access_log: bool = True
    """Whether each request leaves a JSON line beside Ray Serve's logs: its id, status, time, rows, and the name of its token."""
    limits: LimitsSpec = LimitsSpec()
