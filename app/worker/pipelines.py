"""The pipeline that a worker keeps in memory, with its classifier and second moments."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import UUID

import structlog

import editing
from app.db.engine import Sessions
from app.db.models import Model
from app.models.snapshot import snapshot
from app.observability.metrics import STAGE_SECONDS
from app.settings import Settings
from app.storage.store import Store
from app.worker.sources import open_classifier
from editing.errors import UnsupportedPipeline

if TYPE_CHECKING:
    from editing.encoders.base import TextEncoder
    from editing.evaluation.classifiers import Classifier
    from editing.pipelines import EditablePipeline
    from editing.second_moments.factors import FactoredMoments

log = structlog.get_logger()


class WarmPipeline:
    """Loads a model's pipeline from the store on first use, and keeps it until another model is needed."""

    def __init__(self, store: Store, settings: Settings, sessions: Sessions) -> None:
        self.store = store
        self.settings = settings
        self.sessions = sessions
        self._digest: str | None = None
        self._classifier: tuple[str, Classifier] | None = None
        self._pipeline: EditablePipeline | None = None
        self._statistics: tuple[str, Path] | None = None
        self._moments: dict[str, FactoredMoments] = {}

    def get(self, model_id: UUID) -> "EditablePipeline":
        """Return the pipeline of a ready model, on the worker's device. Do not change its weights."""
        files = self._select(model_id)
        if self._pipeline is None:
            with STAGE_SECONDS.labels("loading").time():
                self._pipeline = editing.load_pipeline(self._link(files), device=self.prepare())
            log.info("pipeline loaded", digest=self._digest)
        return self._pipeline

    def load_encoders(self, model_id: UUID, last_layers: Mapping[str, int]) -> Iterator["TextEncoder"]:
        """Yield the text encoders of a ready model. If its pipeline is not in memory, each is loaded for the caller.

        It is loaded up to its last layer of these, and cannot encode prompts.
        """
        files = self._select(model_id)
        if self._pipeline is not None:
            yield from self._pipeline.encoders
            return
        for name, layer in last_layers.items():
            with STAGE_SECONDS.labels("loading").time():
                encoder = editing.load_encoder(self._link(files), name, device=self.prepare(), last_layer=layer)
            yield encoder

    def _select(self, model_id: UUID) -> list[tuple[str, str]]:
        """Return the path and the sha256 of each file of a ready model, and drop the pipeline of any other."""
        with self.sessions() as session:
            model = session.get_one(Model, model_id)
            files = [(file.path, file.sha256) for file in model.files]
        if model.digest is None:
            raise UnsupportedPipeline(f"the model {model.name} is {model.state}, not ready")
        if self._digest != model.digest:  # two may not fit
            self._digest, self._pipeline = model.digest, None
        return files

    def _link(self, files: list[tuple[str, str]]) -> Path:
        return snapshot(self.store, files, folder=self.settings.data_dir)

    def classifier(self, model_id: UUID) -> "Classifier | None":
        """Return the model's classifier, kept until another is needed. Raises `ClassifierUnusable`."""
        with self.sessions() as session:
            source = session.get_one(Model, model_id).classifier
        if source is None:
            return None
        if self._classifier is None or self._classifier[0] != source:
            self._classifier = (source, open_classifier(source, roots=self.settings.model_roots, device=self.prepare()))
        return self._classifier[1]

    def moments(self, statistics: str, *, encoder: str) -> "FactoredMoments":
        """Return the second moments in the blob of this sha256, checked against it once. Their factors lie beside."""
        if self._statistics is None or self._statistics[0] != statistics:
            self._statistics, self._moments = (statistics, self.store.fetch(statistics)), {}
        if encoder not in self._moments:
            self._moments[encoder] = editing.FactoredMoments(
                self._statistics[1], encoder=encoder, folder=self.store.folder / "factors", digest=statistics
            )
        return self._moments[encoder]

    def prepare(self) -> str:
        """Import all that the work needs, which takes seconds; returns the device that is meant.

        Done before the first claim, since an import can keep the other threads, and so the heartbeat, from running.
        """
        import diffusers.utils.logging
        import torch
        import transformers.utils.logging

        diffusers.utils.logging.disable_progress_bar()
        transformers.utils.logging.disable_progress_bar()
        if self.settings.torch_threads is not None:
            torch.set_num_threads(self.settings.torch_threads)
        available = "cuda" if torch.cuda.is_available() else "cpu"
        return available if self.settings.device == "auto" else self.settings.device
