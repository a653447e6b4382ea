"""Settings: the one reader of the environment and of `.env`. Everything else is told."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, SecretStr, ValidationError, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from .errors import ConfigurationError

__all__ = ["Settings", "check_url", "redact", "settings"]

_PREFIX = "PIPELINE_"
_FILE = ".env"
_SCHEMES = ("redis://", "rediss://", "unix://", "memory://")


class Settings(BaseSettings):
    """What can be set from outside: `PIPELINE_<FIELD>`, besides the two ports. The environment wins over `.env`.

    An empty variable counts as unset, so that a template's blank lines are harmless.
    """

    model_config = SettingsConfigDict(
        env_prefix=_PREFIX,
        env_file=_FILE,
        env_file_encoding="utf-8",
        env_ignore_empty=True,
        extra="ignore",  # .env may hold other programs' variables
        frozen=True,
        populate_by_name=True,
        hide_input_in_errors=True,  # a rejected URL may hold a password
    )

    redis_url: str = "redis://127.0.0.1:6379/0"
    """Where Redis or Valkey is: redis://, rediss://, unix:// or memory://. May hold a password; `repr` hides it."""

    gateway_host: str = "127.0.0.1"
    gateway_port: int = Field(default=8000, ge=0, le=65535, validation_alias="GATEWAY_PORT")
    dashboard_host: str = "127.0.0.1"
    dashboard_port: int = Field(default=8050, ge=0, le=65535, validation_alias="DASHBOARD_PORT")
    """0 takes any free port."""

    data_dir: Path = Path(".pipeline")
    """Where the embedded Valkey keeps its append-only file, and models their checkpoints."""

    max_frame_bytes: int = Field(default=256 << 20, ge=1024)
    """A frame above this is refused, when written and when read: a hostile length cannot exhaust memory."""

    inline_bytes: int = Field(default=64 << 10, ge=0)
    """Tensors up to this size travel inside the frame; bigger ones beside it, through the payload plane."""

    payloads: Literal["auto", "shm", "blobs", "inline"] = "auto"
    """How bigger tensors travel: by shared memory where all readers are on this host, else by keys of their own in
    Redis (auto); always one of these; or inside their frames."""

    shm_dir: Path = Path("/dev/shm")
    """Where shared memory is; a folder that all processes of a host see, in memory."""

    shm_bytes: int | None = Field(default=None, ge=0)
    """Shared memory a process may use for tensors; unset: half of what is free."""

    prefetch_bytes: int = Field(default=32 << 20, ge=1)
    """How much a subscriber process reads ahead of its handlers."""

    drain_seconds: float = Field(default=10.0, ge=0)
    """How long a stopping process lets its handlers finish before it hands their events back."""

    token: SecretStr | None = None
    """When set, gateway and dashboard ask for it as a bearer token."""

    group_expires: float = Field(default=7 * 86400.0, gt=0)
    """Seconds without a worker after which a group ends, so that it does not hold its channel's events for ever."""

    metrics_interval: float = Field(default=1.0, gt=0)
    """Seconds between two publications of a process's counters."""

    model_file: Path | None = None
    """Safetensors file that inference starts from."""

    models: str = "imagenet"
    """What `subscribers.serving` serves: names of built-in models and specification files, separated by commas."""

    models_dir: Path = Path("models")
    """Where specification files lie that LoadModel events may name."""

    serving_batch: int = Field(default=32, ge=1)
    """Items at most in a batch of a served model, unless its specification says so."""

    serving_lease: float = Field(default=10.0, gt=0)
    """Seconds after which a dead serving worker's requests are another's."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where served models run; auto: on a GPU if there is one."""

    compile_models: bool = False
    """Serve torch modules through torch.compile."""

    matmul_dir: Path | None = None
    """Where matmul jobs' files are, operands and products, and the only place where they may be; a folder that all
    workers see. Unset: `matmul` in the data directory."""

    matmul_memory: int | None = Field(default=None, ge=1 << 20)
    """Bytes of matrices that a matmul worker holds at most; a product that takes more is computed in tiles. Unset: a
    quarter of the memory that is free when it starts."""

    matmul_threads: int = Field(default=1, ge=1)
    """Threads of a matmul worker's CPU kernels."""

    matmul_lease: float = Field(default=10.0, gt=0)
    """Seconds after which a dead matmul worker's jobs and tiles are another's."""

    matmul_keep: float = Field(default=86400.0, gt=0)
    """Seconds after which products in files are deleted."""

    gateway_inflight: int = Field(default=512, ge=1)
    """Predictions a gateway process has under way at most; more are answered 429 at once."""

    gateway_inflight_bytes: int = Field(default=256 << 20, ge=1)
    """The same in bytes of their inputs."""

    gateway_wait: float = Field(default=5.0, gt=0)
    """Seconds a prediction may be expected to wait for its turn; beyond that new ones are answered 429."""

    gateway_slowdown: float = Field(default=2.0, ge=0)
    """In an overload new predictions are answered 429 unless they will take at most so many times what one takes alone;
    0: only gateway_wait bounds how long they wait."""

    gateway_patience: float = Field(default=10.0, gt=0)
    """Seconds a client may take over the head of a request, and over a prediction's body."""

    gateway_deadline: float = Field(default=10.0, gt=0)
    """Seconds for a prediction whose request names no deadline (header `x-deadline`, seconds)."""

    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"

    @property
    def matmul_folder(self) -> Path:
        return self.matmul_dir or self.data_dir / "matmul"

    @field_validator("redis_url")
    @classmethod
    def _checked_url(cls, url: str) -> str:
        return check_url(url)

    @field_validator("token")
    @classmethod
    def _fits_a_header(cls, token: SecretStr | None) -> SecretStr | None:
        text = token.get_secret_value() if token else ""
        if not (text.isascii() and text.isprintable()) or text != text.strip():
            raise ValueError("has characters that headers and cookies cannot carry; use letters, digits and -._~")
        return token

    @field_validator("log_level", mode="before")
    @classmethod
    def _any_case(cls, level: object) -> object:
        return level.upper() if isinstance(level, str) else level

    def __repr_args__(self) -> Iterator[tuple[str | None, Any]]:
        for name, value in super().__repr_args__():
            yield name, redact(value) if name == "redis_url" else value


@cache
def settings() -> Settings:
    """The process's settings, read once (`settings.cache_clear()` makes the next call read again).

    Raises ConfigurationError, naming each variable with a bad value, or a `.env` that is no text.
    """
    try:
        return Settings()
    except ValidationError as error:
        raise ConfigurationError(_explain(error)) from None  # the cause would show the values, secrets among them
    except UnicodeDecodeError as error:
        file, where = Path(_FILE).absolute(), f"{error.reason} at byte {error.start}"
        raise ConfigurationError(f"{file} is not UTF-8 text: {where}") from None


def check_url(url: str) -> str:
    """Return `url`, or raise a ValueError that shows nothing of it: where one is mistyped, there may be a password."""
    if not url.startswith(_SCHEMES):
        raise ValueError(f"not a URL that begins with one of {', '.join(_SCHEMES)}")
    parts = urlsplit(url)
    try:
        _ = parts.port
    except ValueError:
        raise ValueError("its port is no number up to 65535") from None
    database = parts.path.strip("/")
    if parts.scheme in ("redis", "rediss") and database and not database.isdecimal():  # redis-py takes 0 for it
        raise ValueError("its database, behind the port, is no number")
    return url


def redact(url: str) -> str:
    """`url` without its password, whether it stands before the host or in the query: for logs and messages."""
    url = re.sub(r"(?<=://)([^:@/?#]*):.*@", r"\1:***@", url)
    return re.sub(r"([?&][^=&#]*(?:password|token|secret)[^=&#]*=)[^&#]*", r"\1***", url, flags=re.IGNORECASE)


def _explain(error: ValidationError) -> str:
    found = ((str(one["loc"][0]), one["msg"].removeprefix("Value error, ")) for one in error.errors(include_url=False))
    return "; ".join(f"{_variable(location)}: {reason}" for location, reason in found)


def _variable(location: str) -> str:
    """pydantic locates an aliased field by its alias, which is the variable, and others by the field's name."""
    return location if location.isupper() else (_PREFIX + location).upper()
