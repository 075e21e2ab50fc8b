"""The service's fixtures, on a database that commits."""

from tests.app.conftest import live_keys, settings, store

__all__ = ["live_keys", "settings", "store"]
