"""Upload and read reference images."""

import hashlib
import io
from collections.abc import Callable, Mapping
from typing import Any

import pytest
from fastapi.testclient import TestClient
from httpx2 import Response
from PIL import Image
from sqlalchemy import select
from sqlalchemy.orm import Session

from app.db.models import AuditEvent, Edit
from app.settings import Settings
from app.storage.local import LocalStore
from app.worker.edits import concept_edit
from editing.pictures.decode import decode_picture
from tests.app.conftest import Headers

pytestmark = pytest.mark.security


def encoded(
    form: str = "PNG", size: tuple[int, int] = (30, 20), color: Any = (200, 10, 10), mode: str = "RGB", **options: Any
) -> bytes:
    content = io.BytesIO()
    Image.new(mode, size, color).save(content, format=form, **options)
    return content.getvalue()


ROTATED = Image.Exif()
ROTATED[0x0112] = 6  # by 90°
ROTATED[0x010F] = "a camera that names its owner"


@pytest.fixture
def upload(client: TestClient, keys: Mapping[str, Headers]) -> Callable[..., Response]:
    def post(content: Any, name: str = "cat.png", kind: str = "image/png", **headers: Any) -> Any:
        return client.post(
            "/v1/images", headers=keys["edit"] | headers, files={"file": (name, io.BytesIO(content), kind)}
        )

    return post


class TestAddImage:
    def test_upload_needs_the_scope_edit(self, client: TestClient, keys: Mapping[str, Headers]) -> None:
        files = {"file": ("a.png", encoded(), "image/png")}
        assert client.post("/v1/images", files=files).status_code == 401
        assert client.post("/v1/images", headers=keys["read"], files=files).status_code == 403

    @pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP"])
    def test_each_format_is_stored_as_png(
        self, upload: Callable[..., Response], client: TestClient, keys: Mapping[str, Headers], form: str
    ) -> None:
        # The file name and the media type of the upload are ignored.
        answer = upload(encoded(form), name="../../etc/passwd", kind="text/html")
        assert answer.status_code == 201
        image = answer.json()
        assert (image["width"], image["height"]) == (30, 20)
        assert answer.headers["Location"] == f"/v1/images/{image['id']}"
        assert client.get(answer.headers["Location"], headers=keys["read"]).json() == image

        content = client.get(f"/v1/images/{image['id']}/content", headers=keys["read"])
        assert content.headers["Content-Type"] == "image/png"
        assert image["id"] == "sha256:" + hashlib.sha256(content.content).hexdigest()
        with Image.open(io.BytesIO(content.content)) as kept:
            assert (kept.format, kept.size, kept.mode) == ("PNG", (30, 20), "RGB")

    def test_equal_images_have_the_same_id(self, upload: Callable[..., Response], session: Session) -> None:
        first, second = upload(encoded()), upload(encoded(compress_level=0))
        assert first.json() == second.json()
        assert len(session.scalars(select(AuditEvent).where(AuditEvent.action == "image.add")).all()) == 1

    def test_metadata_is_dropped_and_orientation_applied(
        self, upload: Callable[..., Response], client: TestClient, keys: Mapping[str, Headers]
    ) -> None:
        answer = upload(encoded("JPEG", exif=ROTATED))
        image = answer.json()
        assert (image["width"], image["height"]) == (20, 30)
        content = client.get(f"/v1/images/{image['id']}/content", headers=keys["read"]).content
        assert b"owner" not in content
        with Image.open(io.BytesIO(content)) as kept:
            assert kept.info == {}
            assert dict(kept.getexif()) == {}

    def test_color_profile_is_dropped(
        self, upload: Callable[..., Response], client: TestClient, keys: Mapping[str, Headers]
    ) -> None:
        answer = upload(encoded(icc_profile=b"a profile that names its owner", dpi=(72, 72)))
        content = client.get(f"/v1/images/{answer.json()['id']}/content", headers=keys["read"]).content
        with Image.open(io.BytesIO(content)) as kept:
            assert kept.info == {}

    def test_trailing_zip_is_dropped(
        self, upload: Callable[..., Response], client: TestClient, keys: Mapping[str, Headers]
    ) -> None:
        answer = upload(encoded() + b"PK\x03\x04 a zip archive")
        content = client.get(f"/v1/images/{answer.json()['id']}/content", headers=keys["read"]).content
        assert b"PK\x03\x04" not in content
        assert (
            content == client.get(f"/v1/images/{upload(encoded()).json()['id']}/content", headers=keys["read"]).content
        )

    @pytest.mark.parametrize(
        "content",
        [
            pytest.param(encoded("JPEG", mode="CMYK", color=(0, 200, 90, 20))[:-2], id="CMYK without an end"),
            pytest.param(encoded(mode="RGBA", color=(200, 10, 10, 90)), id="transparent"),
            pytest.param(encoded(mode="I;16", color=30_000), id="16 bits"),
            pytest.param(encoded("JPEG", exif=ROTATED), id="rotated"),
        ],
    )
    def test_pixels_equal_those_of_the_library(
        self, upload: Callable[..., Response], store: LocalStore, content: bytes
    ) -> None:
        answer = upload(content)
        destination = {"images": [answer.json()["id"]]}
        row = Edit(source="cat", destination=destination, templates=["{}"], settings={"objective": "noise"})
        [drawn] = concept_edit(row, store=store).destination.images  # type: ignore[union-attr]
        assert drawn.tobytes() == decode_picture(content).tobytes()
        assert (drawn.mode, drawn.size) == ("RGB", (answer.json()["width"], answer.json()["height"]))

    def test_pictures_that_look_alike_have_the_same_id(self, upload: Callable[..., Response]) -> None:
        transparent = [encoded(mode="RGBA", color=(*hidden, 0)) for hidden in ((0, 0, 0), (255, 0, 255))]
        answers = [upload(content).json() for content in (*transparent, encoded(color=(255, 255, 255)))]
        assert answers[0] == answers[1] == answers[2]

    @pytest.mark.parametrize(
        "content",
        [
            b"",
            b"not an image",
            b"<svg xmlns='http://www.w3.org/2000/svg'/>",
            encoded("GIF"),
            encoded("BMP"),
            encoded("TIFF"),
        ],
    )
    def test_other_formats_are_refused(self, upload: Callable[..., Response], content: Any) -> None:
        assert upload(content).status_code == 415

    @pytest.mark.parametrize("content", [encoded()[:60], encoded("JPEG")[:300], encoded("WEBP")[:40]])
    def test_truncated_file_is_refused(self, upload: Callable[..., Response], content: Any) -> None:
        answer = upload(content)
        assert answer.status_code in (415, 422)

    def test_animated_image_is_refused(self, upload: Callable[..., Response]) -> None:
        frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
        for form in ("PNG", "WEBP"):
            content = io.BytesIO()
            frames[0].save(content, format=form, save_all=True, append_images=frames[1:])
            answer = upload(content.getvalue())
            assert answer.status_code == 422
            assert "animated" in answer.json()["detail"]

    def test_image_with_too_many_pixels_is_not_decoded(
        self, upload: Callable[..., Response], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        bomb = io.BytesIO()
        Image.new("L", (12_000, 12_000)).save(bomb, format="PNG")
        monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda _: pytest.fail("decoded"))
        answer = upload(bomb.getvalue())
        assert answer.status_code == 413
        assert "pixels" in answer.json()["detail"]

    def test_file_with_too_many_bytes_is_refused(self, upload: Callable[..., Response], settings: Settings) -> None:
        settings.max_image_bytes = 100
        answer = upload(encoded("PNG", size=(64, 64), compress_level=0))
        assert answer.status_code == 413

    def test_missing_file_is_refused(self, client: TestClient, keys: Mapping[str, Headers]) -> None:
        answer = client.post("/v1/images", headers=keys["edit"], files={"other": b"x"})
        assert (answer.status_code, answer.json()["errors"][0]["pointer"]) == (422, "/file")
        assert client.post("/v1/images", headers=keys["edit"], json={}).status_code == 422

    def test_too_many_parts_are_refused(self, client: TestClient, keys: Mapping[str, Headers]) -> None:
        parts = [("file", (f"{number}.png", b"x", "image/png")) for number in range(2000)]
        answer = client.post("/v1/images", headers=keys["edit"], files=parts)
        assert answer.status_code == 400
        assert answer.headers["Content-Type"] == "application/problem+json"

    def test_idempotency_key_replays_the_upload(self, upload: Callable[..., Response]) -> None:
        key = {"Idempotency-Key": "one"}
        first, again = upload(encoded(), **key), upload(encoded(), **key)  # each with a boundary of its own
        assert first.json() == again.json()
        assert again.headers["Idempotency-Replayed"] == "true"
        assert upload(encoded(color=(1, 2, 3)), **key).status_code == 422


class TestGetImage:
    def test_unknown_image_is_not_found(self, client: TestClient, keys: Mapping[str, Headers]) -> None:
        for url in ("/v1/images/sha256:" + "0" * 64, "/v1/images/sha256:" + "0" * 64 + "/content"):
            assert client.get(url, headers=keys["read"]).status_code == 404

    @pytest.mark.parametrize("name", ["..%2f..%2fetc%2fpasswd", "sha256:..", "%00", "sha256:" + "A" * 64])
    def test_names_that_are_no_sha256_are_refused(
        self, client: TestClient, keys: Mapping[str, Headers], name: str
    ) -> None:
        assert client.get(f"/v1/images/{name}/content", headers=keys["read"]).status_code in (404, 422)

    def test_damaged_blob_is_not_served(
        self, upload: Callable[..., Response], client: TestClient, keys: Mapping[str, Headers], store: LocalStore
    ) -> None:
        image = upload(encoded()).json()
        path = store.path(image["id"].removeprefix("sha256:"))
        path.write_bytes(path.read_bytes()[:-1])
        answer = client.get(f"/v1/images/{image['id']}/content", headers=keys["read"])
        assert answer.status_code == 500
        assert answer.headers["Content-Type"] == "application/problem+json"
