"""The content-addressed store: blobs by sha256, in a folder or in a bucket."""

from typing import TYPE_CHECKING

from app.settings import Settings
from app.storage.local import LocalStore
from app.storage.s3 import S3Store
from app.storage.store import Store

if TYPE_CHECKING:
    from obstore.store import S3Config


def open_store(settings: Settings) -> Store:
    """Create the store that `EMENDER_STORE` names: a bucket for an s3:// URL, else a folder. Connects on first use."""
    if not isinstance(settings.store, str):
        return LocalStore(settings.store_dir)
    config: S3Config = {}
    if settings.s3_endpoint is not None:
        config["endpoint"] = settings.s3_endpoint
    if settings.s3_region is not None:
        config["region"] = settings.s3_region
    if settings.s3_access_key_id is not None and settings.s3_secret_access_key is not None:
        config["access_key_id"] = settings.s3_access_key_id.get_secret_value()
        config["secret_access_key"] = settings.s3_secret_access_key.get_secret_value()
    return S3Store(
        settings.store,
        folder=settings.store_dir,
        config=config,
        presigned_min_bytes=settings.presigned_min_bytes if settings.presigned_urls else None,
        cache_bytes=settings.store_cache_bytes,
    )
