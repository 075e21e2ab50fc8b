"""Where a model's files come from: a folder of the model roots, or the Hugging Face Hub."""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import structlog
from huggingface_hub import CardData, HfApi, ModelInfo, RepoCard, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from pydantic import ValidationError
from yaml import YAMLError

from app.models.roots import find_folder, find_outside_link
from app.settings import Settings
from editing.errors import ClassifierUnusable, EditingError, UnsupportedPipeline
from editing.families.layout import list_components, select_files
from editing.inspection.folder import check_folder
from emender.schemas.models import License

if TYPE_CHECKING:
    from editing.evaluation.classifiers import Classifier

log = structlog.get_logger()

INDEX = "model_index.json"


class SourceUnavailable(EditingError):
    """The model's files could not be had; the detail says from where and why."""


@dataclass(frozen=True)
class Source:
    """A pipeline's files on this machine."""

    folder: Path
    commit: str | None
    """The Hub's commit; none for a folder of the model roots."""
    license: License | None
    """What the model card's metadata says; none where it says nothing, or more than one."""


@contextmanager
def obtain(
    source: str, *, revision: str | None, settings: Settings, progress: Callable[[int, int], None]
) -> Iterator[Source]:
    """Yield the files of `source`, kept until the block ends: `namespace/name` on the Hub, else a folder's bare name.

    From the Hub come configurations and safetensors, at one commit; never a pickle, never code. `progress` is called
    with the files had and the files wanted, and may raise. Raises `SourceUnavailable` or `UnsafePipeline`.
    """
    if "/" not in source:
        folder = find_folder(settings.model_roots, source)
        if folder is None:
            raise SourceUnavailable(
                f"no folder {source!r} directly in one of the model roots; EMENDER_MODEL_ROOTS lists them",
                pointer="/source",
            )
        if (link := find_outside_link(settings.model_roots, folder)) is not None:
            raise SourceUnavailable(
                f"{link.relative_to(folder)} in the folder {source!r} is a link out of the model roots; put the file "
                "there, or add where it leads to EMENDER_MODEL_ROOTS",
                pointer="/source",
            )
        check_folder(folder)
        yield Source(folder, commit=None, license=_license(_card(folder)))
        return
    settings.data_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=settings.data_dir, prefix="download-") as temporary:
        try:
            information = _download(source, revision=revision, folder=Path(temporary), progress=progress)
        except LocalEntryNotFoundError as error:
            raise SourceUnavailable(f"the Hub does not answer for {source}; retry", pointer="/source") from error
        except HfHubHTTPError as error:
            raise SourceUnavailable(f"the Hub refused {source}: {_reason(error)}", pointer="/source") from error
        except (EditingError, OSError):
            raise
        except Exception as error:  # of whichever HTTP client this version of huggingface_hub uses
            reason = f"the Hub could not be reached for {source}: {type(error).__name__}; retry"
            raise SourceUnavailable(reason, pointer="/source") from error
        yield Source(Path(temporary), commit=information.sha, license=_license(information.card_data))


def open_classifier(source: str, *, roots: Sequence[Path], device: str) -> "Classifier":
    """Open a classifier: installed, else a folder of the model roots, else of the Hub by `namespace/name`.

    Raises `ClassifierUnusable`.
    """
    from editing.evaluation import classifiers  # imports torch

    if source in classifiers.list_classifiers():
        return classifiers.open_classifier(source)
    if "/" in source:
        return classifiers.HuggingFaceClassifier.load(source, device=device)
    folder = find_folder(roots, source)
    if folder is None:
        installed = ", ".join(classifiers.list_classifiers()) or "none"
        raise ClassifierUnusable(
            f"there is no classifier {source!r}: installed are {installed}, and no model root has a folder of that "
            "name; EMENDER_MODEL_ROOTS lists them",
            pointer="/classifier",
        )
    if (link := find_outside_link(roots, folder)) is not None:
        raise ClassifierUnusable(
            f"{link.relative_to(folder)} in the folder {source!r} is a link out of the model roots",
            pointer="/classifier",
        )
    return classifiers.HuggingFaceClassifier.load(folder, device=device)


def _download(source: str, *, revision: str | None, folder: Path, progress: Callable[[int, int], None]) -> ModelInfo:
    information = HfApi().model_info(source, revision=revision)
    names = select_files([sibling.rfilename for sibling in information.siblings or []])
    if INDEX not in names:
        raise UnsupportedPipeline(f"{source} has no {INDEX}: it is no pipeline of diffusers", pointer="/source")
    download = partial(hf_hub_download, source, revision=information.sha, local_dir=folder)
    progress(0, len(names))
    download(INDEX)
    components = {"", *list_components(folder)}  # raises for a class that is not supported, before gigabytes come
    others = [name for name in names if name != INDEX and name.rpartition("/")[0] in components]
    for done, name in enumerate(others, start=1):
        progress(done, len(others) + 1)
        download(name)
    return information


def _card(folder: Path) -> CardData | None:
    """Return the metadata of the folder's README.md, if it can be read."""
    try:
        return RepoCard((folder / "README.md").read_text(encoding="utf-8-sig"), ignore_metadata_errors=True).data
    except FileNotFoundError:
        return None
    except (ValueError, YAMLError) as error:
        log.warning("the model card cannot be read", source=folder.name, error=type(error).__name__)
        return None


def _license(card: CardData | None) -> License | None:
    if card is None or card.get("license") is None:
        return None
    try:
        return License(id=card.get("license"), name=card.get("license_name"), link=card.get("license_link"))
    except ValidationError:
        log.warning("the model card names no license that is understood; give it when the model is registered")
        return None


def _reason(error: HfHubHTTPError) -> str:
    status = error.response.status_code if error.response is not None else "no"
    return {401: "it is private or does not exist", 403: "access is not granted", 404: "there is no such revision"}.get(
        status, f"HTTP status {status}"
    )
