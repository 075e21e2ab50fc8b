"""Estimating second moments of the keys: what the text encoder's memories are asked for in everyday use."""

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from editing import ENGINE_VERSION
from editing.encoders.clip import EditableEncoder
from editing.errors import EditingError, ForeignSums
from editing.prompts import PromptTokenizer
from editing.second_moments.moments import SecondMoments, mirrored, packed, unpacked

Batch = list[tuple[int, ...]]
"""Token ids of prompts that are encoded together."""

_WINDOW = 64  # batches whose captions are sorted by length: bounds what is held of the stream
_BLOCK = 512  # rows of a moment added at once
_SAVING_SHARE = 0.05  # of the time may go to saving partial sums


@torch.no_grad()
def estimate_second_moments(
    encoder: EditableEncoder,
    captions: Iterable[str],
    *,
    layers: Sequence[int] | None = None,
    batch_size: int = 64,
    progress: Callable[[int], None] | None = None,
    partial: str | Path | None = None,
) -> SecondMoments:
    """E[k kᵀ] of the given layers over captions, streamed: memory holds some batches' captions and the sums.

    Every token counts once, BOS and EOS with it; a caption too long is cut as inference cuts it. Sums are float64.
    `progress` is called with the number of captions counted so far; what it raises ends the run.

    `partial` names a file in which the sums are kept every now and then. A run that finds it there goes on from it, and
    gives the bits of a run that was never interrupted. Raises `ForeignSums` where it is of another encoder, of other
    captions, layers or batches. The file is the caller's to delete.
    """
    layers = encoder.default_edited_layers if layers is None else tuple(sorted(layers))
    batches = _batches(encoder.tokenizer, captions, size=batch_size)
    sums = _Sums(encoder, layers)
    kept = _PartialSums(Path(partial), sums) if partial is not None else None
    if kept and kept.resume(batches) and progress:
        progress(sums.captions)
    for batch in batches:
        sums.add(batch)
        if kept:
            kept.added(batch)
        if progress:
            progress(sums.captions)
    return sums.mean()


class _Sums:
    """Σ k kᵀ of each layer over the batches added, float64: of the upper triangle alone, for half the work."""

    def __init__(self, encoder: EditableEncoder, layers: Sequence[int]) -> None:
        m = encoder.mlp_width
        self.encoder = encoder
        self.layers = {layer: torch.zeros(m, m, dtype=torch.float64, device=encoder.device) for layer in layers}
        self.captions = self.tokens = 0

    def add(self, batch: Batch) -> None:
        encoder = self.encoder
        lengths = torch.tensor([len(prompt) for prompt in batch], device=encoder.device)
        states = encoder.embed(encoder.ids(batch, full_length=False))  # (b, s, d)
        attended = torch.arange(states.shape[1], device=encoder.device) < lengths[:, None]  # (b, s)
        for layer in range(max(self.layers) + 1):
            stream, keys = encoder.attend(layer, states)
            if layer in self.layers:
                _add_products(self.layers[layer], keys[attended].double())
            states = stream + encoder.fc2(layer)(keys)
        self.captions += len(batch)
        self.tokens += int(lengths.sum())

    def mean(self) -> SecondMoments:
        """E[k kᵀ]. The sums are given up layer by layer: memory has no room for both."""
        if not self.tokens:
            raise EditingError("no captions to estimate second moments from")
        moments = {}
        for layer in sorted(self.layers):
            moments[layer] = mirrored((self.layers.pop(layer) / self.tokens).float()).double().cpu()
        return SecondMoments(moments, captions=self.captions, tokens=self.tokens, encoder=self.encoder.name)


class _PartialSums:
    """Sums kept in a file, so that a run that was killed goes on where it was.

    The file's `trace` is the sha256 of all that went into the sums: encoder, layers, and every batch in its order.
    """

    def __init__(self, path: Path, sums: _Sums) -> None:
        self.path = path
        self._sums = sums
        self._trace = hashlib.sha256(_fingerprint(sums.encoder, tuple(sums.layers)))
        self._due = 0.0

    def resume(self, batches: Iterator[Batch]) -> bool:
        """Take up the sums in the file, if there is one, and pass over the batches that they hold."""
        if not self.path.exists():
            return False
        captions, tokens, trace, totals = self._read()
        passed = 0
        while passed < captions and (batch := next(batches, None)):
            self._trace.update(repr(batch).encode())
            passed += len(batch)
        if self._trace.hexdigest() != trace:
            raise ForeignSums(
                f"{self.path.name} holds sums of another encoder, other captions, layers or batches; "
                "delete it to begin anew"
            )
        for layer, total in self._sums.layers.items():
            total.copy_(unpacked(totals[layer]))
        self._sums.captions, self._sums.tokens = captions, tokens
        return True

    def _read(self) -> tuple[int, int, str, dict[int, Tensor]]:
        """Captions, tokens and trace of the file, and its sums as they are packed."""
        try:
            with safe_open(self.path, framework="pt") as file:
                facts = json.loads(file.metadata()["partial_sums"])
                totals = {int(key.removeprefix("layer_")): file.get_tensor(key) for key in file.keys()}
                return facts["captions"], facts["tokens"], facts["trace"], totals
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise ForeignSums(f"{self.path.name} holds no partial sums: {error}; delete it to begin anew") from error

    def added(self, batch: Batch) -> None:
        """Note a batch that was added to the sums; write them where the last time is long enough ago."""
        self._trace.update(repr(batch).encode())
        start = time.monotonic()
        if start < self._due:
            return
        self._save()
        end = time.monotonic()
        self._due = end + (end - start) / _SAVING_SHARE

    def _save(self) -> None:
        """Whole or not at all, even if the machine is switched off."""
        facts = {"captions": self._sums.captions, "tokens": self._sums.tokens, "trace": self._trace.hexdigest()}
        tensors = {f"layer_{layer}": packed(total).cpu() for layer, total in self._sums.layers.items()}
        temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        save_file(tensors, temporary, metadata={"partial_sums": json.dumps(facts)})
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(self.path)


def _batches(tokenizer: PromptTokenizer, captions: Iterable[str], *, size: int) -> Iterator[Batch]:
    """Prompts of about one length together, so that there is little padding: each window of the captions is sorted."""
    stream = enumerate(captions)
    while window := [
        tokenizer.encode(caption, pointer=f"/captions/{n}").ids for n, caption in islice(stream, _WINDOW * size)
    ]:
        window.sort(key=len)
        for start in range(0, len(window), size):
            yield window[start : start + size]


def _fingerprint(encoder: EditableEncoder, layers: tuple[int, ...]) -> bytes:
    """sha256 of what makes the keys of these layers: the engine, the modules and their weights."""
    parts = torch.nn.ModuleList([encoder.embeddings, *encoder.layers[: max(layers) + 1]])
    digest = hashlib.sha256(f"{ENGINE_VERSION} {layers} {parts}".encode())
    for name, weight in parts.state_dict().items():
        digest.update(f"{name} {weight.dtype}".encode())
        digest.update(weight.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.digest()


def _add_products(total: Tensor, keys: Tensor) -> None:
    """Add keysᵀ keys to the upper triangle of total (m, m), block of rows by block; keys (t, m).

    What a block reaches below the diagonal means nothing. At m = 3072 this takes 0.55 of the time of the whole product.
    """
    for start in range(0, len(total), _BLOCK):
        total[start : start + _BLOCK, start:].addmm_(keys[:, start : start + _BLOCK].T, keys[:, start:])
