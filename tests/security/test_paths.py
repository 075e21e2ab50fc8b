"""No path, file name or alias opens a file outside the store."""

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from fastapi.testclient import TestClient

from app.settings import Settings
from tests.app.conftest import Headers
from tests.app.images.test_routes import encoded
from tests.seeded import Seeded

FORMS = [
    "..", "../secret.txt", "../../../../../../etc/passwd", "..\\..\\secret.txt", "/etc/passwd", "//etc/passwd",
    "file:///etc/passwd", "C:\\secret.txt", "\0", "a\0b", "text_encoder/../../secret.txt", "....//secret.txt",
    ".%00./secret.txt", "%2e%2e/secret.txt", "%2e%2e%2fsecret.txt", "%252e%252e%252fsecret.txt", "..%c0%afsecret.txt",
    "..%5csecret.txt", "\u2025/secret.txt", "\uff0e\uff0e/secret.txt", "~/.ssh/id_rsa", "link", "link/secret.txt", ".",
    "text_encoder/model.safetensors/..", "\ud7ff\u202e", "x" * 5000,
]  # fmt: skip
PLACES = [
    "/{}/emoji/resolve/v1/config.json",
    "/emender/{}/resolve/v1/config.json",
    "/emender/emoji/resolve/{}/config.json",
    "/emender/emoji/resolve/v1/{}",
    "/api/models/emender/{}",
    "/api/models/emender/emoji/revision/{}",
    "/api/models/emender/emoji/tree/v1/{}",
    "/v1/models/{}",
    "/v1/models/{}/checkpoints/v1/files/config.json",
    "/v1/models/emoji/checkpoints/{}",
    "/v1/models/emoji/checkpoints/v1/files/{}",
    "/v1/models/emoji/aliases/{}",
    "/v1/models/emoji/aliases/{}/history",
    "/v1/images/{}/content",
    "/v1/files/{}",
    "/static-offline-docs/{}",
]
opened: list[str] | None = None


def listen(event: str, arguments: tuple[object, ...]) -> None:
    if opened is not None and event in ("open", "os.listdir", "os.scandir", "os.rename", "os.remove", "os.mkdir"):
        opened.append(str(arguments[0]))


sys.addaudithook(listen)  # hooks stay: this one sleeps but for the tests below


@contextmanager
def opened_by() -> Iterator[list[str]]:
    """Every path that the interpreter opens, lists, moves or removes meanwhile."""
    global opened
    opened = []
    try:
        yield opened
    finally:
        opened = None


@pytest.fixture
def secret(settings: Settings, seeded: Seeded, tmp_path: Path) -> str:
    """A file beside the store, and a link to its folder within the store and the model roots."""
    (tmp_path / "secret.txt").write_text("root:x:0:0")
    (tmp_path / "roots").mkdir()
    for folder in (settings.data_dir, settings.data_dir / "store", tmp_path / "roots"):
        (folder / "secret.txt").write_text("root:x:0:0")
        (folder / "link").symlink_to(tmp_path)
    return "root:x:0:0"


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("encoding", ["raw", "once", "twice"])
def test_no_path_parameter_reads_outside_of_the_store(
    client: TestClient, keys: Mapping[str, Headers], settings: Settings, secret: str, place: str, encoding: str
) -> None:
    store = str(settings.store_dir)
    for form in FORMS:
        given = form.encode("utf-8", "surrogatepass")
        if encoding == "once":
            text = quote(given, safe="")
        elif encoding == "twice":
            text = quote(quote(given, safe=""), safe="")
        else:
            text = quote(given, safe="/%.\\~:")
        with opened_by() as paths:
            answer = client.get(place.format(text), headers=keys["admin"], follow_redirects=False)
        assert secret not in answer.text
        assert answer.status_code in (200, 307, 401, 404, 405, 410, 422), (form, answer.status_code)
        if answer.status_code >= 400:
            assert answer.headers["Content-Type"] == "application/problem+json"
        outside = [path for path in paths if not path.startswith(store) and not is_code(path)]
        assert not outside, (form, outside)
        assert not [path for path in paths if "secret" in path or "/link" in path]


def is_code(path: str) -> bool:
    """A module that is imported on first use, or a file of the documentation's pages."""
    return path.isdecimal() or "/site-packages/" in path or "/lib/python" in path or path.endswith((".py", ".pyc"))


@pytest.mark.parametrize("form", [form for form in FORMS if form not in ("link", "link/secret.txt")])
def test_no_name_in_a_body_becomes_a_path(
    client: TestClient, keys: Mapping[str, Headers], seeded: Seeded, secret: str, form: str
) -> None:
    """As names of what is made: models and folders, captions, classifiers, aliases, revisions."""
    headers = keys["admin"]
    bodies: list[tuple[str, dict[str, Any]]] = [
        ("/v1/models", {"name": form, "source": "a/b"}),
        ("/v1/models", {"name": "m", "source": form}),
        ("/v1/models", {"name": "m", "source": "a/b", "namespace": form}),
        ("/v1/models", {"name": "m", "source": "a/b", "classifier": form}),
        ("/v1/models/emoji/statistics", {"captions": form}),
        ("/v1/models/emoji/apply", {"edits": "ready", "alias": form}),
        ("/v1/models/emoji/apply", {"from": form, "add": []}),
    ]
    for url, body in bodies:
        if body.get("classifier") == form and form == "x" * 5000:
            continue
        with opened_by() as paths:
            answer = client.post(url, headers=headers, json=body)
        assert answer.status_code == 422, (body, answer.status_code, answer.text[:300])
        assert not [path for path in paths if "secret" in path or "passwd" in path]
    paths_info = client.post(
        "/api/models/emender/emoji/paths-info/v1", headers=headers, data={"paths": [form], "expand": "true"}
    )
    assert (paths_info.status_code, paths_info.json()) == (200, [])


@pytest.mark.parametrize("form", FORMS)
def test_the_name_of_an_upload_is_not_used(
    client: TestClient, keys: Mapping[str, Headers], settings: Settings, secret: str, form: str
) -> None:
    with opened_by() as paths:
        answer = client.post(
            "/v1/images",
            headers=keys["edit"],
            files={"file": (form.encode("utf-8", "replace").decode(), encoded(), "image/png")},
        )
    assert answer.status_code in (201, 400)
    store = str(settings.store_dir)
    assert not [path for path in paths if not path.startswith(store) and not is_code(path) and not is_spool(path)]


def is_spool(path: str) -> bool:
    return path.startswith("/tmp/") or path == "/tmp"


def test_a_link_in_a_model_root_registers_no_model(
    client: TestClient, keys: Mapping[str, Headers], secret: str, tmp_path: Path
) -> None:
    """`link` points out of the root: its folder is not taken."""
    answer = client.post("/v1/models", headers=keys["admin"], json={"name": "m", "source": "link"})
    assert answer.status_code == 422
    (tmp_path / "roots" / "captions.txt").symlink_to(tmp_path / "secret.txt")
    answer = client.post("/v1/models/emoji/statistics", headers=keys["admin"], json={"captions": "captions"})
    assert answer.status_code == 422
