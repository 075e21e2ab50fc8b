from tests.app.checkpoints.conftest import base_folder, service

__all__ = ["base_folder", "service"]
