#!/usr/bin/env python3
"""Keep a folder at the checkpoint that an alias of Emender names: verified, swapped atomically, with a rollback.

    python pull.py --endpoint https://emender.example --model emender/emoji --revision production \
        --folder /srv/models/emoji --key public.pem [--watch 60] [--on-change "systemctl reload draw"]

This is one file that runs on its own, on a POSIX system with Python 3.11 and three packages:
`pip install huggingface_hub model-signing pyOpenSSL`. The API key (scope `read`) is in EMENDER_API_KEY or HF_TOKEN, or
in the file of --token-file.

    FOLDER/<commit>/…   a whole pipeline, read-only; files that two checkpoints share are hard links
    FOLDER/current      a symbolic link to the checkpoint in use, changed by one rename(2); FOLDER/previous likewise

huggingface_hub downloads a checkpoint to FOLDER/.pull. It becomes `current` only if `model.sig` signs exactly these
files with a key of --key. `current` is whole at any time, also if this program is killed. The next run keeps the files
that were complete and downloads the others from their start.

Exit codes:
    0  the folder is at the checkpoint (with --exit-code: 0 unchanged, 10 changed)
    2  wrong arguments                     6  the signature or a file is wrong; `current` stays
    3  no response, or a server error      7  a file or the folder cannot be read or written
    4  the API key was refused             8  another pull uses the folder
    5  unknown or retracted checkpoint     9  the command of --on-change failed; it runs again next time
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import hashlib
import json
import os
import random
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_public_key
from filelock import FileLock, Timeout
from huggingface_hub import HfApi, ModelInfo
from huggingface_hub.utils.tqdm import disable_progress_bars
from model_signing import hashing, verifying

MANIFEST, SIGNATURE = "manifest.json", "model.sig"
COMMIT = re.compile(r"[0-9a-f]{40}")
MAX_PAUSE_SECONDS = 900.0
LINE = "{commit} {event}, {downloaded} files downloaded ({bytes} bytes), signed by {key}"

ExitCode = IntEnum(
    "ExitCode", "USAGE UNREACHABLE UNAUTHORIZED NOT_FOUND UNVERIFIED DISK BUSY COMMAND_FAILED CHANGED", start=2
)
STATUS_CODES = dict.fromkeys((401, 403), ExitCode.UNAUTHORIZED) | dict.fromkeys((404, 410), ExitCode.NOT_FOUND)


class PullError(Exception):
    """The reason why a pull failed, and its exit code."""

    def __init__(self, code: ExitCode, detail: str) -> None:
        super().__init__(detail)
        self.code = code


# ---- verification


def read_keys(paths: Sequence[Path]) -> dict[str, Path]:
    """Read public keys from PEM files, and from the `*.pem` files of folders. Raises `PullError`.

    A key's id is the SHA-256 of its PEM; `model.sig` names its key by it.
    """
    keys = {}
    for file in (file for path in paths for file in (sorted(path.glob("*.pem")) if path.is_dir() else [path])):
        try:
            pem = load_pem_public_key(file.read_bytes()).public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
        except Exception:  # its message may quote the file
            raise PullError(ExitCode.USAGE, f"{file} is not a public key in PEM.") from None
        keys[hashlib.sha256(pem).hexdigest()] = file
    if not keys:
        raise PullError(ExitCode.USAGE, f"There is no public key (*.pem) in {', '.join(map(str, paths))}.")
    return keys


def verify(folder: Path, keys: Mapping[str, Path] | None) -> str | None:
    """Verify that a folder has exactly the files that were published, and return the id of the key that signed them.

    Without keys, compare the files with `manifest.json`. Raises `PullError`, which names the files that differ.
    """
    try:
        if keys is None:
            _require_unchanged(folder, json.loads((folder / MANIFEST).read_bytes())["files"])
            return None
        bundle = json.loads((folder / SIGNATURE).read_bytes())
        signer = str(bundle["verificationMaterial"]["publicKey"]["hint"])
        if signer not in keys:
            raise ValueError(f"{SIGNATURE} is by the key {signer[:64]}; trusted keys are {', '.join(keys)}")
        verifier = verifying.Config().use_elliptic_key_verifier(public_key=keys[signer])
        # Links to files are fine, as in huggingface_hub's cache; links to folders would not be searched
        linked = any(path.is_symlink() and path.is_dir() for path in folder.rglob("*"))
        verifier.set_hashing_config(hashing.Config().set_allow_symlinks(not linked))
        try:
            verifier.verify(folder.resolve(), folder / SIGNATURE)
        except ValueError:  # signed, but some files differ: name them
            resources = json.loads(base64.b64decode(bundle["dsseEnvelope"]["payload"]))["predicate"]["resources"]
            _require_unchanged(folder, {file["name"]: file["digest"] for file in resources})
            raise
        return signer
    except Exception as error:  # of many kinds: from the signature, the JSON, the digests
        if isinstance(error, OSError) and not isinstance(error, FileNotFoundError):
            raise
        detail = f"{folder} does not match its {MANIFEST if keys is None else SIGNATURE}"
        raise PullError(ExitCode.UNVERIFIED, f"{detail}: {str(error) or type(error).__name__}.") from None


def _require_unchanged(folder: Path, files: Mapping[str, str]) -> None:
    if changes := find_changes(folder, files):
        raise ValueError("; ".join(f"{path}: {change}" for path, change in list(changes.items())[:5]))


def find_changes(folder: Path, files: Mapping[str, str]) -> dict[str, str]:
    """Compare a folder with SHA-256 digests by path. Return each path that is altered, missing or unexpected."""
    ignored = {MANIFEST, SIGNATURE, ".cache"} - files.keys()  # huggingface_hub writes .cache
    manifest = hashing.Config().set_allow_symlinks(True).set_ignored_paths(paths=ignored).hash(folder)
    found = {file.identifier: file.digest.digest_hex for file in manifest.resource_descriptors()}
    changed = sorted(path for path in files.keys() | found.keys() if files.get(path) != found.get(path))
    return {path: "unexpected" if path not in files else "altered" if path in found else "missing" for path in changed}


# ---- the folder


@dataclass
class ReleaseDirectory:
    """The checkpoints in a folder."""

    folder: Path
    keys: Mapping[str, Path] | None
    """Files of the trusted public keys by key id; None if no signature is required."""

    def read_link(self, name: str) -> str:
        """Return the commit that a link such as `current` names, or an empty string."""
        return os.readlink(self.folder / name) if (self.folder / name).is_symlink() else ""

    def write_link(self, name: str, commit: str) -> None:
        """Create or change a link by one rename."""
        new = self.folder / ".pull" / "link"
        new.unlink(missing_ok=True)
        new.symlink_to(commit)
        os.replace(new, self.folder / name)

    def list_releases(self) -> list[Path]:
        """List the installed checkpoints, newest first."""
        found = [path for path in self.folder.glob("*") if COMMIT.fullmatch(path.name)]
        return sorted(found, key=lambda path: path.stat().st_mtime, reverse=True)

    def link_known_files(self, info: ModelInfo, staged: Path) -> None:
        """Hard-link files that installed checkpoints have. The download checks their digests."""
        for release in self.list_releases():
            with contextlib.suppress(OSError, ValueError, LookupError, TypeError, AttributeError):  # it is damaged
                digests = json.loads((release / MANIFEST).read_bytes())["files"]
                for file in info.siblings or ():
                    path = staged / file.rfilename
                    if file.blob_id and digests.get(file.rfilename, "").startswith(file.blob_id):  # the digest's start
                        path.parent.mkdir(parents=True, exist_ok=True)
                        with contextlib.suppress(OSError):  # it exists already, or the file system has no links
                            os.link(release / file.rfilename, path)

    def install(self, staged: Path) -> None:
        """Move a verified checkpoint to its place and make it `current`."""
        target = self.folder / staged.name
        if target.name == self.read_link("current"):  # it is in use: repair it file by file
            shutil.copytree(staged, target, copy_function=os.replace, dirs_exist_ok=True)
            verify(target, self.keys)  # it may have files that were added
        else:
            shutil.rmtree(target, ignore_errors=True)
            os.replace(staged, target)
        self.make_current(target.name)

    def make_current(self, commit: str) -> None:
        """Point `current` at an installed checkpoint, and `previous` at the one before it."""
        os.sync()  # a power failure must not leave links to files that were never written
        if (now := self.read_link("current")) not in ("", commit):
            self.write_link("previous", now)  # first: if killed in between, both links are valid
        self.write_link("current", commit)

    def delete_old(self, keep: int) -> None:
        """Delete unused downloads, and checkpoints beyond `keep`; never `current` or `previous`."""
        used = {self.read_link("current"), self.read_link("previous")} - {""}
        others = [path for path in self.list_releases() if path.name not in used]
        for path in (*(self.folder / ".pull").glob("?" * 40), *others[max(0, keep - len(used)) :]):
            shutil.rmtree(path)


@dataclass
class Outcome:
    """The result of a run."""

    commit: str
    event: str = "unchanged"
    """Also `changed`, or `held` if the alias names a checkpoint that was rolled back here."""
    key: str | None = None
    downloaded: int = 0
    bytes: int = 0


def update(directory: ReleaseDirectory, api: HfApi, args: argparse.Namespace, known: str) -> Outcome:
    """Bring the folder to the revision. The commit `known` was verified before and is not verified again."""
    info = api.model_info(args.model, revision=args.revision, files_metadata=True)
    commit, now = info.sha or "", directory.read_link("current")
    if not COMMIT.fullmatch(commit):  # it becomes the name of a folder
        raise PullError(ExitCode.UNREACHABLE, "The response has no commit: it is not from Emender.")
    if commit == directory.read_link(".pull/held"):
        return Outcome(now, "held")
    (directory.folder / ".pull" / "held").unlink(missing_ok=True)  # the alias has moved since the rollback
    if commit == now:
        with contextlib.suppress(PullError):
            return Outcome(now, key=None if now == known else verify(directory.folder / now, directory.keys))
    return download(directory, api, args, info)


def download(directory: ReleaseDirectory, api: HfApi, args: argparse.Namespace, info: ModelInfo) -> Outcome:
    """Download a checkpoint, verify it and make it `current`."""
    names = [file.rfilename for file in info.siblings or ()]
    # Older versions of huggingface_hub would write there
    if outside := [name for name in names if name.startswith("/") or ".." in name.split("/")]:
        raise PullError(ExitCode.UNVERIFIED, f"{info.sha} names {outside[0]}, which is outside of its folder.")
    staged = directory.folder / ".pull" / str(info.sha)
    directory.link_known_files(info, staged)
    for part in staged.rglob("*.incomplete"):  # of a download that was killed; huggingface_hub does not resume it
        part.unlink()
    # With an empty cache: from the user's, it would copy into files that are hard links
    api.snapshot_download(args.model, revision=info.sha, local_dir=staged, cache_dir=staged.with_name("cache"))
    if missing := [name for name in names if not (staged / name).is_file()]:
        # When the service is unreachable, huggingface_hub accepts an incomplete folder
        raise PullError(ExitCode.UNREACHABLE, f"The download lacks {', '.join(missing[:5])}.")
    shutil.rmtree(staged / ".cache")  # if the verification fails, the next download checks every digest
    key = verify(staged, directory.keys)
    if (model := json.loads((staged / MANIFEST).read_bytes())["base_model"]["name"]) != args.model.partition("/")[2]:
        raise PullError(ExitCode.UNVERIFIED, f"{info.sha} is a checkpoint of {model}, not of {args.model}.")
    files = [path for path in staged.rglob("*") if path.is_file()]
    new = [path.stat().st_size for path in files if path.stat().st_nlink == 1]
    for path in files:
        path.chmod(0o444)
    directory.install(staged)
    directory.delete_old(args.keep)
    return Outcome(staged.name, "changed", key, len(new), sum(new))


def roll_back(directory: ReleaseDirectory) -> Outcome:
    """Exchange `current` and `previous`. The folder stays there until the alias names another checkpoint."""
    now, previous = directory.read_link("current"), directory.read_link("previous")
    if not (previous and (directory.folder / previous).is_dir()):
        raise PullError(ExitCode.NOT_FOUND, f"There is no previous checkpoint in {directory.folder}.")
    key = verify(directory.folder / previous, directory.keys)
    directory.write_link(".pull/held", now if previous != directory.read_link(".pull/held") else "none")
    directory.make_current(previous)
    return Outcome(previous, "changed", key)


def run_command(directory: ReleaseDirectory, command: Sequence[str], commit: str) -> None:
    """Run the command of --on-change unless it succeeded for this checkpoint. If killed, it runs again."""
    if commit == directory.read_link(".pull/announced"):
        return
    environment = {name: value for name, value in os.environ.items() if name not in ("HF_TOKEN", "EMENDER_API_KEY")}
    environment |= {"EMENDER_COMMIT": commit, "EMENDER_CURRENT": str(directory.folder.absolute() / "current")}
    try:
        subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise PullError(ExitCode.COMMAND_FAILED, f"{error} {commit} is current.") from None
    directory.write_link(".pull/announced", commit)


# ---- the command


def run_once(args: argparse.Namespace, last: Outcome) -> Outcome:
    """Do what the arguments say, and print the outcome unless it is the last one."""
    directory = ReleaseDirectory(args.folder, None if args.unsigned else read_keys(args.key))
    # The kernel releases the lock if this process is killed
    with contextlib.nullcontext() if args.check else FileLock(args.folder / ".pull" / "lock", timeout=0):
        if args.check:
            outcome = Outcome(directory.read_link("current"), key=verify(args.folder / "current", directory.keys))
        elif args.rollback:
            outcome = roll_back(directory)
        else:
            token = args.token_file.read_text().strip() if args.token_file else os.environ.get("EMENDER_API_KEY")
            api = HfApi(args.endpoint.rstrip("/"), token=token or os.environ.get("HF_TOKEN") or False)
            outcome = update(directory, api, args, known=last.commit)
        if outcome.event == "changed" or (outcome.commit, outcome.event) != (last.commit, last.event):
            _print(args, vars(outcome) | {"previous": directory.read_link("previous") or None})
        if args.on_change and not args.check:
            run_command(directory, args.on_change, outcome.commit)
    return outcome


def run(args: argparse.Namespace) -> int:
    """Do what the arguments say, once or with --watch forever. Return the exit code."""
    failures, last = 0, Outcome("")
    if args.json or not sys.stderr.isatty():
        disable_progress_bars()
    while True:
        try:
            last, failures = run_once(args, last), 0
            code = ExitCode.CHANGED if last.event == "changed" and args.exit_code else 0
        except Exception as error:  # of the network, the disk, or a response of another form
            code, failures = find_exit_code(error), min(failures + 1, 20)
            detail = f"{args.endpoint}: {error}" if code == ExitCode.UNREACHABLE else str(error)
            _print(args, {"event": "error", "error": code.name.lower(), "code": code, "detail": detail})
        if args.watch is None or code == ExitCode.USAGE:
            return code
        pause = max(0.1, min(args.watch * 2**failures, max(args.watch, MAX_PAUSE_SECONDS)))
        time.sleep(pause * random.uniform(0.9, 1.1))  # machines that started together must not ask together


def find_exit_code(error: Exception) -> ExitCode:
    if isinstance(error, PullError | Timeout):
        return ExitCode.BUSY if isinstance(error, Timeout) else error.code
    if isinstance(error, OSError) and error.errno:  # errors of huggingface_hub are OSErrors too, without a number
        return ExitCode.DISK
    status = getattr(getattr(error.__cause__ or error, "response", None), "status_code", 0)
    return STATUS_CODES.get(status, ExitCode.UNREACHABLE)


def _print(args: argparse.Namespace, event: Mapping[str, object]) -> None:
    line = json.dumps(event) if args.json else event.get("detail") or LINE.format(**event)
    print(line, file=sys.stderr if "detail" in event and not args.json else sys.stdout, flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the arguments and run the command. Return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    option, trust = parser.add_argument, parser.add_mutually_exclusive_group(required=True).add_argument
    mode, endpoint = parser.add_mutually_exclusive_group().add_argument, os.environ.get("HF_ENDPOINT", "")
    option("--endpoint", default=os.environ.get("EMENDER_URL", endpoint), help="URL (default: EMENDER_URL)")
    option("--model", default="", help="NAMESPACE/NAME")
    option("--revision", default="main", help="alias, version or commit (default: main)")
    option("--folder", type=Path, required=True, help="folder of the checkpoints")
    trust("--key", type=Path, action="append", help="trusted public key (PEM), or a folder of keys (repeatable)")
    trust("--unsigned", action="store_true", help="require no signature, only correct digests: trust the server")
    option("--token-file", type=Path, help="file with the API key")
    mode("--watch", type=float, metavar="SECONDS", help="follow the alias; look this often")
    mode("--rollback", action="store_true", help="return to the previous checkpoint")
    mode("--check", action="store_true", help="only verify the current checkpoint")
    option("--keep", type=int, default=2, help="number of checkpoints to keep (default: 2)")
    option("--on-change", type=shlex.split, metavar="COMMAND", help="run when another checkpoint is current")
    option("--exit-code", action="store_true", help="exit with 10 if the checkpoint changed")
    option("--json", action="store_true", help="print JSON lines")
    args = parser.parse_args(arguments)
    if not (args.rollback or args.check or (args.endpoint and re.fullmatch(r"[\w.-]+/[\w.-]+", args.model))):
        parser.error("give --endpoint, the URL of Emender, and --model as NAMESPACE/NAME")
    return run(args)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
