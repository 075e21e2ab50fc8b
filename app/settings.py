"""Every setting of the service, in one class. Nothing else reads the environment."""

import re
from functools import lru_cache
from ipaddress import IPv4Network, IPv6Network
from pathlib import Path
from typing import Annotated, Literal

from limits.util import parse_many
from pydantic import AfterValidator, Field, SecretStr, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from emender.schemas.names import Name

SECRETS = Path("/run/secrets")  # where container engines mount them
OFF = "off"


def _rate(text: str) -> str:
    if text == OFF:
        return text
    try:
        (limit,) = parse_many(text)
    except ValueError:
        limit = None
    if limit is None or limit.amount < 1:
        raise ValueError(f"{text!r} is no limit: write a number per period, such as 600/minute or 100/second, or off")
    return text


Rate = Annotated[str, AfterValidator(_rate)]


class Settings(BaseSettings):
    """Read from variables named `EMENDER_<FIELD>`, for example `EMENDER_DATABASE_URL`."""

    model_config = SettingsConfigDict(env_prefix="EMENDER_", extra="ignore", hide_input_in_errors=True)

    database_url: SecretStr | None = Field(None, description="postgresql://… ; none: `--embedded` starts one")
    redis_url: SecretStr | None = Field(None, description="redis://… ; none: workers poll Postgres")
    folder: Path = Field(Path("var"), description="where the embedded database and the local store keep their files")
    store: Path | str | None = Field(
        None, description="the content-addressed store: a folder, or s3://bucket/prefix; default: <folder>/store"
    )
    s3_endpoint: str | None = Field(None, description="https://…, of a bucket that is not Amazon's")
    s3_region: str | None = Field(None, description="default: AWS_REGION, else us-east-1")
    s3_access_key_id: SecretStr | None = Field(None, description="default: as AWS's tools find their credentials")
    s3_secret_access_key: SecretStr | None = Field(None, description="that of the access key")
    signed_urls: bool = Field(True, description="large files come from the bucket; false: clients cannot reach it")
    signed_from_bytes: int = Field(2**20, ge=0, description="smaller files are always sent by the service itself")
    store_cache_bytes: int = Field(50 * 2**30, ge=0, description="what is kept in <folder>/store of a bucket's blobs")

    host: str = Field("127.0.0.1", description="the address that the API listens at")
    port: int = Field(8000, description="and its port")
    url: str | None = Field(None, description="where the commands find the service; default: host and port")
    api_key: SecretStr | None = Field(None, description="the commands' key; default: that in <folder>/admin-key")
    namespace: Name = Field("emender", description="the hub namespace of models registered without one")
    model_roots: Annotated[tuple[Path, ...], NoDecode] = Field(
        (), description="folders, separated by ':', whose direct subfolders may be registered as models"
    )

    webhook_key: SecretStr | None = Field(
        None, min_length=32, description="random; the secrets that sign webhooks are derived from it; none: no webhooks"
    )
    webhook_networks: Annotated[tuple[IPv4Network | IPv6Network, ...], NoDecode] = Field(
        (), description="CIDRs, separated by ',', in which webhooks may call besides public addresses, also by http"
    )

    lease_seconds: float = Field(30.0, gt=0, description="a job whose lease is not renewed for so long is requeued")
    max_attempts: int = Field(5, ge=1, description="a job that lost its lease so often has failed")
    poll_seconds: float = Field(1.0, gt=0, description="how often an idle worker and the sweeper look at Postgres")
    batch_size: int = Field(16, ge=1, description="edits that a worker optimises at once")
    torch_threads: int | None = Field(None, ge=1, description="CPU threads of a worker's torch; none: torch decides")
    device: str = Field("auto", description="torch device of the worker: auto, cpu, cuda, cuda:1, …")

    signing_key_file: Path | Literal["none"] | None = Field(
        None, description="the worker's private key (PEM) that versions are signed with; `none`: they are not signed"
    )

    metrics_port: int | None = Field(
        None, ge=1, le=65535, description="where a worker answers Prometheus, at EMENDER_HOST; none: nowhere"
    )

    max_body_bytes: int = Field(32 * 2**20, description="largest JSON or NDJSON body")
    body_seconds: float = Field(20.0, gt=0, description="a body must come within these, or faster than 16 KiB/s")
    max_image_bytes: int = Field(20 * 10**6, description="largest file of a reference image")
    max_image_pixels: int = Field(40 * 10**6, description="largest width times height of one, asked before decoding")

    rate_limit: Rate = Field("12000/minute", description="requests of one key, or of one address without a valid key")
    wrong_key_limit: Rate = Field("30/minute", description="requests of one address with wrong keys")

    @field_validator("model_roots", mode="before")
    @classmethod
    def split_roots(cls, value: object) -> object:
        return tuple(Path(root) for root in value.split(":") if root) if isinstance(value, str) else value

    @field_validator("store", mode="before")
    @classmethod
    def tell_store(cls, value: object) -> object:
        if not isinstance(value, str):
            return value
        if "://" not in value:
            return Path(value)
        if not re.fullmatch(r"s3://[a-z0-9][a-z0-9.-]{1,61}[a-z0-9](/[A-Za-z0-9._-]+)*/?", value):
            raise ValueError("Give a folder, or a bucket as s3://bucket/prefix.")
        return value

    @field_validator("webhook_networks", mode="before")
    @classmethod
    def split_networks(cls, value: object) -> object:
        return tuple(filter(None, map(str.strip, value.split(",")))) if isinstance(value, str) else value

    @property
    def store_folder(self) -> Path:
        """Where the blobs lie; beside a bucket, where those lie that were fetched."""
        return self.store if isinstance(self.store, Path) else self.folder / "store"


@lru_cache
def get_settings() -> Settings:
    """The process's settings, read once: the environment, else files such as `/run/secrets/emender_database_url`."""
    return Settings(_secrets_dir=SECRETS if SECRETS.is_dir() else None)
