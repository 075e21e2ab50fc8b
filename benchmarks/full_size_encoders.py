"""Stage II on text encoders of full size, against a plain float64 implementation on one layer.

    python -m benchmarks.full_size_encoders --json full_size_encoders.json

One encoder has Qwen3-4B's size (2560 / 9728 / 36 layers) in the layout of Z-Image. The other has that of T5-XXL (4096
/ 10240 / 24 layers) in the layout of PixArt-Σ, which masks the padding. On request it has that of SD3, where each
prompt runs with its padding at 256 positions ("t5-xxl-padded", hours for 300 edits). Weights are random, in bfloat16
and in several files; second moments and values are random, too. There are three templates, subjects of two tokens and a
small vocabulary. Only the layers up to the last edited one are in the files.

Ours begins with the files: it loads the encoder up to the last edited layer, reads and factors the second moments,
and solves. The plain implementation runs the library's own model in float64 over the prompts and solves the dense
system of the first edited layer. Each is a process of its own; its peak memory includes Python and its libraries, and
files that are mapped.

The last line on stdout is JSON. The exit status is 1 where ΔW differs by more than the tolerance, or memory exceeds the
limit.
"""

import argparse
import copy
import json
import os
import re
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors
from torch import Tensor

from benchmarks.measuring import child, difference, measured, peak_bytes, say
from editing.edits import ConceptEdit, DestinationPrompt
from editing.encoders.load import load_encoder
from editing.families.layout import choose_default_layers
from editing.families.registry import find_family
from editing.prompts import PromptTokenizer
from editing.second_moments.factors import FactoredMoments
from editing.second_moments.moments import SecondMoments
from editing.stage_two.update import compute_update
from editing.values import EditValue, EncoderValue

ALPHA, MOMENT_WEIGHT = 0.5, 1000.0  # the defaults
TOLERANCE = 1e-5  # ‖ΔW - ΔW plain‖ / ‖ΔW plain‖
MEMORY_LIMIT = 12 * 2**30
WORDS = 2000
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|> {{ message.role }}\n{{ message.content }} <|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|> assistant\n{% endif %}"
)


@dataclass(frozen=True)
class Size:
    """An encoder at full size or smaller."""

    model: str
    """Its class in transformers."""
    pipeline: str
    """The pipeline whose layout its folder has."""
    config: dict[str, Any]
    mlp_width: str
    """The name of m in the configuration."""


T5_XXL = {
    "d_model": 4096,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "d_kv": 64,
    "feed_forward_proj": "gated-gelu",
}
SIZES = {
    "qwen3-4b": Size(
        "Qwen3ForCausalLM",
        "ZImagePipeline",
        {
            "hidden_size": 2560,
            "intermediate_size": 9728,
            "num_hidden_layers": 36,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "tie_word_embeddings": True,
        },
        "intermediate_size",
    ),
    "t5-xxl": Size("T5EncoderModel", "PixArtSigmaPipeline", T5_XXL, "d_ff"),
    "t5-xxl-padded": Size("T5EncoderModel", "StableDiffusion3Pipeline", T5_XXL, "d_ff"),
}
DEFAULT = ["qwen3-4b", "t5-xxl"]


class Workload:
    """The files, the edits and their values: the same in every process, from files and seeds."""

    def __init__(self, folder: Path, *, edits: int, layers: int) -> None:
        index = json.loads((folder / "model_index.json").read_text())
        self.folder = folder
        self.family = find_family(index["_class_name"])
        self.spec = self.family.encoders[-1]
        self.encoder = self.spec.name
        self.model_class = getattr(transformers, index[self.encoder][1])
        self.config = self.model_class.config_class.from_pretrained(folder / self.encoder)
        last = max(2, self.config.num_hidden_layers // 7)  # the default of the value layer
        self.layers = choose_default_layers(self.family.name, self.encoder, last=last)[-layers:]
        self.moments = folder / "second_moments.safetensors"
        names = [f"w{number % WORDS} w{(7 * number + 3) % WORDS}" for number in range(edits)]
        self.edits = [ConceptEdit(name, DestinationPrompt("w0")) for name in names]
        random = torch.Generator().manual_seed(1)
        drawn = torch.randn(edits, 2, self.config.hidden_size, generator=random)
        self.values = [EditValue({self.encoder: EncoderValue(self.layers[-1], *pair)}) for pair in drawn]

    def cut_config(self) -> Any:
        """Return the configuration of the layers up to the last edited one."""
        config = copy.deepcopy(self.config)
        config.num_hidden_layers = self.layers[-1] + 1
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[: self.layers[-1] + 1]
        return config


def write_workload(folder: Path, size: Size, *, layers: int) -> None:
    """Write a pipeline's folder with the encoder, its tokenizer and second moments of the edited layers."""
    torch.manual_seed(0)
    *others, spec = find_family(size.pipeline).encoders
    index = {"_class_name": size.pipeline, spec.name: ["transformers", size.model]}
    for component in find_family(size.pipeline).components:
        (folder / component).mkdir()
        index.setdefault(component, ["diffusers", "none"])
    # What this encoder's stage II does not read.
    for component in ("transformer", "vae"):
        save_file({"none": torch.zeros(1)}, folder / component / "diffusion_pytorch_model.safetensors")
    for other in others:
        sizes = {"num_hidden_layers": 1, "hidden_size": 1, "intermediate_size": 1}
        (folder / other.name / "config.json").write_text(json.dumps(sizes))
        save_file({"none": torch.zeros(1)}, folder / other.name / "model.safetensors")
    (folder / "model_index.json").write_text(json.dumps(index))
    vocabulary = write_tokenizer(folder / spec.tokenizer, chat=size.model != "T5EncoderModel")
    model_class = getattr(transformers, size.model)
    config = model_class.config_class(**size.config, vocab_size=vocabulary, dtype="bfloat16")
    config.save_pretrained(folder / spec.name)
    work = Workload(folder, edits=0, layers=layers)
    with torch.device("meta"):
        model = model_class(work.cut_config())
    write_weights(folder / spec.name, model)
    m = size.config[size.mlp_width]
    moments = {layer: draw_moment(m) for layer in work.layers}
    SecondMoments(moments, captions=1, tokens=1, encoder=work.encoder).save(work.moments)


def write_tokenizer(folder: Path, *, chat: bool) -> int:
    """Write a tokenizer whose tokens are words, and return the size of its vocabulary."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"] if chat else ["<pad>", "</s>"]
    named = ["<unk>", "a", "an", "image", "photo", "of", "user", "assistant", "An", "A"]
    words = [*special, *named, *(f"w{number}" for number in range(WORDS))]
    vocabulary = {word: number for number, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    settings = {"tokenizer_class": "TokenizersBackend", "pad_token": special[0], "eos_token": special[-1]}
    if chat:
        settings["chat_template"] = CHAT_TEMPLATE
    else:
        tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return len(vocabulary)


def write_weights(folder: Path, model: Any) -> None:
    """Write random weights of a model's shapes in one file for each layer and one for the rest, with their index."""
    parts: dict[str, list[str]] = {}
    shapes = {name: weight.shape for name, weight in model.named_parameters()}  # tied ones once
    for name in shapes:
        layer = re.search(r"(?:block|layers)\.(\d+)\.", name)
        parts.setdefault(layer[1] if layer else "rest", []).append(name)
    weight_map: dict[str, str] = {}
    for number, names in enumerate(parts.values(), start=1):
        file = f"model-{number:05}-of-{len(parts):05}.safetensors"
        save_file({name: draw_weight(name, shapes[name]) for name in names}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def draw_weight(name: str, shape: Sequence[int]) -> Tensor:
    """Draw a weight so that states keep their length: gains are near 1."""
    drawn = torch.randn(shape, dtype=torch.bfloat16)
    if len(shape) == 1:
        return drawn.mul_(0.1).add_(1)
    if "embed" in name or "shared" in name:
        return drawn
    scale = shape[1] ** -0.5
    return drawn.mul_(scale / 8 if name.endswith("SelfAttention.q.weight") else scale)  # T5 does not scale its scores


def draw_moment(m: int) -> Tensor:
    """Draw second moments whose eigenvalues fall off over three decades, with entries as those of the keys."""
    rank = min(1024, m)
    basis = torch.randn(m, rank) * torch.logspace(0, -1.5, rank)
    moment = basis @ basis.T
    mean = float(moment.trace() / m)
    moment.diagonal().add_(1e-3 * mean)
    return moment.mul_(0.3 / mean)


def ours(work: Workload) -> dict[int, Tensor]:
    """Return ΔW of the first edited layer, and compute those of all."""
    encoder = load_encoder(work.folder, work.encoder, dtype=None, last_layer=work.layers[-1])
    say(f"layers {work.layers}: encoder loaded, {peak_bytes() / 2**30:.2f} GiB")
    update = compute_update(
        encoder,
        work.edits,
        work.values,
        FactoredMoments(work.moments, encoder=work.encoder, folder=work.folder / "factors", digest="benchmark"),
        alpha=ALPHA,
        moment_weight=MOMENT_WEIGHT,
        layers=work.layers,
        progress=lambda done, layers: say(f"{done} of {layers} layers, {peak_bytes() / 2**30:.2f} GiB"),
    )
    return {work.layers[0]: update.to_dense(work.layers[0])}


@torch.no_grad()
def plain(work: Workload) -> dict[int, Tensor]:
    """Return ΔW of the first edited layer: the library's own model in float64, and a dense system."""
    first, last = work.layers[0], work.layers[-1]
    tokenizer = PromptTokenizer.from_folder(work.folder / work.spec.tokenizer, format=work.spec.format)
    model = work.model_class.from_pretrained(work.folder / work.encoder, config=work.cut_config(), dtype=torch.bfloat16)
    is_t5 = hasattr(model, "encoder")
    body = model.encoder if is_t5 else model.model
    layers = body.block if is_t5 else body.layers
    memory = layers[first].layer[-1].DenseReluDense.wo if is_t5 else layers[first].mlp.down_proj
    seen: dict[str, Tensor] = {}
    memory.register_forward_hook(lambda _, inputs, __: seen.update(keys=inputs[0]))
    layers[last].register_forward_hook(
        lambda _, __, output: seen.update(states=output[0] if isinstance(output, tuple) else output)
    )
    for layer in layers:  # one at a time is float64
        layer.register_forward_pre_hook(lambda module, _: module.double() and None)
        layer.register_forward_hook(lambda module, _, __: module.bfloat16() and None)
    positions = [tokenizer.locate(template, edit.source) for edit in work.edits for template in edit.templates]
    # A causal model's states do not depend on what follows the subject.
    rows = [position.ids if is_t5 else position.prefix for position in positions]
    reads_padding = is_t5 and not work.spec.is_masked
    length = tokenizer.max_length if reads_padding else max(map(len, rows))
    ids = torch.tensor([[*row, *[tokenizer.pad_id] * (length - len(row))] for row in rows])
    mask = torch.tensor([[1] * len(row) + [int(reads_padding)] * (length - len(row)) for row in rows])
    body(inputs_embeds=body.embed_tokens(ids).double(), attention_mask=mask)
    at = torch.arange(len(rows)), torch.tensor([position.last_subject_index for position in positions])
    # The mean over the templates, (m, e) and (d, e).
    keys, now = (seen.pop(name)[at].unflatten(0, (len(work.edits), -1)).mean(1).T for name in ("keys", "states"))
    own = [value.encoders[work.encoder] for value in work.values]
    z = torch.stack([value.delta + value.hidden for value in own], 1).double()  # (d, e)
    residual = (z - now) / len(work.layers)
    system = (
        SecondMoments.load(work.moments, layers=[first])
        .select(work.encoder)
        .moments[first]
        .mul_((1 - ALPHA) * MOMENT_WEIGHT)
    )  # (m, m)
    system.addmm_(keys, keys.T, alpha=ALPHA)
    return {first: ALPHA * residual @ torch.linalg.solve(system, keys).T}


def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, float]:
    """In a process of its own: one run, its CPU seconds and the peak memory of the process."""
    work = Workload(folder, edits=arguments.edits, layers=arguments.layers)
    changes, cost = measured(partial(ours if arguments.child == "ours" else plain, work))
    cost["peak_bytes"] = peak_bytes()
    save_file({str(layer): change.contiguous() for layer, change in changes.items()}, folder / arguments.child)
    return cost


def compare(arguments: argparse.Namespace, name: str, size: Size) -> dict[str, Any]:
    """Return the figures of one encoder."""
    row: dict[str, Any] = {"encoder": name, "edits": arguments.edits}
    with tempfile.TemporaryDirectory(prefix="full-size-") as folder:
        write_workload(Path(folder), size, layers=arguments.layers)
        row["layers"] = Workload(Path(folder), edits=0, layers=arguments.layers).layers
        given = ["--folder", folder, "--edits", str(arguments.edits), "--layers", str(arguments.layers)]
        for side in ("ours", "plain"):
            row[side] = child("benchmarks.full_size_encoders", side, *given)
            say(f"{name}, {side}: {row[side]['cpu_seconds']:.0f} s of CPU, {row[side]['peak_bytes'] / 2**30:.2f} GiB")
        row["difference"] = difference(Path(folder))
    return row


def table(rows: Sequence[dict[str, Any]]) -> Table:
    result = Table(title="Stage II at full size")
    for column in ("encoder", "edits", "layers", "CPU s", "wall s", "peak GiB", "plain CPU s", "ΔW differs by"):
        result.add_column(column, justify="right")
    for row in rows:
        result.add_row(
            row["encoder"],
            str(row["edits"]),
            ", ".join(map(str, row["layers"])),
            f"{row['ours']['cpu_seconds']:.0f}",
            f"{row['ours']['wall_seconds']:.0f}",
            f"{row['ours']['peak_bytes'] / 2**30:.2f}",
            f"{row['plain']['cpu_seconds']:.0f}",
            f"{row['difference']:.1e}",
        )
    return result


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", nargs="+", choices=[*SIZES], default=DEFAULT)
    parser.add_argument("--edits", type=int, default=300)
    parser.add_argument("--layers", type=int, default=3, help="edited layers; the last one stays the default")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there as well")
    parser.add_argument("--child", choices=["ours", "plain"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    chosen = parse(arguments)
    if chosen.child:
        print(json.dumps(measure(chosen, chosen.folder)))  # noqa: T201
        return 0
    rows = [compare(chosen, name, SIZES[name]) for name in chosen.encoder]
    Console(width=120).print(table(rows))
    summary = {
        "tolerance": TOLERANCE,
        "memory_limit": MEMORY_LIMIT,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "rows": rows,
    }
    if chosen.json:
        chosen.json.write_text(json.dumps(summary, indent=2) + "\n")
    succeeded = True
    for row in rows:
        if not row["difference"] <= TOLERANCE:
            say(f"{row['encoder']}: the two differ by more than {TOLERANCE}")
            succeeded = False
        if row["ours"]["peak_bytes"] > MEMORY_LIMIT:
            say(f"{row['encoder']}: more memory than {MEMORY_LIMIT / 2**30:.0f} GiB")
            succeeded = False
    print(json.dumps(summary))  # noqa: T201
    return 0 if succeeded else 1


if __name__ == "__main__":
    sys.exit(main())
