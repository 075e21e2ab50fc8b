"""Rows 13 and 14: images that are not what they seem, and bodies that are too large, too many or too slow, sent to a
real server whose memory is measured."""

import io
import socket
import struct
import zlib
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from threading import Thread

import httpx
import pytest
from PIL import Image
from sqlalchemy import Engine
from sqlalchemy.orm import Session

from app.settings import Settings
from tests.app.conftest import issue_keys
from tests.app.images.test_routes import encoded
from tests.security.servers import Server, start_api

pytestmark = pytest.mark.slow

MIB = 2**20
SENDERS = 40


@pytest.fixture
def api(settings: Settings, clean_database: Engine, tmp_path: Path) -> Iterator[Server]:
    given = settings.model_copy(update={"body_timeout_seconds": 3.0})
    with Session(clean_database) as session:
        keys = issue_keys(session)
    with start_api(given, keys, log=tmp_path / "api.log") as server:
        yield server


def upload(api: Server, content: bytes, *, name: str = "a.png", kind: str = "image/png") -> httpx.Response:
    return api.client.post("/v1/images", headers=api.keys["edit"], files={"file": (name, content, kind)}, timeout=60)


def png_bomb(width: int, height: int) -> bytes:
    """A true PNG of one color whose rows deflate to almost nothing."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)  # one bit a pixel
    row = b"\0" + bytes((width + 7) // 8)
    deflate = zlib.compressobj(9)
    data = b"".join(deflate.compress(row) for _ in range(height)) + deflate.flush()
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def many_frames(form: str, frames: int = 200) -> bytes:
    content = io.BytesIO()
    first, *rest = (Image.new("RGB", (64, 64), (n, 0, 0)) for n in range(frames))
    first.save(content, format=form, save_all=True, append_images=rest)
    return content.getvalue()


class TestImages:
    def test_decompression_bombs_are_rejected_before_decoding(self, api: Server) -> None:
        """144 MP in about 17 kB; decoded it would take hundreds of MB."""
        bomb = png_bomb(12_000, 12_000)
        assert len(bomb) < 20_000
        assert upload(api, encoded()).status_code == 201  # what a first upload loads is loaded
        before = api.memory()
        peak = api.peak_while(lambda: [upload(api, bomb).status_code for _ in range(8)])
        assert [upload(api, each).status_code for each in (bomb, png_bomb(2**31 - 1, 1), png_bomb(60_000, 900))] == [
            413, 413, 413,
        ]  # fmt: skip
        assert peak - before < 64 * MIB
        assert upload(api, many_frames("WEBP")).status_code == 422
        assert upload(api, many_frames("GIF")).status_code == 415
        assert upload(api, many_frames("PNG", 20)).status_code == 422
        assert api.client.get("/healthz").status_code == 200

    def test_the_largest_images_stay_below_the_memory_limit(self, api: Server) -> None:
        """Forty megapixels each, eight at once: two are decoded at a time."""
        content = io.BytesIO()
        Image.new("RGB", (8000, 5000), (10, 200, 30)).save(content, format="PNG", compress_level=1)
        with ExitStack() as stack:
            senders = [Thread(target=upload, args=(api, content.getvalue())) for _ in range(8)]

            def join_all() -> None:
                for sender in senders:
                    sender.join(120)

            stack.callback(join_all)
            for sender in senders:
                sender.start()
            peak = api.peak_while(join_all)
        assert peak < 1300 * MIB

    def test_other_content_is_rejected(self, api: Server) -> None:
        svg = b'<svg xmlns="http://www.w3.org/2000/svg"><script>fetch("/v1/keys")</script></svg>'
        for content in (
            svg,
            b"<?xml version='1.0'?>" + svg,
            b"GIF89a" + b"\0" * 20,
            b"%PDF-1.7",
            b"PK\3\4",
            b"\x7fELF",
        ):
            assert upload(api, content, name="a.png", kind="image/png").status_code == 415

    def test_the_media_type_is_read_from_the_content(self, api: Server) -> None:
        answer = upload(api, encoded("JPEG") + b"PK\3\4 a zip", name="../../x.html", kind="text/html")
        assert answer.status_code == 201
        served = api.client.get(f"/v1/images/{answer.json()['id']}/content", headers=api.keys["read"])
        assert served.headers["Content-Type"] == "image/png"
        assert served.headers["X-Content-Type-Options"] == "nosniff"
        assert b"PK\3\4" not in served.content


class TestMultipart:
    def test_ten_thousand_parts_are_rejected(self, api: Server) -> None:
        part = '--b\r\nContent-Disposition: form-data; name="f{0}"; filename="{0}"\r\n\r\nx\r\n'
        body = "".join(part.format(number) for number in range(10_000)) + "--b--\r\n"
        headers = api.keys["edit"] | {"Content-Type": "multipart/form-data; boundary=b"}
        answer = api.client.post("/v1/images", headers=headers, content=body.encode(), timeout=60)
        assert answer.status_code == 400
        assert answer.headers["Content-Type"] == "application/problem+json"

    def test_a_huge_upload_is_rejected_in_little_memory(self, api: Server) -> None:
        before = api.memory()

        def body() -> Iterator[bytes]:
            yield b'--b\r\nContent-Disposition: form-data; name="file"; filename="a.png"\r\n\r\n'
            for _ in range(64):
                yield b"x" * MIB

        headers = api.keys["edit"] | {"Content-Type": "multipart/form-data; boundary=b"}

        def send() -> None:
            try:
                assert api.client.post("/v1/images", headers=headers, content=body(), timeout=60).status_code == 413
            except (httpx.WriteError, httpx.ReadError):
                pass  # the server hung up before all was sent

        assert api.peak_while(send) - before < 96 * MIB

    def test_malformed_boundaries_are_rejected(self, api: Server) -> None:
        for kind in ("multipart/form-data", "multipart/form-data; boundary=", "multipart/form-data; boundary=\x7f"):
            headers = api.keys["edit"] | {"Content-Type": kind}
            answer = api.client.post("/v1/images", headers=headers, content=b"--\r\n\r\n--")
            assert answer.status_code in (400, 422), kind
            if "\x7f" not in kind:  # which is no header: the server itself refuses it
                assert answer.headers["Content-Type"] == "application/problem+json"


class TestSlowSenders:
    def test_slow_bodies_are_ended_and_others_are_served(self, api: Server) -> None:
        """A byte of the body now and then, by more senders than there are threads and connections to the database."""
        head = (
            "POST /v1/models/emoji/edits HTTP/1.1\r\nHost: t\r\nContent-Type: application/json\r\n"
            f"Authorization: {api.keys['edit']['Authorization']}\r\nContent-Length: 1000\r\n\r\n"
        )
        with ExitStack() as stack:
            slow = [stack.enter_context(socket.create_connection(api.address)) for _ in range(SENDERS)]
            for each in slow:
                each.sendall(head.encode() + b"{")
                each.settimeout(60)
            for _ in range(5):
                answer = api.client.get("/v1/models", headers=api.keys["read"], timeout=20)
                assert answer.status_code == 200
            for each in slow:
                assert each.recv(64).startswith(b"HTTP/1.1 408")

    def test_slow_headers_delay_no_other_request(self, api: Server) -> None:
        """They are held by the proxy in front (SECURITY.md); here they cost a socket each and no thread."""
        with ExitStack() as stack:
            for _ in range(200):
                sender = stack.enter_context(socket.create_connection(api.address))
                sender.sendall(b"GET /v1/models HTTP/1.1\r\nHost: t\r\nX-A: ")
            assert api.client.get("/v1/models", headers=api.keys["read"], timeout=20).status_code == 200
