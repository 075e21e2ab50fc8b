"""The content-addressed store: blobs by sha256, in a folder or in a bucket."""

from app.settings import Settings
from app.storage.local import LocalStore
from app.storage.s3 import S3Store
from app.storage.store import Store


def open_store(settings: Settings) -> Store:
    """Create the store that `EMENDER_STORE` names: a bucket for an s3:// URL, else a folder. Connects on first use."""
    if not isinstance(settings.store, str):
        return LocalStore(settings.store_dir)
    return S3Store(
        settings.store,
        folder=settings.store_dir,
        endpoint=settings.s3_endpoint,
        region=settings.s3_region,
        access_key_id=settings.s3_access_key_id,
        secret_access_key=settings.s3_secret_access_key,
        signed_from=settings.presigned_min_bytes if settings.presigned_urls else None,
        cache_bytes=settings.store_cache_bytes,
    )
