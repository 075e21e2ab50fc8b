"""Estimate the second moments E[k kᵀ] of the keys over captions: the keys that a text encoder reads in ordinary use.

Shapes: b captions of a batch, s positions, t tokens, d width, m MLP width.
"""

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
from editing.encoders.base import TextEncoder
from editing.encoders.decoder import DecoderEncoder
from editing.encoders.prefix_trees import PackedTrees
from editing.errors import EditingError, ForeignSums
from editing.second_moments.moments import SecondMoments, mirror_triangle, pack_triangle, unpack_triangle

Batch = list[tuple[int, ...]]
"""Token ids of captions that are encoded together."""

_WINDOW = 64  # batches whose captions are sorted by length: bounds the captions in memory
_BLOCK = 512  # rows of a moment that are added at once
_SAVING_SHARE = 0.05  # of the time goes to saving partial sums at most


@torch.no_grad()
def estimate_second_moments(
    encoder: TextEncoder,
    captions: Iterable[str],
    *,
    layers: Sequence[int] | None = None,
    batch_size: int = 64,
    progress: Callable[[int], None] | None = None,
    partial: str | Path | None = None,
) -> SecondMoments:
    """Estimate E[k kᵀ] of the given layers. Captions are streamed: memory holds some batches of them and the sums.

    Every token counts once, BOS and EOS included, but for the text that a family puts before each prompt: its tokens
    have the same keys in every caption and count once in all. Captions are truncated as inference truncates them; the
    result has their number. Sums are float64.
    `progress` is called with the number of captions so far, and may raise to end the run.

    `partial` names a file for the partial sums, written from time to time. A run that finds the file resumes from it,
    and gives the bits of an uninterrupted run. Raises `ForeignSums` if it belongs to another encoder or to other
    captions, layers or batches. The caller deletes the file.
    """
    layers = encoder.default_edited_layers if layers is None else tuple(sorted(layers))
    sums = _Sums(encoder, layers)
    batches = _batch_captions(sums, captions, size=batch_size)
    file = _PartialSums(Path(partial), sums) if partial is not None else None
    if file and file.resume(batches) and progress:
        progress(sums.captions)
    for batch in batches:
        sums.add(batch)
        if file:
            file.note(batch)
        if progress:
            progress(sums.captions)
    return sums.average()


class _Sums:
    """Σ k kᵀ of each layer over the batches so far, float64. Only the upper triangle is computed, for half the work."""

    def __init__(self, encoder: TextEncoder, layers: Sequence[int]) -> None:
        m = encoder.mlp_width
        self.encoder = encoder
        self.layers = {layer: torch.zeros(m, m, dtype=torch.float64, device=encoder.device) for layer in layers}
        self.captions = self.tokens = self.truncated = 0
        # The start-of-text token of CLIP counts in every caption, as published.
        self._prefix = 0 if encoder.spec.kind == "clip" or not encoder.is_causal else encoder.tokenizer.prefix_length
        """The number of first tokens that count once in all."""
        self.prefix_traces: dict[int, float] = {}
        """Σ ‖k‖² of those tokens, by layer."""

    def add(self, batch: Batch) -> None:
        run = self._run_trees if isinstance(self.encoder, DecoderEncoder) else self._run_padded
        for layer, (keys, weights) in enumerate(run(batch)):  # (t, m), (t,)
            if layer in self.layers:
                _add_products(self.layers[layer], keys.double() * weights.sqrt()[:, None])
                if self._prefix and not self.captions:
                    self.prefix_traces[layer] = float(keys[: self._prefix].double().square().sum())
        self.captions += len(batch)
        self.tokens += int(weights.sum())

    def _run_padded(self, batch: Batch) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield for each layer the keys of the captions' tokens (t, m), and how often each counts (t,)."""
        encoder = self.encoder
        padded = encoder.pad(batch, full_length=False)
        states = encoder.embed(padded.ids)  # (b, s, d)
        contexts = encoder.build_contexts(states, mask=padded.mask)
        counted = padded.mask  # (b, s): no padding
        if encoder.reads_padding:  # and so does the generator: one position of it stands for all
            counted = counted | (torch.arange(counted.shape[1], device=counted.device) == padded.ends[:, None] + 1)
        for layer in range(max(self.layers) + 1):
            block = encoder.blocks[layer]
            stream = block.attend(states, contexts[layer])  # (b, s, d)
            keys = block.keys(stream)  # (b, s, m)
            own = keys[counted]
            yield own, torch.ones(len(own), dtype=torch.float64, device=own.device)
            states = block.add(stream, block.output_matrix(keys))

    def _run_trees(self, batch: Batch) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the same. Captions share their first tokens: a family may put a long text before each."""
        nodes = PackedTrees(self.encoder, [[(ids, len(ids) - 1) for ids in batch]])
        weights = nodes.visits.double()
        weights[nodes.depths < self._prefix] = 0
        weights[: self._prefix] = float(not self.captions)  # the first nodes are those of the prefix
        counted = weights > 0
        states = nodes.embed()  # (N, d)
        for layer in range(max(self.layers) + 1):
            block = self.encoder.blocks[layer]
            stream = nodes.attend(layer, block, states)  # (N, d)
            keys = nodes.prepare_keys(block, stream)
            yield keys(counted), weights[counted]
            states = nodes.run_mlp(block, stream, keys)

    def average(self) -> SecondMoments:
        """Return E[k kᵀ] and drop the sums layer by layer: both do not fit into memory."""
        if not self.tokens:
            raise EditingError("there are no captions to estimate second moments from: give at least one")
        moments, shares = {}, {}
        for layer in sorted(self.layers):
            # Rounded to the float32 of the file, so that estimated and loaded moments are equal.
            moments[layer] = mirror_triangle((self.layers.pop(layer) / self.tokens).float()).double().cpu()
            if self._prefix:
                trace = float(moments[layer].trace()) * self.tokens
                shares[layer] = round(self.prefix_traces[layer] / max(trace, 1e-300), 6)
        return SecondMoments(
            moments,
            captions=self.captions,
            tokens=self.tokens,
            truncated=self.truncated,
            encoder=self.encoder.name,
            prefix_shares=shares,
        )


class _PartialSums:
    """Sums in a file, from which a run that was killed resumes.

    The file's `trace` is the sha256 of everything that the sums depend on: encoder, layers, and every batch in order.
    """

    def __init__(self, path: Path, sums: _Sums) -> None:
        self.path = path
        self._sums = sums
        self._trace = hashlib.sha256(_fingerprint(sums.encoder, tuple(sums.layers)))
        self._next_save = 0.0

    def resume(self, batches: Iterator[Batch]) -> bool:
        """Load the sums from the file and skip the batches that they contain. Return False if there is no file."""
        if not self.path.exists():
            return False
        captions, tokens, trace, prefix_traces, totals = self._read()
        skipped = 0
        while skipped < captions and (batch := next(batches, None)):
            self._trace.update(repr(batch).encode())
            skipped += len(batch)
        if self._trace.hexdigest() != trace:
            raise ForeignSums(
                f"{self.path.name} has sums of another encoder, or of other captions, layers or batches: "
                "delete it to start again"
            )
        for layer, total in self._sums.layers.items():
            total.copy_(unpack_triangle(totals[layer]))
        self._sums.captions, self._sums.tokens, self._sums.prefix_traces = captions, tokens, prefix_traces
        return True

    def _read(self) -> tuple[int, int, str, dict[int, float], dict[int, Tensor]]:
        """Return captions, tokens, trace and the prefix's traces of the file, and its packed sums."""
        try:
            with safe_open(self.path, framework="pt") as file:
                facts = json.loads(file.metadata()["partial_sums"])
                totals = {int(key.removeprefix("layer_")): file.get_tensor(key) for key in file.keys()}
                prefix = {int(layer): float(trace) for layer, trace in facts["prefix"].items()}
                return facts["captions"], facts["tokens"], facts["trace"], prefix, totals
        except (SafetensorError, KeyError, TypeError, ValueError, AttributeError) as error:
            raise ForeignSums(f"{self.path.name} has no partial sums ({error}): delete it to start again") from error

    def note(self, batch: Batch) -> None:
        """Note a batch that the sums contain now. Save them if enough time has passed since the last save."""
        self._trace.update(repr(batch).encode())
        start = time.monotonic()
        if start < self._next_save:
            return
        self._save()
        end = time.monotonic()
        self._next_save = end + (end - start) / _SAVING_SHARE

    def _save(self) -> None:
        """Replace the file as a whole, also if the machine loses power."""
        facts = {
            "captions": self._sums.captions,
            "tokens": self._sums.tokens,
            "trace": self._trace.hexdigest(),
            "prefix": self._sums.prefix_traces,
        }
        tensors = {f"layer_{layer}": pack_triangle(total).cpu() for layer, total in self._sums.layers.items()}
        temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        save_file(tensors, temporary, metadata={"partial_sums": json.dumps(facts)})
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(self.path)


def _batch_captions(sums: _Sums, captions: Iterable[str], *, size: int) -> Iterator[Batch]:
    """Yield batches of captions of similar lengths, with little padding: each window is sorted by length.

    `sums` counts the truncated ones, also of batches that a resumed run skips.
    """
    stream, encode = enumerate(captions), sums.encoder.tokenizer.encode
    while prompts := [encode(caption, pointer=f"/captions/{n}") for n, caption in islice(stream, _WINDOW * size)]:
        sums.truncated += sum(prompt.truncated for prompt in prompts)
        window = sorted((prompt.ids for prompt in prompts), key=len)
        for start in range(0, len(window), size):
            yield window[start : start + size]


def _fingerprint(encoder: TextEncoder, layers: tuple[int, ...]) -> bytes:
    """Return the sha256 of what the keys of these layers depend on: engine version, prompts, modules and weights."""
    parts = torch.nn.ModuleList([encoder.embeddings, *(block.layer for block in encoder.blocks[: max(layers) + 1])])
    format = f"{encoder.spec} {encoder.tokenizer.max_length}"
    digest = hashlib.sha256(f"{ENGINE_VERSION} {layers} {format} {parts}".encode())
    for name, weight in parts.state_dict().items():
        digest.update(f"{name} {weight.dtype}".encode())
        digest.update(weight.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.digest()


def _add_products(total: Tensor, keys: Tensor) -> None:
    """Add Σ k kᵀ = keysᵀ keys of keys (t, m) to the upper triangle of total (m, m), in blocks of rows.

    A block also writes some entries below the diagonal, which are ignored. At m = 3072 this takes 0.55 of the time of
    the whole product.
    """
    for start in range(0, len(total), _BLOCK):
        total[start : start + _BLOCK, start:].addmm_(keys[:, start : start + _BLOCK].T, keys[:, start:])
