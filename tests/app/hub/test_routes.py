"""The Hub's read protocol: its answers and headers, and that the real clients understand them."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from app.storage.local import LocalStore
from tests.app.checkpoints.conftest import Service

URL = "/emender/tiny/resolve"
WEIGHTS = "text_encoder/model.safetensors"


@pytest.fixture
def published(service: Service) -> list[dict[str, Any]]:
    """v1 (fox), v2 (fox and owl); `production` at v1."""
    ids = [str(service.edit(source)) for source in ("fox", "owl")]
    return [service.apply(edits=ids[:1], alias="production"), service.apply(edits=ids)]


def sha256_of(checkpoint: Any, path: Any = WEIGHTS) -> Any:
    return next(file["sha256"] for file in checkpoint["files"] if file["path"] == path)


class TestResolve:
    def test_head_and_get(self, service: Service, published: list[dict[str, Any]]) -> None:
        read = service.keys["read"]
        head = service.client.head(f"{URL}/v1/{WEIGHTS}", headers=read)
        assert head.status_code == 200
        assert head.headers["ETag"] == f'"{sha256_of(published[0])}"'
        assert head.headers["X-Repo-Commit"] == published[0]["commit"]
        assert head.headers["Accept-Ranges"] == "bytes"
        assert not any(name.lower().startswith("x-xet") for name in head.headers)
        get = service.client.get(f"{URL}/v1/{WEIGHTS}", headers=read)
        assert hashlib.sha256(get.content).hexdigest() == sha256_of(published[0])
        assert get.headers["Content-Length"] == head.headers["Content-Length"] == str(len(get.content))
        part = service.client.get(f"{URL}/v1/{WEIGHTS}", headers={**read, "Range": "bytes=100-"})
        assert (part.status_code, part.content) == (206, get.content[100:])
        outside = service.client.get(f"{URL}/v1/{WEIGHTS}", headers={**read, "Range": "bytes=99999999-"})
        assert (outside.status_code, outside.headers["Content-Range"]) == (416, f"bytes */{len(get.content)}")

    def test_revisions(self, service: Service, published: list[dict[str, Any]]) -> None:
        """Versions, aliases, commits; `main` is production, and without it the newest."""
        read, apply = service.keys["read"], service.keys["apply"]

        def commit(revision: Any) -> Any:
            return service.client.head(f"{URL}/{revision}/{WEIGHTS}", headers=read).headers["X-Repo-Commit"]

        first, second = (checkpoint["commit"] for checkpoint in published)
        assert first != second
        assert [commit(name) for name in ("v1", "v2", "production", first, second)] == [
            first,
            second,
            first,
            first,
            second,
        ]
        assert [commit(f"refs/{name}") for name in ("heads/production", "tags/v2")] == [first, second]
        assert commit("refs%2Ftags%2Fv2") == second
        assert commit("main") == first
        alias = "/v1/models/tiny/aliases/production"
        service.client.put(alias, json={"version": "v2"}, headers={**apply, "If-Match": "*"})
        assert commit("production") == commit("main") == second
        service.client.delete(alias, headers={**apply, "If-Match": "*"})
        assert commit("main") == second

    @pytest.mark.usefixtures("published")
    def test_unedited_files_are_the_base_model_s(self, service: Service, base_folder: Path) -> None:
        read = service.keys["read"]
        for path in ("unet/diffusion_pytorch_model.safetensors", "model_index.json", "tokenizer/merges.txt"):
            answers = [service.client.get(f"{URL}/{version}/{path}", headers=read) for version in ("v1", "v2")]
            assert answers[0].content == answers[1].content == (base_folder / path).read_bytes()
            assert answers[0].headers["ETag"] == answers[1].headers["ETag"]

    @pytest.mark.parametrize(
        ("url", "status", "code"),
        [
            ("/emender/missing/resolve/main/x", 404, "RepoNotFound"),
            ("/other/tiny/resolve/main/x", 404, "RepoNotFound"),
            (f"{URL}/v9/{WEIGHTS}", 404, "RevisionNotFound"),
            (f"{URL}/{'0' * 40}/{WEIGHTS}", 404, "RevisionNotFound"),
            (f"{URL}/v1/text_encoder/pytorch_model.bin", 404, "EntryNotFound"),
            (f"{URL}/v1/%2e%2e/%2e%2e/etc/passwd", 404, "EntryNotFound"),
            (f"{URL}/v1/a%00b", 404, "EntryNotFound"),
            (f"{URL}/refs/heads/nothing/README.md", 404, "RevisionNotFound"),
            (f"{URL}/refs%2Fpr%2F1/README.md", 404, "RevisionNotFound"),
        ],
    )
    @pytest.mark.parametrize("method", ["HEAD", "GET"])
    def test_not_found(
        self, service: Service, published: list[dict[str, Any]], method: str, url: str, status: int, code: str
    ) -> None:
        answer = service.client.request(method, url, headers=service.keys["read"])
        assert (answer.status_code, answer.headers["X-Error-Code"]) == (status, code)
        assert answer.headers["X-Error-Message"].isascii()
        if code == "EntryNotFound":
            assert answer.headers["X-Repo-Commit"] == published[0]["commit"]

    def test_retracted(self, service: Service, published: list[dict[str, Any]]) -> None:
        revisions = ("v1", "production", "main", published[0]["commit"])
        for revision in revisions:  # lists the files of the commit once
            assert service.client.head(f"{URL}/{revision}/{WEIGHTS}", headers=service.keys["read"]).status_code == 200
        reason = {"reason": "draws the wrong flag"}
        service.client.post("/v1/models/tiny/checkpoints/v1/retract", json=reason, headers=service.keys["admin"])
        for revision in revisions:
            answer = service.client.get(f"{URL}/{revision}/{WEIGHTS}", headers=service.keys["read"])
            assert (answer.status_code, answer.headers["X-Error-Code"]) == (410, "RevisionNotFound")

    def test_damaged_blob_is_never_sent(self, service: Service, published: list[dict[str, Any]]) -> None:
        sha256 = sha256_of(published[0])
        assert service.client.get(f"{URL}/v1/{WEIGHTS}", headers=service.keys["read"]).status_code == 200
        assert isinstance(service.store, LocalStore)
        blob = service.store.path(sha256)
        content = bytearray(blob.read_bytes())
        content[-1] ^= 1
        blob.write_bytes(content)
        answer = service.client.get(f"{URL}/v1/{WEIGHTS}", headers=service.keys["read"])
        assert answer.status_code == 500
        assert len(answer.content) < 2000

    @pytest.mark.usefixtures("published")
    def test_who_may_read(self, service: Service) -> None:
        url = f"{URL}/v1/{WEIGHTS}"
        anonymous = service.client.get(url)
        assert (anonymous.status_code, anonymous.headers["X-Error-Code"]) == (401, "RepoNotFound")
        bad = service.client.get(url, headers={"Authorization": "Bearer em_abc_def"})
        assert (bad.status_code, "X-Error-Code" in bad.headers) == (401, False)
        assert bad.headers["X-Error-Message"] == "Invalid credentials in Authorization header"
        other = service.client.get(url, headers=service.keys["edit"])
        assert (other.status_code, other.headers["X-Error-Code"]) == (403, "GatedRepo")


class TestApi:
    def test_info(self, service: Service, published: list[dict[str, Any]]) -> None:
        info = service.get("/api/models/emender/tiny/revision/v2?blobs=True")
        assert (info["id"], info["sha"], info["private"], info["gated"]) == (
            "emender/tiny",
            published[1]["commit"],
            True,
            False,
        )
        siblings = {sibling["rfilename"]: sibling for sibling in info["siblings"]}
        assert siblings[WEIGHTS]["lfs"]["sha256"] == sha256_of(published[1])
        assert {"model_index.json", "unet/config.json", "README.md", "manifest.json"} <= siblings.keys()
        assert service.get("/api/models/emender/tiny")["sha"] == published[0]["commit"]

    @pytest.mark.usefixtures("published")
    def test_tree(self, service: Service) -> None:
        top = service.get("/api/models/emender/tiny/tree/v1")
        assert {"type": "file", "path": "model_index.json"}.items() <= next(
            entry for entry in top if entry["path"] == "model_index.json"
        ).items()
        assert [entry["path"] for entry in top if entry["type"] == "directory"] == [
            "adapters",
            "scheduler",
            "text_encoder",
            "tokenizer",
            "unet",
            "vae",
        ]
        everything = service.get("/api/models/emender/tiny/tree/v1?recursive=True&expand=False")
        assert {entry["path"] for entry in everything if entry["type"] == "file"} == {
            sibling["rfilename"] for sibling in service.get("/api/models/emender/tiny/revision/v1")["siblings"]
        }
        below = service.get("/api/models/emender/tiny/tree/v1/text_encoder")
        assert [entry["path"] for entry in below] == ["text_encoder/config.json", WEIGHTS]
        url = "/api/models/emender/tiny/tree/v1/nothing"
        assert service.client.get(url, headers=service.keys["read"]).headers["X-Error-Code"] == "EntryNotFound"

    @pytest.mark.usefixtures("published")
    def test_tree_in_pages(self, service: Service) -> None:
        url = "/api/models/emender/tiny/tree/production?recursive=true"
        whole = service.get(url)
        paths: list[str] = []
        following: str | None = f"{url}&limit=4"
        while following:
            answer = service.client.get(following, headers=service.keys["read"])
            assert 0 < len(answer.json()) <= 4
            paths += [entry["path"] for entry in answer.json()]
            following = answer.links.get("next", {}).get("url")
        assert paths == [entry["path"] for entry in whole]
        for bad in ("limit=0", "limit=1001"):
            answer = service.client.get(f"{url}&{bad}", headers=service.keys["read"])
            assert (answer.status_code, answer.headers["Content-Type"]) == (422, "application/problem+json")

    def test_tree_names_the_last_commit_when_asked(self, service: Service, published: list[dict[str, Any]]) -> None:
        (entry,) = (
            entry
            for entry in service.get("/api/models/emender/tiny/tree/v1/text_encoder?expand=True")
            if entry["path"] == WEIGHTS
        )
        assert (entry["lastCommit"]["id"], entry["lastCommit"]["title"]) == (published[0]["commit"], "v1")

    def test_revisions_as_refs_names_them(self, service: Service, published: list[dict[str, Any]]) -> None:
        """Each `ref` of /refs is a revision, slashes escaped or not; other references are none."""
        refs = service.get("/api/models/emender/tiny/refs")
        for ref in refs["branches"] + refs["tags"]:
            for spelt in (ref["ref"], ref["ref"].replace("/", "%2F")):
                assert service.get(f"/api/models/emender/tiny/revision/{spelt}")["sha"] == ref["targetCommit"]
                assert service.get(f"/api/models/emender/tiny/tree/{spelt}") == service.get(
                    f"/api/models/emender/tiny/tree/{ref['name']}"
                )
                below = service.get(f"/api/models/emender/tiny/tree/{spelt}/text_encoder")
                assert [entry["path"] for entry in below] == ["text_encoder/config.json", WEIGHTS]
        for none in ("refs/pr/1", "refs%2Fpr%2F1", "a/b"):
            answer = service.client.get(f"/api/models/emender/tiny/revision/{none}", headers=service.keys["read"])
            assert (answer.status_code, answer.headers["X-Error-Code"]) == (404, "RevisionNotFound")

    def test_paths_info(self, service: Service, published: list[dict[str, Any]]) -> None:
        url = "/api/models/emender/tiny/paths-info/v2"
        asked = {"paths": [WEIGHTS, "unet", "nothing"], "expand": "False"}
        found = service.client.post(url, data=asked, headers=service.keys["read"]).json()
        assert [(entry["type"], entry["path"]) for entry in found] == [("file", WEIGHTS), ("directory", "unet")]
        assert found[0]["lfs"]["oid"] == sha256_of(published[1])
        answer = service.client.post(url, json={}, headers=service.keys["read"])
        assert (answer.status_code, answer.json()["errors"][0]["pointer"]) == (422, "/paths")

    def test_whoami(self, service: Service) -> None:
        for scope, role in (("read", "read"), ("edit", "write")):
            seen = service.client.get("/api/whoami-v2", headers=service.keys[scope]).json()
            assert (seen["fullname"], seen["auth"]["accessToken"]["role"]) == (f"test {scope}", role)
        assert service.client.get("/api/whoami-v2").status_code == 401

    def test_auth_check(self, service: Service) -> None:
        url = "/api/models/emender/tiny/auth-check"
        assert service.client.get(url, headers=service.keys["read"]).status_code == 204
        assert service.client.get(url, headers=service.keys["edit"]).headers["X-Error-Code"] == "GatedRepo"
        nobody = service.client.get("/api/models/emender/missing/auth-check", headers=service.keys["read"])
        assert nobody.headers["X-Error-Code"] == "RepoNotFound"

    def test_refs(self, service: Service, published: list[dict[str, Any]]) -> None:
        refs = service.get("/api/models/emender/tiny/refs")
        assert [(ref["name"], ref["targetCommit"]) for ref in refs["branches"]] == [
            ("main", published[0]["commit"]),
            ("production", published[0]["commit"]),
        ]
        assert [ref["name"] for ref in refs["tags"]] == ["v1", "v2"]

    def test_nothing_published(self, service: Service) -> None:
        answer = service.client.get("/api/models/emender/tiny", headers=service.keys["read"])
        assert (answer.status_code, answer.headers["X-Error-Code"]) == (404, "RevisionNotFound")


@pytest.mark.slow
class TestRealClients:
    def test_huggingface_hub(self, pull: Callable[..., Any], published: list[dict[str, Any]]) -> None:
        """Snapshots, single files, listings, references, the CLI; and the exception that each error becomes."""
        seen = pull(
            """
import hashlib, subprocess
from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError
api = HfApi()
def error(call, *arguments, **options):
    try:
        call(*arguments, **options)
    except Exception as raised:
        return [kind.__name__ for kind in type(raised).__mro__]
root = Path(snapshot_download(repo, revision="production"))
again = Path(snapshot_download(repo, revision="production", local_files_only=True))
local = Path(snapshot_download(repo, revision="v2", local_dir=folder))
command = [Path(sys.executable).parent / "hf", "download", repo, "manifest.json", "--revision", "v1"]
cli = subprocess.run(command, capture_output=True, text=True)
digest = lambda path: hashlib.sha256(path.read_bytes()).hexdigest()
print(json.dumps({
    "root": root.name, "again": again == root, "weights": digest(root / "text_encoder/model.safetensors"),
    "local": digest(local / "text_encoder/model.safetensors"),
    "files": sorted(str(p.relative_to(root)) for p in root.rglob("*") if p.is_file()),
    "listed": sorted(api.list_repo_files(repo, revision="v1")),
    "branches": [ref.name for ref in api.list_repo_refs(repo).branches],
    "sizes": {s.rfilename: s.lfs.size for s in api.model_info(repo, files_metadata=True).siblings if s.lfs},
    "cli": [cli.returncode, cli.stdout + cli.stderr],
    "no entry": error(hf_hub_download, repo, "nothing.bin"),
    "no revision": error(hf_hub_download, repo, "README.md", revision="v9"),
    "no repo": error(hf_hub_download, "emender/missing", "README.md"),
    "no token": error(api.model_info, repo, token=False),
}))
"""
        )
        first, second = published
        assert (seen["root"], seen["again"]) == (first["commit"], True)
        assert (seen["weights"], seen["local"]) == (sha256_of(first), sha256_of(second))
        assert seen["files"] == seen["listed"]
        assert seen["branches"] == ["main", "production"]
        assert seen["sizes"][WEIGHTS] == next(file["size"] for file in first["files"] if file["path"] == WEIGHTS)
        assert seen["cli"][0] == 0, seen["cli"][1]
        assert "EntryNotFoundError" in seen["no entry"]
        assert "RevisionNotFoundError" in seen["no revision"]
        assert "RepositoryNotFoundError" in seen["no repo"]
        assert "RepositoryNotFoundError" in seen["no token"]

    def test_from_pretrained(self, pull: Callable[..., Any], published: list[dict[str, Any]], service: Service) -> None:
        """transformers and diffusers load the edited encoder, whole, and the base model's other parts."""
        seen = pull(
            """
import torch
from diffusers import DiffusionPipeline
from transformers import CLIPTextModel
encoder, info = CLIPTextModel.from_pretrained(repo, revision="v2", subfolder="text_encoder", output_loading_info=True)
pipeline = DiffusionPipeline.from_pretrained(repo, revision="v2")
weights = {k.removeprefix("text_model."): v for k, v in encoder.state_dict().items()}
other = {k.removeprefix("text_model."): v for k, v in pipeline.text_encoder.state_dict().items()}
picture = pipeline("a fox", num_inference_steps=2, output_type="np", generator=torch.manual_seed(0)).images[0]
print(json.dumps({
    "missing": sorted(info["missing_keys"]), "unexpected": sorted(info["unexpected_keys"]),
    "fc2": weights["encoder.layers.1.mlp.fc2.weight"].double().sum().item(),
    "same": all(torch.equal(weights[k], other[k]) for k in weights),
    "picture": list(picture.shape),
}))
"""
        )
        from safetensors.torch import load

        tensors = load(service.store.read(sha256_of(published[1])))
        assert (seen["missing"], seen["unexpected"]) == ([], [])
        assert seen["fc2"] == tensors["text_model.encoder.layers.1.mlp.fc2.weight"].double().sum().item()
        assert seen["same"] is True
        assert seen["picture"] == [16, 16, 3]

    def test_eval_unlearn(self, pull: Callable[..., Any], published: list[dict[str, Any]], service: Service) -> None:
        """Emender's technique for eval-unlearn draws with a version, though the hub is somewhere else."""
        seen = pull(
            """
import hashlib, os
os.environ["EMENDER_API_KEY"] = os.environ.pop("HF_TOKEN")
endpoint = os.environ["HF_ENDPOINT"]
from huggingface_hub import constants, snapshot_download
from editing.errors import EditingError
from editing.evaluation.eval_unlearn import EmenderTechnique
constants.ENDPOINT = "http://127.0.0.1:9"
settings = {"endpoint": endpoint, "num_inference_steps": 2, "device": "cpu"}
technique = EmenderTechnique(model=repo, revision="v2", **settings)
encoder = {"allow_patterns": "text_encoder/*", "local_files_only": True}
root = Path(snapshot_download(repo, revision="v2", endpoint=endpoint, **encoder))
try:
    EmenderTechnique(model=repo, revision="v9", **settings)
except EditingError as error:
    missing = error.detail
print(json.dumps({
    "weights": hashlib.sha256((root / "text_encoder/model.safetensors").read_bytes()).hexdigest(),
    "picture": technique.generate(["a fox"], seed=0)[0].size, "missing": missing,
}))
"""
        )
        assert seen["weights"] == sha256_of(published[1])
        assert seen["picture"] == [16, 16]
        assert "emender/tiny cannot be downloaded from" in seen["missing"]
