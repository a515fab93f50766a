"""ServeSpec: what a server serves, and within which limits; written as YAML, in Serve's `args`."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, str_min_length=1)


class Limits(_Frozen):
    """Bounds of one replica; no header of a client lifts one."""

    body_bytes: int = Field(64 << 20, ge=1024, description="largest body (Arrow, binary tensors); beyond it 413")
    json_bytes: int = Field(8 << 20, ge=1024, description="largest JSON, which takes ten times its size in memory")
    rows: int = Field(100_000, ge=1, description="rows of one request; beyond it 413")
    queue_requests: int = Field(
        256, ge=1, description="requests at work or waiting; others wait in HAProxy, or get 503"
    )
    queue_rows: int = Field(200_000, ge=1, description="rows waiting for a prediction; beyond it 503")
    queue_bytes: int = Field(256 << 20, ge=1024, description="bytes of bodies claimed or held at once; beyond it 503")
    queue_s: float = Field(
        1.0, gt=0, description="longest wait in HAProxy, and again in a replica for its turns; beyond it 503"
    )
    request_s: float = Field(30.0, gt=0, description="a request that takes longer, body included, gets 503 (body: 408)")
    batch_rows: int = Field(65_536, ge=1, description="rows predicted at once at the most; bulk goes in pieces")
    per_key_per_s: float | None = Field(None, gt=0, description="requests a second of one key; beyond it 429")


class Autoscaling(_Frozen):
    """Bounds between which Serve chooses the number of replicas."""

    min_replicas: int = Field(1, ge=1, description="replicas at the least")
    max_replicas: int = Field(ge=1, description="replicas at the most")
    target_ongoing_requests: float = Field(16, gt=0, description="requests at work in one replica that Serve aims at")

    @model_validator(mode="after")
    def _in_order(self) -> Autoscaling:
        if self.max_replicas < self.min_replicas:
            raise ValueError(f"max_replicas {self.max_replicas} is below min_replicas {self.min_replicas}")
        return self


class BatchSpec(_Frozen):
    """Batch scoring by HTTP; off until roots are given."""

    input_roots: tuple[str, ...] = Field((), description="URLs that a batch may read below")
    output_roots: tuple[str, ...] = Field((), description="URLs that a batch may publish below")
    address: str | None = Field(None, description="the cluster's dashboard; found by itself where not given")


class ServeSpec(_Frozen):
    """Everything that a server needs."""

    models: tuple[str, ...] = Field(min_length=1, description="references: name, name@alias, name:version, or a URL")
    registry: str | None = Field(None, description="URL of the registry; $CLAYDIST_REGISTRY or ./registry by default")
    replicas: int = Field(1, ge=1, description="copies of the server, each with all models")
    autoscaling: Autoscaling | None = Field(None, description="instead of `replicas`")
    cpus_per_replica: float = Field(1.0, ge=0, description="CPUs that Ray reserves for one replica")
    keys_file: str | None = Field(None, description="API keys, one a line, read again when it changes")
    require_keys: bool = Field(False, description="refuse to start without keys; set it for every open network")
    poll_s: float = Field(3.0, gt=0, description="how often an alias is looked up for a new version")
    limits: Limits = Field(default_factory=Limits, description="bounds of one replica")
    batch: BatchSpec = Field(default_factory=BatchSpec, description="batch scoring by HTTP")
    access_log: bool = Field(True, description="one line of JSON a request on the replica's standard output")

    @field_validator("models", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        # `serve run claydist.serving:app models=a,b` gives text.
        return [part.strip() for part in value.split(",")] if isinstance(value, str) else value

    @field_validator("models")
    @classmethod
    def _once(cls, models: tuple[str, ...]) -> tuple[str, ...]:
        if twice := sorted({m for m in models if models.count(m) > 1}):
            raise ValueError(f"{twice} are given twice")
        return models
