#!/usr/bin/env python3
"""Keep a folder at the version that an alias of Emender points at: verified, swapped at once, with a way back.

    python pull.py --endpoint https://emender.example --model emender/emoji --revision production \
        --folder /srv/models/emoji --key public.pem [--watch 60] [--on-change "systemctl reload draw"]

One file, to be copied to any POSIX machine with Python 3.9 or newer; the standard library is all it needs. The API key
(scope `read`) is in HF_TOKEN or EMENDER_API_KEY, or in the file of --token-file.

    FOLDER/<commit>/…      a whole pipeline; files that two versions share are hard links, and read-only
    FOLDER/current         a symbolic link to the version in use, changed by one rename(2); FOLDER/previous likewise

A version is downloaded beside the others, each file once by its sha256. It becomes `current` only when the signature of
its manifest is that of a key given by --key and every file is what the manifest says. Whatever ends this program, at
whatever moment, `current` is whole; the next run goes on with the bytes that arrived.

Exit codes:
    0  the folder is at the version (with --exit-code: 0 as before, 10 changed)
    2  wrong arguments               6  the signature, a digest or the manifest is wrong; `current` stays
    3  no answer, or an error there  7  the folder cannot be read or written
    4  the API key was refused       8  another pull works in the folder
    5  no such version, or retracted 9  the command of --on-change failed; it runs again next time
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import fcntl
import hashlib
import http.client
import json
import os
import random
import re
import shlex
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable, Optional

MANIFEST, SIGNATURE = "manifest.json", "manifest.sig"
FORMAT = 2
COMMIT = re.compile(r"[0-9a-f]{40}")
SHA256 = re.compile(r"[0-9a-f]{64}")
LEFT_BY_CLIENTS = (".cache",)  # huggingface_hub's notes beside what it downloaded
CHUNK = 1 << 20
MOST_MANIFEST_BYTES = 256 << 20
TIMEOUT_SECONDS = 60.0
ATTEMPTS = 5
LONGEST_PAUSE_SECONDS = 900.0
CHANGED = 10

Keys = Optional[Mapping[str, bytes]]
"""Public keys (32 bytes) by their ids; None where signatures are not asked for."""


class PullError(Exception):
    """Why it cannot go on; readable as it stands."""

    code = 1


class Usage(PullError):
    code = 2


class Unreachable(PullError):
    code = 3


class Unauthorized(PullError):
    code = 4


class NotFound(PullError):
    code = 5


class VerificationFailed(PullError):
    code = 6


class DiskFailed(PullError):
    code = 7


class Busy(PullError):
    code = 8


class CommandFailed(PullError):
    code = 9


# ---- Ed25519 (RFC 8032, section 5.1), the half that needs no secret and so no constant time

P = 2**255 - 19
L = 2**252 + 27742317777372353535851937790883648493
D = -121665 * pow(121666, -1, P) % P
ROOT_OF_MINUS_1 = pow(2, (P - 1) // 4, P)

Point = tuple[int, int, int, int]
"""(X, Y, Z, T): x = X/Z, y = Y/Z, xy = T/Z."""


def signed(public: bytes, message: bytes, signature: bytes) -> bool:
    """Whether the signature (64 bytes) of the message is that of the public key (32 bytes): RFC 8032, 5.1.7.

    False for whatever is malformed: another length, a point that is none or is not encoded canonically, S >= L.
    """
    if len(public) != 32 or len(signature) != 64:
        return False
    key, s = _decoded(public), int.from_bytes(signature[32:], "little")
    if key is None or s >= L:
        return False
    k = int.from_bytes(hashlib.sha512(signature[:32] + public + message).digest(), "little") % L
    x, y, z, t = key
    return _encoded(_sum(_times(s, BASE), _times(k, (P - x, y, z, P - t)))) == signature[:32]


def _decoded(encoded: bytes) -> Point | None:
    """5.1.3; None for what is no point of the curve."""
    y = int.from_bytes(encoded, "little")
    sign, y = y >> 255, y & (2**255 - 1)
    u, v = (y * y - 1) % P, (D * y * y + 1) % P
    x = u * pow(v, 3, P) * pow(u * pow(v, 7, P), (P - 5) // 8, P) % P
    if v * x * x % P == P - u:
        x = x * ROOT_OF_MINUS_1 % P
    if y >= P or (v * x * x - u) % P or (x == 0 and sign):
        return None
    x = P - x if x & 1 != sign else x
    return (x, y, 1, x * y % P)


def _encoded(point: Point) -> bytes:
    """5.1.2."""
    inverse = pow(point[2], -1, P)
    x, y = point[0] * inverse % P, point[1] * inverse % P
    return (y | (x & 1) << 255).to_bytes(32, "little")


def _sum(one: Point, other: Point) -> Point:
    """5.1.4: complete, so that it doubles too."""
    a, b = (one[1] - one[0]) * (other[1] - other[0]) % P, (one[1] + one[0]) * (other[1] + other[0]) % P
    c, d = 2 * one[3] * other[3] * D % P, 2 * one[2] * other[2] % P
    e, f, g, h = b - a, d - c, d + c, b + a
    return (e * f % P, g * h % P, f * g % P, e * h % P)


def _times(factor: int, point: Point) -> Point:
    total: Point = (0, 1, 1, 0)
    while factor:
        if factor & 1:
            total = _sum(total, point)
        point, factor = _sum(point, point), factor >> 1
    return total


_base = _decoded((4 * pow(5, -1, P) % P).to_bytes(32, "little"))
assert _base is not None
BASE: Point = _base


# ---- keys, signatures, manifests

SPKI = bytes.fromhex("302a300506032b6570032100")  # RFC 8410: an Ed25519 SubjectPublicKeyInfo is this and the key
PEM = re.compile(r"-----BEGIN PUBLIC KEY-----([A-Za-z0-9+/=\s]*)-----END PUBLIC KEY-----")


def key_id(public: bytes) -> str:
    """How a public key (32 bytes) is named: the first 16 hex digits of its sha256."""
    return hashlib.sha256(public).hexdigest()[:16]


def read_keys(paths: Sequence[Path]) -> dict[str, bytes]:
    """The Ed25519 keys in PEM files, which may hold several, and in the *.pem files of folders. Raises `Usage`."""
    keys: dict[str, bytes] = {}
    for path in paths:
        for file in sorted(path.glob("*.pem")) if path.is_dir() else [path]:
            try:
                blocks = PEM.findall(file.read_text(encoding="ascii"))
                found = [base64.b64decode("".join(block.split()), validate=True) for block in blocks]
            except OSError as error:
                raise Usage(f"The public key {file} cannot be read: {error.strerror}.") from None
            except ValueError:
                found = []
            if not found or any(len(der) != 44 or not der.startswith(SPKI) for der in found):
                raise Usage(f"{file} holds no Ed25519 public key in PEM (-----BEGIN PUBLIC KEY-----).")
            keys.update((key_id(der[12:]), der[12:]) for der in found)
    if not keys:
        raise Usage(f"There is no public key in {', '.join(map(str, paths))}: put *.pem files there.")
    return keys


def check_signature(manifest: bytes, signature: bytes, keys: Mapping[str, bytes]) -> str:
    """The id of the key that signed the manifest. Raises `VerificationFailed`.

    `manifest.sig` is JSON: {"algorithm": "Ed25519", "key_id": …, "signature": base64 of 64 bytes}.
    """
    try:
        content = json.loads(signature)
        algorithm, named = content["algorithm"], content["key_id"]
        raw = base64.b64decode(content["signature"], validate=True)
    except (ValueError, KeyError, TypeError, RecursionError):
        raise VerificationFailed(f"{SIGNATURE}: it is no signature.") from None
    if algorithm != "Ed25519":
        raise VerificationFailed(f"{SIGNATURE}: its algorithm is {str(algorithm)[:40]!r}, not 'Ed25519'.")
    if not isinstance(named, str) or named not in keys:
        raise VerificationFailed(f"{SIGNATURE}: signed by {str(named)[:40]!r}, but trusted are {', '.join(keys)}.")
    if not signed(keys[named], manifest, raw):
        detail = f"not the signature of {named} over {MANIFEST}: one of the two was altered."
        raise VerificationFailed(f"{SIGNATURE}: {detail}")
    return named


def read_manifest(content: bytes) -> dict[str, Any]:
    """The manifest, whose `files` are sound: relative paths inside the folder, and digests. Raises
    `VerificationFailed`."""
    try:
        manifest = json.loads(content)
        found, files, name = manifest["format"], manifest["files"], manifest["base_model"]["name"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise VerificationFailed(f"{MANIFEST}: it is no manifest.") from None
    if found != FORMAT:
        detail = "apply the same edits again" if found == 1 else "take a newer pull.py"
        raise VerificationFailed(f"{MANIFEST}: its format is {found}, and {FORMAT} is understood: {detail}.")
    if not (isinstance(name, str) and isinstance(files, dict) and all(map(_is_sound, files, files.values()))):
        raise VerificationFailed(f"{MANIFEST}: a path or digest in it is malformed.")
    return dict(manifest)


def _is_sound(path: str, sha256: object) -> bool:
    parts = path.split("/")
    inside = not any(part in ("", ".", "..") for part in parts) and not re.search(r"[\\\0:]", path)
    named = path not in (MANIFEST, SIGNATURE) and parts[0] not in LEFT_BY_CLIENTS
    return inside and named and isinstance(sha256, str) and bool(SHA256.fullmatch(sha256))


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


@dataclass
class Check:
    """What became of the files of a version since it was published."""

    key: str | None = None
    """Whose signature the manifest has; None where none was asked for, or it is wrong."""
    files: int = 0
    problems: dict[str, str] = field(default_factory=dict)
    """By path; empty: all is as it was published."""

    def demand(self, folder: Path) -> Check:
        """Itself. Raises `VerificationFailed` where there are problems."""
        if self.problems:
            what = "; ".join(f"{path}: {problem}" for path, problem in list(self.problems.items())[:5])
            raise VerificationFailed(f"{folder} is not as it was published: {what}.")
        return self


def check(folder: Path, keys: Keys) -> Check:
    """Hold a folder against its signature, then against its manifest: every file that was altered, is missing, or is
    there though no manifest lists it. What huggingface_hub notes in `.cache` is passed over."""
    result = Check()
    content = _content(folder / MANIFEST)
    if content is None:
        result.problems[MANIFEST] = "missing"
        return result
    if keys is not None:
        try:
            signature = _content(folder / SIGNATURE)
            if signature is None:
                raise VerificationFailed(f"{SIGNATURE}: missing; the version was published unsigned, or it was removed")
            result.key = check_signature(content, signature, keys)
        except VerificationFailed as error:
            result.problems[SIGNATURE] = str(error).split(": ", 1)[1].rstrip(".")
    try:
        files = read_manifest(content)["files"]
    except VerificationFailed as error:
        result.problems[MANIFEST] = str(error).split(": ", 1)[1].rstrip(".")
        return result
    result.files = len(files)
    result.problems.update(_differences(folder, files))
    return result


def _content(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None


def _differences(folder: Path, files: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    for path, sha256 in sorted(files.items()):
        if not (folder / path).is_file():
            yield path, "missing"
        elif sha256_of(folder / path) != sha256:
            yield path, "altered"
    expected = {MANIFEST, SIGNATURE, *files}
    for root, names, leaves in os.walk(folder, onerror=_raise):
        inside = os.path.relpath(root, folder)
        if inside == ".":
            names[:] = [name for name in names if name not in LEFT_BY_CLIENTS]
        links = [name for name in names if os.path.islink(os.path.join(root, name))]  # a folder of somewhere else
        for name in (*leaves, *links):
            path = os.path.normpath(os.path.join(inside, name)).replace(os.sep, "/")
            if path not in expected:
                yield path, "unlisted"


def _raise(error: OSError) -> None:
    raise error


# ---- the service


@dataclass
class Source:
    """A model of an Emender, spoken to by the read half of the Hugging Face Hub's protocol.

    The key goes to the endpoint and to no host that it redirects to. Raises the errors above.
    """

    endpoint: str
    model: str
    token: Callable[[], str | None]
    """Asked before each request, so that a key may be exchanged while this watches."""
    pause: float = 1.0
    """Seconds before the second attempt; it doubles."""
    received: int = 0
    """Bytes of files so far."""
    file: int = 0
    """Which of the `files` to download is on its way."""
    files: int = 0
    seen: Callable[[Source], object] = lambda _: None
    """Told of each piece that came."""

    def commit(self, revision: str) -> str:
        """The commit that a version, alias or commit stands for now."""
        path = f"/api/models/{self.model}/revision/{urllib.parse.quote(revision, safe='')}"
        content = self._patiently(lambda: self._read(path, most=64 << 20))
        try:
            commit = json.loads(content)["sha"]
        except (ValueError, KeyError, TypeError, RecursionError):
            commit = None
        if not isinstance(commit, str) or not COMMIT.fullmatch(commit):  # it becomes the name of a folder
            raise Unreachable(f"{self.endpoint} does not answer as an Emender does: it names no commit.")
        return commit

    def read(self, commit: str, path: str) -> bytes:
        """A small file, whole."""
        content: bytes = self._patiently(lambda: self._read(self._resolve(commit, path), most=MOST_MANIFEST_BYTES))
        return content

    def download(self, commit: str, path: str, part: Path) -> None:
        """Add to `part` what it lacks of the file."""
        self._patiently(lambda: self._continue(commit, path, part))

    def _continue(self, commit: str, path: str, part: Path) -> None:
        have = part.stat().st_size if part.exists() else 0
        wanted = {"Range": f"bytes={have}-", "If-Range": f'"{part.stem}"'} if have else {}  # an ETag is the sha256
        try:
            answer = self._open(self._resolve(commit, path), wanted)
        except RangeOutside:  # all of it is there, or more: its digest will tell
            return
        with answer, part.open("ab" if answer.status == 206 else "wb") as file:
            length, come = answer.headers.get("Content-Length"), 0
            while chunk := _next(answer):
                file.write(chunk)
                file.flush()
                come += len(chunk)
                self.received += len(chunk)
                self.seen(self)
            os.fsync(file.fileno())
        if length is not None and come < int(length):
            raise Unreachable(f"The connection ended after {come} of {length} bytes of {path}.")

    def _resolve(self, commit: str, path: str) -> str:
        return f"/{self.model}/resolve/{commit}/{urllib.parse.quote(path)}"

    def _read(self, path: str, *, most: int) -> bytes:
        with self._open(path, {}) as answer:
            content = b""
            while len(content) <= most and (chunk := _next(answer)):
                content += chunk
        if len(content) > most:
            raise Unreachable(f"{self.endpoint}{path} is larger than {most} bytes.")
        return content

    def _open(self, path: str, headers: Mapping[str, str]) -> Any:
        request = urllib.request.Request(self.endpoint + path, headers={"User-Agent": "emender-pull", **headers})
        if token := self.token():
            if not re.fullmatch(r"[!-~]+", token):
                raise Usage("The API key is malformed: it is one word of ASCII.")
            request.add_unredirected_header("Authorization", f"Bearer {token}")
        try:
            return urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS)
        except urllib.error.HTTPError as error:
            with error:
                raise _refusal(error) from None
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", error)
            raise Unreachable(f"{self.endpoint} does not answer: {reason}.") from None

    def _patiently(self, ask: Callable[[], Any]) -> Any:
        for attempt in range(ATTEMPTS):
            try:
                return ask()
            except Unreachable:
                if attempt == ATTEMPTS - 1:
                    raise
                time.sleep(self.pause * 2**attempt)


class RangeOutside(PullError):
    """The file has no bytes there."""


def _next(answer: Any) -> bytes:
    try:
        chunk: bytes = answer.read1(CHUNK)  # what has come, so that it is kept, however little
    except (OSError, http.client.HTTPException) as error:
        raise Unreachable(f"The connection broke: {type(error).__name__}.") from None
    return chunk


def _refusal(error: urllib.error.HTTPError) -> PullError:
    try:
        detail = str(json.loads(error.read(CHUNK))["detail"])
    except (ValueError, KeyError, TypeError, RecursionError, OSError, http.client.HTTPException):
        detail = error.headers.get("X-Error-Message") or error.reason
    kinds = {401: Unauthorized, 403: Unauthorized, 404: NotFound, 410: NotFound, 416: RangeOutside}
    kind = kinds.get(error.code, Unreachable if error.code >= 500 or error.code == 429 else PullError)
    return kind(f"{detail} ({error.code})")


# ---- the folder


@dataclass
class Shelf:
    """The versions in a folder. Changed only while `locked`."""

    folder: Path

    @property
    def hidden(self) -> Path:
        """Where versions arrive, and what is remembered between runs."""
        return self.folder / ".pull"

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """The kernel lets go of it when we end, however we do. Raises `Busy`."""
        self.hidden.mkdir(parents=True, exist_ok=True)
        with (self.hidden / "lock").open("a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise Busy(f"Another pull works in {self.folder}.") from None
            yield

    def commit(self, name: str) -> str | None:
        """The commit that the link `current` or `previous` points at."""
        link = self.folder / name
        target = os.readlink(link) if link.is_symlink() else ""
        return target if COMMIT.fullmatch(target) else None

    def versions(self) -> list[Path]:
        """Those that are here, the one last used first."""
        found = [path for path in self.folder.glob("*") if COMMIT.fullmatch(path.name) and path.is_dir()]
        return sorted(found, key=lambda path: path.stat().st_mtime, reverse=True)

    def remembered(self, name: str) -> str:
        path = self.hidden / name
        return path.read_text() if path.exists() else ""

    def remember(self, name: str, commit: str) -> None:
        (self.hidden / f"{name}.new").write_text(commit)
        os.replace(self.hidden / f"{name}.new", self.hidden / name)

    def place(self, staged: Path, commit: str, files: Sequence[str]) -> None:
        """Let a version that was verified appear under its commit, or mend the one that is there."""
        target = self.folder / commit
        if commit == self.commit("current"):
            for path in (*files, SIGNATURE, MANIFEST):
                if (staged / path).exists():
                    (target / path).parent.mkdir(parents=True, exist_ok=True)
                    os.replace(staged / path, target / path)
            return
        if target.exists():
            shutil.rmtree(target)
        os.replace(staged, target)

    def swap(self, commit: str) -> None:
        """Point `current` at a version that is here, and `previous` at the one before it."""
        now = self.commit("current")
        os.utime(self.folder / commit)
        if now is not None and now != commit:
            self._point("previous", now)  # first: killed between the two, there is still no version without a name
        self._point("current", commit)

    def _point(self, name: str, commit: str) -> None:
        new = self.hidden / f"{name}.link"
        if new.is_symlink():
            new.unlink()
        new.symlink_to(commit)
        os.replace(new, self.folder / name)
        descriptor = os.open(self.folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def tidy(self, keep: int) -> None:
        """Drop what arrived and was not used, and versions beyond `keep`; never `current` or `previous`."""
        for path in self.hidden.glob("*"):
            if path.suffix == ".part":
                path.unlink()
            elif path.is_dir():
                shutil.rmtree(path)
        used = {self.commit("current"), self.commit("previous")}
        others = [path for path in self.versions() if path.name not in used]
        for path in others[max(0, keep - len(used - {None})) :]:
            shutil.rmtree(path)


@dataclass
class Outcome:
    """What a run found or did."""

    commit: str | None
    previous: str | None = None
    changed: bool = False
    held: bool = False
    """The alias points at a version that was rolled back here."""
    key: str | None = None
    files: int = 0
    downloaded: int = 0
    received: int = 0
    """Bytes of files that came over the network."""


def update(source: Source, shelf: Shelf, *, revision: str, keys: Keys, keep: int = 2, thorough: bool = True) -> Outcome:
    """Bring the folder to a revision. Without `thorough`, a version that is current already is not read again."""
    commit = source.commit(revision)
    with shelf.locked():
        now = shelf.commit("current")
        if commit == shelf.remembered("held"):
            return Outcome(now, shelf.commit("previous"), held=True)
        if shelf.remembered("held"):
            shelf.remember("held", "")  # the alias went elsewhere since
        if commit == now:
            if not thorough:
                return Outcome(now, shelf.commit("previous"))
            found = check(shelf.folder / commit, keys)
            if not found.problems:
                return Outcome(now, shelf.commit("previous"), key=found.key, files=found.files)
        outcome = fetch(source, shelf, commit=commit, keys=keys)
        outcome.changed = True
        if commit == now:
            check(shelf.folder / commit, keys).demand(shelf.folder / commit)  # mended, it may still hold others' files
        else:
            shelf.swap(commit)
        outcome.previous = shelf.commit("previous")
        shelf.tidy(keep)
        return outcome


def fetch(source: Source, shelf: Shelf, *, commit: str, keys: Keys) -> Outcome:
    """Let a version appear in the folder, verified; only files that no version there has are downloaded."""
    content = source.read(commit, MANIFEST)
    signature: bytes | None = None
    try:
        signature = source.read(commit, SIGNATURE)
    except NotFound as error:
        if keys is not None:
            raise VerificationFailed(f"{SIGNATURE}: {commit} was published without a signature. {error}") from None
    key = check_signature(content, signature or b"", keys) if keys is not None else None
    manifest = read_manifest(content)
    files: dict[str, str] = manifest["files"]
    name = manifest["base_model"]["name"]
    if name != source.model.partition("/")[2]:
        raise VerificationFailed(f"{MANIFEST}: {commit} is a version of {name[:96]!r}, not of {source.model}.")
    staged = shelf.hidden / commit
    staged.mkdir(exist_ok=True)
    (staged / MANIFEST).write_bytes(content)
    if signature is not None:
        (staged / SIGNATURE).write_bytes(signature)
    _link(staged, files, shelf.versions())
    wrong = dict(_differences(staged, files))
    for path in wrong:
        if os.path.lexists(staged / path):
            (staged / path).unlink()
    wanted = [path for path in files if path in wrong]
    before, source.files = source.received, len(wanted)
    for source.file, path in enumerate(wanted, start=1):
        _download(source, commit, path, files[path], target=staged / path, part=shelf.hidden / f"{files[path]}.part")
    shelf.place(staged, commit, list(files))
    return Outcome(commit, key=key, files=len(files), downloaded=len(wanted), received=source.received - before)


def _link(staged: Path, files: Mapping[str, str], versions: Sequence[Path]) -> None:
    """Hard links to files of other versions that have these digests, by the word of their manifests alone."""
    here: dict[str, Path] = {}
    for version in versions:
        try:
            listed = read_manifest(_content(version / MANIFEST) or b"")["files"]
        except VerificationFailed:
            continue
        here.update((sha256, version / path) for path, sha256 in listed.items() if (version / path).is_file())
    for path, sha256 in files.items():
        target = staged / path
        target.parent.mkdir(parents=True, exist_ok=True)
        if sha256 in here and not target.exists():
            try:
                os.link(here[sha256], target)
            except OSError:  # a file system without them
                shutil.copyfile(here[sha256], target)


def _download(source: Source, commit: str, path: str, sha256: str, *, target: Path, part: Path) -> None:
    for fresh in (not part.exists(), True):
        source.download(commit, path, part)
        if sha256_of(part) == sha256:
            part.chmod(0o444)
            os.replace(part, target)
            return
        part.unlink()
        if fresh:  # else the part that was there from a run before may have been the damage
            break
    raise VerificationFailed(f"{path}: what arrived is not what was published.")


def rollback(shelf: Shelf, *, keys: Keys) -> Outcome:
    """Exchange `current` and `previous`. The version left is not pulled again until the alias points elsewhere."""
    with shelf.locked():
        now, before = shelf.commit("current"), shelf.commit("previous")
        if now is None or before is None or before == now or not (shelf.folder / before).is_dir():
            raise NotFound(f"There is no previous version in {shelf.folder}.")
        found = check(shelf.folder / before, keys).demand(shelf.folder / before)
        shelf.remember("held", "" if before == shelf.remembered("held") else now)
        shelf.swap(before)
        return Outcome(before, now, changed=True, key=found.key, files=found.files)


# ---- the command


@dataclass
class Options:
    """What `run` is asked to do."""

    folder: Path
    endpoint: str = ""
    model: str = ""
    revision: str = "main"
    token: Callable[[], str | None] = lambda: None
    key: Sequence[Path] = ()
    unsigned: bool = False
    watch: float | None = None
    keep: int = 2
    on_change: str = ""
    rollback: bool = False
    check: bool = False
    exit_code: bool = False
    json: bool = False
    seen: Callable[[Source], object] = lambda _: None


def run(options: Options) -> int:
    """Do it, say so on standard output, complain on standard error; returns the exit code."""
    say = _Voice(options.json)
    try:
        keys = _keys(options)
        shelf = Shelf(options.folder)
        source = Source(options.endpoint.rstrip("/"), options.model, options.token, seen=options.seen)
        _check_options(options)
        if options.watch is not None:
            _watch(options, source, shelf, keys, say)
        with _disk():
            outcome = _step(options, source, shelf, keys)
            say.outcome(outcome)
            _announce(options, shelf, outcome.commit)
    except PullError as error:
        say.error(error)
        return error.code
    except KeyboardInterrupt:
        return 130
    return CHANGED if outcome.changed and options.exit_code else 0


def _step(options: Options, source: Source, shelf: Shelf, keys: Keys, *, thorough: bool = True) -> Outcome:
    if options.check:
        commit = shelf.commit("current")
        if commit is None:
            raise NotFound(f"{shelf.folder} has no current version.")
        found = check(shelf.folder / commit, keys).demand(shelf.folder / commit)
        return Outcome(commit, shelf.commit("previous"), key=found.key, files=found.files)
    if options.rollback:
        return rollback(shelf, keys=keys)
    return update(source, shelf, revision=options.revision, keys=keys, keep=options.keep, thorough=thorough)


def _announce(options: Options, shelf: Shelf, commit: str | None) -> None:
    """Run the command unless it ran for this version: at least once for each, also where we were killed between."""
    if not options.on_change or options.check or commit is None:
        return
    with shelf.locked():
        if shelf.remembered("announced") == commit:
            return
        command = shlex.split(options.on_change)
        place = {"EMENDER_COMMIT": commit, "EMENDER_CURRENT": str(shelf.folder.absolute() / "current")}
        secrets = ("HF_TOKEN", "EMENDER_API_KEY")
        environment = {name: value for name, value in os.environ.items() if name not in secrets}
        try:
            done = subprocess.run(command, env={**environment, **place}, stdin=subprocess.DEVNULL, check=False)
        except OSError as error:
            raise CommandFailed(f"{command[0]} cannot be run: {error.strerror}.") from None
        if done.returncode:
            raise CommandFailed(f"{command[0]} ended with {done.returncode}; {commit} is current all the same.")
        shelf.remember("announced", commit)


def _watch(options: Options, source: Source, shelf: Shelf, keys: Keys, say: _Voice) -> None:
    """Look again and again, apart by about `options.watch` seconds; longer while it fails. Ends by a signal only."""
    assert options.watch is not None
    failures, seen = 0, None
    while True:
        try:
            with _disk():
                outcome = _step(options, source, shelf, keys, thorough=seen is None)
                if outcome.changed or (outcome.commit, outcome.held) != seen:
                    say.outcome(outcome)
                seen = (outcome.commit, outcome.held)
                _announce(options, shelf, outcome.commit)
            failures = 0
        except Usage:
            raise
        except PullError as error:
            say.error(error)
            failures = min(failures + 1, 20)
        pause = min(options.watch * 2**failures, max(options.watch, LONGEST_PAUSE_SECONDS))
        time.sleep(pause * random.uniform(0.9, 1.1))  # a fleet that started at once shall not ask at once


@contextlib.contextmanager
def _disk() -> Iterator[None]:
    try:
        yield
    except OSError as error:  # those of the network were told apart before
        raise DiskFailed(f"{error.filename or 'The folder'}: {error.strerror or error}.") from error


def _keys(options: Options) -> Keys:
    if bool(options.key) == options.unsigned:
        raise Usage("Give --key with the public key that versions are signed with; or --unsigned, to trust the server.")
    return None if options.unsigned else read_keys(options.key)


def _check_options(options: Options) -> None:
    if options.rollback or options.check:
        if options.watch is not None or (options.rollback and options.check):
            raise Usage("--rollback, --check and --watch are three things to do: give one.")
        return
    if not re.match(r"https?://[^/]", options.endpoint):
        raise Usage("Give --endpoint, the URL of Emender: https://…")
    if not re.fullmatch(r"[A-Za-z0-9._-]+/[A-Za-z0-9._-]+", options.model):
        raise Usage("Give --model as NAMESPACE/NAME: emender/emoji.")
    if options.watch is not None and not options.watch > 0:
        raise Usage("--watch takes a number of seconds above 0.")
    try:
        shlex.split(options.on_change)
    except ValueError as error:
        raise Usage(f"--on-change: {error}.") from None


@dataclass
class _Voice:
    json: bool

    def outcome(self, outcome: Outcome) -> None:
        state = "held" if outcome.held else "changed" if outcome.changed else "unchanged"
        line = f"{outcome.commit} {state}, {outcome.downloaded} files downloaded ({outcome.received} bytes)"
        signer = f", signed by {outcome.key}" if outcome.key else ""
        self._write({"event": state, **vars(outcome)}, line + signer, sys.stdout)

    def error(self, error: PullError) -> None:
        name = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", type(error).__name__).lower()
        self._write({"event": "error", "error": name, "code": error.code, "detail": str(error)}, str(error), sys.stderr)

    def _write(self, event: Mapping[str, object], line: str, stream: Any) -> None:
        stream = sys.stdout if self.json else stream
        stream.write((json.dumps(event) if self.json else line) + "\n")
        stream.flush()


def _token(file: Path | None) -> Callable[[], str | None]:
    def read() -> str | None:
        if file is None:
            return os.environ.get("HF_TOKEN") or os.environ.get("EMENDER_API_KEY")
        try:
            return file.read_text().strip()
        except OSError as error:
            raise Usage(f"The file {file} of --token-file cannot be read: {error.strerror}.") from None

    return read


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    summary, _, codes = (__doc__ or "").partition("Exit codes:")
    parser = argparse.ArgumentParser(
        description=summary.partition("\n")[0],
        epilog="exit codes:" + codes,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    address = os.environ.get("HF_ENDPOINT") or os.environ.get("EMENDER_URL") or ""
    parser.add_argument("--endpoint", default=address, help="the URL of Emender; default: HF_ENDPOINT, EMENDER_URL")
    parser.add_argument("--model", default="", help="NAMESPACE/NAME")
    parser.add_argument("--revision", default="main", help="an alias, version or commit (default: main)")
    parser.add_argument("--folder", type=Path, required=True, help="where the versions are kept")
    parser.add_argument("--key", type=Path, action="append", default=[], help="a public key, or a folder of them")
    parser.add_argument("--unsigned", action="store_true", help="ask for no signature, only that digests are right")
    parser.add_argument("--token-file", type=Path, help="a file with the API key")
    parser.add_argument("--watch", type=float, metavar="SECONDS", help="follow the alias, looking so often")
    parser.add_argument("--keep", type=int, default=2, help="versions to keep, the current one too (default: 2)")
    parser.add_argument("--on-change", default="", metavar="COMMAND", help="run for each version that became current")
    parser.add_argument("--rollback", action="store_true", help="go back to the version before")
    parser.add_argument("--check", action="store_true", help="only verify the current version")
    parser.add_argument("--exit-code", action="store_true", help=f"exit with {CHANGED} where the version changed")
    parser.add_argument("--json", action="store_true", help="write JSON lines")
    given = vars(parser.parse_args(arguments))
    return run(Options(token=_token(given.pop("token_file")), **given))


if __name__ == "__main__":
    sys.exit(main())
