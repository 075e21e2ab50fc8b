"""Previews and evaluations of checkpoints."""

from collections.abc import AsyncIterator, Sequence
from pathlib import Path

from emender._async.connection import Connection
from emender.pictures import Picture, Pictures, is_picture
from emender.requests import Id, OnStatus, drop_none, file_path, url_path
from emender.schemas.common import WorkStatus
from emender.schemas.evaluations import EvaluationKind, EvaluationOut


class Evaluations:
    """Previews, checks and evaluations of checkpoints."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    async def create_preview(
        self,
        model: str,
        version: str,
        *,
        prompts: Sequence[str] | None = None,
        controls: Sequence[str] | None = None,
        seeds: Sequence[int] | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
    ) -> EvaluationOut:
        """Draw prompts with the base model and with a checkpoint, at the same seeds. Fields: `PreviewCreate`."""
        body = drop_none(
            prompts=prompts,
            controls=controls,
            seeds=seeds,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
        )
        path = url_path("models", model, "checkpoints", version, "previews")
        return await self._connection.post(path, EvaluationOut, json=body)

    async def create(
        self,
        model: str,
        version: str,
        *,
        prompts: Sequence[str] | None = None,
        held_out: Sequence[str] | None = None,
        held_out_prompts: Sequence[str] | None = None,
        scales: Sequence[int] | None = None,
        seed: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
    ) -> EvaluationOut:
        """Measure the edits of a checkpoint with the model's classifier. Fields: `EvaluationCreate`."""
        body = drop_none(
            prompts=prompts,
            held_out=held_out,
            held_out_prompts=held_out_prompts,
            scales=scales,
            seed=seed,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
        )
        return await self._connection.post(_evaluation_path(model, version), EvaluationOut, json=body)

    def list(self, model: str, version: str, *, kind: EvaluationKind | None = None) -> AsyncIterator[EvaluationOut]:
        """List the previews, checks and evaluations of a checkpoint, newest first."""
        return self._connection.pages(_evaluation_path(model, version), EvaluationOut, kind=kind)

    async def get(self, model: str, version: str, evaluation_id: Id, *, wait: int | None = None) -> EvaluationOut:
        """Read an evaluation. `wait`: seconds to wait for its end, at most 60."""
        return await self._connection.get(_evaluation_path(model, version, evaluation_id), EvaluationOut, wait=wait)

    def events(self, model: str, version: str, evaluation_id: Id) -> AsyncIterator[WorkStatus]:
        """Follow an evaluation: its status at each change, until it has ended."""
        return self._connection.events(_evaluation_path(model, version, evaluation_id))

    async def wait(
        self,
        model: str,
        version: str,
        evaluation_id: Id,
        *,
        on_status: OnStatus | None = None,
        progress: bool = False,
        timeout: float | None = None,
    ) -> EvaluationOut:
        """Wait until an evaluation is ready. Raises `WorkFailed`, and `WaitTimeout` after `timeout` seconds."""
        return await self._connection.wait(
            _evaluation_path(model, version, evaluation_id),
            EvaluationOut,
            label=f"evaluation of {version}",
            on_status=on_status,
            progress=progress,
            timeout=timeout,
        )

    async def pictures(self, model: str, version: str, evaluation_id: Id) -> Pictures:
        """Download the pictures of a preview or an evaluation. A notebook shows their thumbnails."""
        evaluation = await self.get(model, version, evaluation_id)
        folder = _evaluation_path(model, version, evaluation_id, "files")
        pictures = []
        for file in evaluation.files:
            if is_picture(file.path):
                content = await self._connection.read_file(file_path(folder, file.path))
                pictures.append(Picture(file.path, content))
        return Pictures(pictures)

    async def download(self, model: str, version: str, evaluation_id: Id, name: str, to: Path) -> Path:
        """Download a picture or a report and verify its sha256."""
        folder = _evaluation_path(model, version, evaluation_id, "files")
        return await self._connection.download(file_path(folder, name), to)

    async def cancel(self, model: str, version: str, evaluation_id: Id) -> EvaluationOut:
        """Cancel an evaluation: at once if it is queued, else at the next picture."""
        return await self._connection.post(_evaluation_path(model, version, evaluation_id, "cancel"), EvaluationOut)


def _evaluation_path(model: str, version: str, *names: object) -> str:
    return url_path("models", model, "checkpoints", version, "evaluations", *names)
