"""Every setting of the service, in one class. Nothing else reads the environment."""

from functools import lru_cache
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, SecretStr, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

SECRETS = Path("/run/secrets")  # where container engines mount them


class Settings(BaseSettings):
    """Read from variables named `EMENDER_<FIELD>`, for example `EMENDER_DATABASE_URL`."""

    model_config = SettingsConfigDict(env_prefix="EMENDER_", extra="ignore")

    database_url: SecretStr | None = Field(None, description="postgresql://… ; none: `--embedded` starts one")
    redis_url: SecretStr | None = Field(None, description="redis://… ; none: workers poll Postgres")
    folder: Path = Field(Path("var"), description="where the embedded database and the local store keep their files")
    store: Path | None = Field(None, description="folder of the content-addressed store; default: <folder>/store")

    host: str = "127.0.0.1"
    port: int = 8000
    url: str | None = Field(None, description="where the commands find the service; default: host and port")
    api_key: SecretStr | None = Field(None, description="the commands' key; default: that in <folder>/admin-key")
    namespace: str = Field("emender", description="the hub namespace of models registered without one")
    model_roots: Annotated[tuple[Path, ...], NoDecode] = Field(
        (), description="folders, separated by ':', whose direct subfolders may be registered as models"
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

    max_body_bytes: int = Field(32 * 2**20, description="largest JSON or NDJSON body")
    max_image_bytes: int = 20 * 10**6
    max_image_pixels: int = 40 * 10**6

    @field_validator("model_roots", mode="before")
    @classmethod
    def split_roots(cls, value: object) -> object:
        return tuple(Path(root) for root in value.split(":") if root) if isinstance(value, str) else value

    @property
    def store_folder(self) -> Path:
        return self.store if self.store is not None else self.folder / "store"


@lru_cache
def get_settings() -> Settings:
    """The process's settings, read once: the environment, else files such as `/run/secrets/emender_database_url`."""
    return Settings(_secrets_dir=SECRETS if SECRETS.is_dir() else None)
