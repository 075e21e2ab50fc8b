"""The settings of the service. Nothing else reads the environment."""

import re
from functools import lru_cache
from ipaddress import IPv4Network, IPv6Network
from pathlib import Path
from typing import Annotated, Literal

from limits.util import parse_many
from pydantic import AfterValidator, BeforeValidator, Field, SecretStr
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from emender.schemas.names import Name

SECRETS = Path("/run/secrets")  # where container engines mount them
OFF = "off"
BUCKET = r"s3://[a-z0-9][a-z0-9.-]{1,61}[a-z0-9](/[A-Za-z0-9._-]+)*/?"


def _check_rate(text: str) -> str:
    if text == OFF:
        return text
    try:
        (limit,) = parse_many(text)
    except ValueError:
        limit = None
    if limit is None or limit.amount < 1:
        raise ValueError(f"{text!r} is not a rate: write a number per period, such as 600/minute or 100/second, or off")
    return text


def _split_roots(value: object) -> object:
    return tuple(Path(root) for root in value.split(":") if root) if isinstance(value, str) else value


def _split_networks(value: object) -> object:
    return tuple(filter(None, map(str.strip, value.split(",")))) if isinstance(value, str) else value


def _parse_store(value: object) -> object:
    if not isinstance(value, str):
        return value
    if "://" not in value:
        return Path(value)
    if not re.fullmatch(BUCKET, value):
        raise ValueError("Give a folder, or a bucket as s3://bucket/prefix.")
    return value


Rate = Annotated[str, AfterValidator(_check_rate)]
Roots = Annotated[tuple[Path, ...], NoDecode, BeforeValidator(_split_roots)]
Networks = Annotated[tuple[IPv4Network | IPv6Network, ...], NoDecode, BeforeValidator(_split_networks)]
StoreLocation = Annotated[Path | str | None, BeforeValidator(_parse_store)]


class Settings(BaseSettings):
    """Settings read from variables named `EMENDER_<FIELD>`, for example `EMENDER_DATABASE_URL`."""

    model_config = SettingsConfigDict(env_prefix="EMENDER_", extra="ignore", hide_input_in_errors=True)

    database_url: SecretStr | None = Field(
        None, description="URL of Postgres, as postgresql://…. Unset: `emender serve --embedded` starts one."
    )
    redis_url: SecretStr | None = Field(
        None, description="URL of Redis, as redis://…. Unset: workers poll Postgres and rate limits are per process."
    )
    data_dir: Path = Field(Path("var"), description="Directory of the embedded Postgres, the local store and caches.")
    store: StoreLocation = Field(
        None, description="Content-addressed store: a directory or s3://bucket/prefix. Unset: <data_dir>/store."
    )
    s3_endpoint: str | None = Field(None, description="Endpoint of an S3-compatible service. Unset: Amazon S3.")
    s3_region: str | None = Field(None, description="Region of the bucket. Unset: AWS_REGION, else us-east-1.")
    s3_access_key_id: SecretStr | None = Field(
        None, description="Access key of the bucket. Unset: the credentials that AWS tools find."
    )
    s3_secret_access_key: SecretStr | None = Field(None, description="Secret of the access key.")
    presigned_urls: bool = Field(
        True, description="Redirect clients to the bucket for large files. Disable it if they cannot reach the bucket."
    )
    presigned_min_bytes: int = Field(2**20, ge=0, description="Size from which files are served by presigned URL.")
    store_cache_bytes: int = Field(
        50 * 2**30, ge=0, description="Size of the local cache of a bucket's blobs in <data_dir>/store."
    )

    host: str = Field("127.0.0.1", description="Address that the API listens on.")
    port: int = Field(8000, description="Port that the API listens on.")
    api_processes: int = Field(1, ge=1, description="Number of API processes that `emender serve` starts.")
    namespace: Name = Field("emender", description="Hub namespace of models that are registered without one.")
    model_roots: Roots = Field(
        (), description="Directories, separated by ':', whose direct subdirectories can be registered as models."
    )

    webhook_secret_key: SecretStr | None = Field(
        None,
        min_length=32,
        description="Random key from which the signing secrets of webhooks are derived. Unset: webhooks are disabled.",
    )
    webhook_allowed_networks: Networks = Field(
        (),
        description="Networks in CIDR notation, separated by ',', that webhooks may call in addition to public "
        "addresses. Plain http is allowed in them.",
    )

    lease_seconds: float = Field(30.0, gt=0, description="Time without renewal after which a job's lease expires.")
    max_attempts: int = Field(5, ge=1, description="Number of attempts before a job is marked failed.")
    poll_interval_seconds: float = Field(
        1.0, gt=0, description="Interval in which idle workers and the sweeper read Postgres."
    )
    edit_batch_size: int = Field(16, ge=1, description="Number of edits that a worker optimizes at once.")
    torch_threads: int | None = Field(None, ge=1, description="CPU threads of a worker's torch. Unset: torch decides.")
    device: str = Field("auto", description="Torch device of the worker: auto, cpu, cuda, cuda:1, …")

    signing_key_file: Path | Literal["none"] | None = Field(
        None, description="Private key (PEM) that the worker signs checkpoints with. `none`: not signed."
    )

    metrics_port: int | None = Field(
        None, ge=1, le=65535, description="Port of the worker's metrics endpoint. Unset: disabled."
    )

    max_body_bytes: int = Field(32 * 2**20, description="Maximum size of a JSON or NDJSON body.")
    body_timeout_seconds: float = Field(
        20.0, gt=0, description="Time that a client has to send a body. Each 16 KiB received add one second."
    )
    max_image_bytes: int = Field(20 * 10**6, description="Maximum file size of a reference image.")
    max_image_pixels: int = Field(
        40 * 10**6, description="Maximum width times height of a reference image, checked before decoding."
    )

    rate_limit: Rate = Field(
        "12000/minute", description="Maximum rate of requests per API key, or per address without a valid key."
    )
    failed_auth_rate_limit: Rate = Field(
        "30/minute", description="Maximum rate of requests with invalid API keys per address."
    )

    @property
    def store_dir(self) -> Path:
        """Directory of the blobs, or of the cache of a bucket's blobs."""
        return self.store if isinstance(self.store, Path) else self.data_dir / "store"


@lru_cache
def get_settings() -> Settings:
    """Read the settings once from the environment and from files such as `/run/secrets/emender_database_url`."""
    return Settings(_secrets_dir=SECRETS if SECRETS.is_dir() else None)
