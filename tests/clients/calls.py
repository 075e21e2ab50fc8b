"""Run every call of a Hub client, in an environment without our code: `python calls.py FACTS`, both in JSON.

Prints `null` for each call that passed, else its traceback.
"""

import hashlib
import importlib.util
import json
import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

FACTS: dict[str, Any] = json.loads(sys.argv[1])
REPO, WEIGHTS = FACTS["repo"], "text_encoder/model.safetensors"
os.environ["HF_ENDPOINT"] = FACTS["endpoint"]
os.environ["HF_TOKEN"] = FACTS["token"]
os.environ["HF_HOME"] = tempfile.mkdtemp()

import huggingface_hub  # noqa: E402
from huggingface_hub import HfApi, get_hf_file_metadata, hf_hub_download, hf_hub_url, snapshot_download  # noqa: E402
from huggingface_hub.errors import (  # noqa: E402
    EntryNotFoundError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

API = HfApi()
CALLS: dict[str, Callable[[], None]] = {}


def call(name: str) -> Callable[[Callable[[], None]], Callable[[], None]]:
    def add(function: Callable[[], None]) -> Callable[[], None]:
        CALLS[name] = function
        return function

    return add


def sha256(path: Any) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def expect(found: Any, wanted: Any) -> None:
    if found != wanted:
        raise AssertionError(f"{found!r}, expected {wanted!r}")


@call("hf_hub_download")
def download() -> None:
    for revision in ("v1", "v2", "production", *FACTS["commits"].values()):
        version = {"production": "v1"}.get(revision, revision)
        version = next((name for name, commit in FACTS["commits"].items() if commit == version), version)
        found = hf_hub_download(REPO, WEIGHTS, revision=revision)
        expect(sha256(found), FACTS["weights"][version])
        expect(Path(found).parts[-3], FACTS["commits"][version])


@call("get_hf_file_metadata")
def metadata() -> None:
    found = get_hf_file_metadata(hf_hub_url(REPO, WEIGHTS, revision="production"))
    expect((found.commit_hash, found.etag), (FACTS["commits"]["v1"], FACTS["weights"]["v1"]))


@call("snapshot_download")
def snapshot() -> None:
    expect(Path(snapshot_download(REPO, revision="v2")).name, FACTS["commits"]["v2"])


@call("snapshot_download(endpoint=, local_dir=)")
def snapshot_elsewhere() -> None:
    folder = tempfile.mkdtemp()
    snapshot_download(REPO, revision="production", local_dir=folder, endpoint=FACTS["endpoint"])
    for path, digest in FACTS["files"].items():
        expect((path, sha256(Path(folder, path))), (path, digest))


@call("model_info")
def model_info() -> None:
    found = API.model_info(REPO, revision="v2", files_metadata=True)
    expect((found.sha, found.library_name), (FACTS["commits"]["v2"], "diffusers"))
    sizes = {file.rfilename: file.lfs for file in found.siblings or []}
    expect(getattr(sizes[WEIGHTS], "sha256", None) or dict(sizes[WEIGHTS] or {})["sha256"], FACTS["weights"]["v2"])


@call("list_repo_tree")
def tree() -> None:
    found = list(API.list_repo_tree(REPO, revision="production", recursive=True, expand=True))
    files = {entry.path for entry in found if hasattr(entry, "size") and hasattr(entry, "lfs")}
    expect(files, set(FACTS["files"]))


@call("get_paths_info")
def paths_info() -> None:
    (found,) = API.get_paths_info(REPO, [WEIGHTS, "none.txt"], revision="v1")
    expect(found.path, WEIGHTS)


@call("list_repo_files")
def files() -> None:
    expect(set(API.list_repo_files(REPO, revision="production")), set(FACTS["files"]))


@call("list_repo_refs")
def refs() -> None:
    found = API.list_repo_refs(REPO)
    expect({tag.name: tag.target_commit for tag in found.tags}, FACTS["commits"])
    expect({branch.name for branch in found.branches}, {"main", "production"})


@call("file_exists, revision_exists, repo_exists")
def exists() -> None:
    expect([API.file_exists(REPO, path) for path in (WEIGHTS, "none.txt")], [True, False])
    expect([API.revision_exists(REPO, revision) for revision in ("v1", "v9")], [True, False])
    expect([API.repo_exists(repo) for repo in (REPO, "emender/missing")], [True, False])


@call("whoami, auth_check")
def whoami() -> None:
    expect(API.whoami()["fullname"], FACTS["key_name"])
    API.auth_check(REPO)


@call("errors")
def errors() -> None:
    wanted: list[tuple[type[Exception], Callable[[], object]]] = [
        (RepositoryNotFoundError, lambda: hf_hub_download("emender/missing", "x")),
        (RevisionNotFoundError, lambda: hf_hub_download(REPO, WEIGHTS, revision="v9")),
        (EntryNotFoundError, lambda: hf_hub_download(REPO, "none.txt")),
        (HfHubHTTPError, lambda: API.model_info(REPO, token="em_0_wrong")),
        (RepositoryNotFoundError, lambda: API.model_info(REPO, token=False)),
    ]
    for kind, ask in wanted:
        try:
            ask()
        except kind:
            continue
        raise AssertionError(f"no {kind.__name__}")


@call("CLIPTextModel.from_pretrained")
def text_encoder() -> None:
    from safetensors.torch import load_file
    from transformers import CLIPTextModel

    model = CLIPTextModel.from_pretrained(REPO, revision="production", subfolder="text_encoder")
    published = load_file(hf_hub_download(REPO, WEIGHTS, revision="production"))
    key = next(key for key in published if key.endswith("layers.0.mlp.fc2.weight"))
    loaded = next(value for name, value in model.state_dict().items() if key.endswith(name.removeprefix("text_model.")))
    expect(bool((loaded.float() == published[key].float()).all()), True)


@call("CLIPTokenizer.from_pretrained")
def tokenizer() -> None:
    from transformers import CLIPTokenizer

    found = CLIPTokenizer.from_pretrained(REPO, revision="production", subfolder="tokenizer")
    expect(found("a fox").input_ids[0], found.bos_token_id)


@call("DiffusionPipeline.from_pretrained")
def pipeline() -> None:
    """Draw with the edited text encoder: as from the downloaded folder, and not as the base model does."""
    import numpy
    import torch
    from diffusers import DiffusionPipeline

    def drawn(source: str, **options: Any) -> Any:
        loaded = DiffusionPipeline.from_pretrained(source, safety_checker=None, **options)
        loaded.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        result = loaded("a fox", num_inference_steps=2, generator=generator, output_type="np")
        return numpy.asarray(result.images[0])

    edited = drawn(REPO, revision="production")
    expect(bool((edited == drawn(snapshot_download(REPO, revision="v1"))).all()), True)
    expect(bool((edited == drawn(FACTS["base"])).all()), False)


def main() -> None:
    ours = [name for name in ("app", "editing", "demo", "deploy") if importlib.util.find_spec(name)]
    expect(ours, [])
    found: dict[str, Any] = {}
    for name, run in CALLS.items():
        try:
            run()
            found[name] = None
        except Exception:
            found[name] = traceback.format_exc(limit=-3)
    json.dump({"version": huggingface_hub.__version__, "calls": found}, sys.stdout)


if __name__ == "__main__":
    main()
