"""Stage I against the plain loop as published: `python -m benchmarks.stage_one [--concepts N] [--json FILE]`.

The plain loop takes one concept at a time. Each of its 200 steps encodes the pictures and runs the text
encoder on source and destination, and for a hybrid edit the U-Net on both. It then takes a step of Adam on δ.
Its parameters take no gradients, and its pictures are drawn by the same solver as ours: the difference is the method's.

Every side of every case runs in a process of its own. CPU seconds and peak memory are those of the optimization, after
the model is loaded. The steps of the plain loop cost the same each, so with `--plain-steps` fewer of them can be
measured and the rest reckoned; the quality of its values is then not measured. S2D is the rise of the destination's
confidence on prompts that no edit used. HD is the change of the confidence in concepts that no edit named. The emoji
model's classifier judges pictures before and after stage II.
"""

import argparse
import dataclasses
import functools
import json
import resource
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from benchmarks.measuring import child
from benchmarks.quality import Examiner, Task, compare
from demo.classify import load_classifier
from demo.concepts import WEIGHTS, read_concepts
from editing.condition import Condition
from editing.edits import ConceptEdit, DestinationPrompt, Objective, StageOneSettings, fill_template
from editing.generators.unet import UNet
from editing.pictures.draw import draw_pictures
from editing.pipelines import EditablePipeline, load_pipeline
from editing.second_moments.moments import SecondMoments
from editing.stage_one.noise import to_pixels
from editing.stage_one.optimize import optimize_values
from editing.stage_two.update import compute_update
from editing.values import EditValue, EncoderValue

MODULE = "benchmarks.stage_one"
HELD_OUT = 30
CASES = {
    "text": "emoji model, text only",
    "hybrid": "emoji model, hybrid",
    "mid-size": "mid-size random U-Net, hybrid",
}


@dataclass(frozen=True)
class Cost:
    """What one side took, a concept."""

    concepts: int
    cpu_seconds: float
    peak_mib: float
    """Of the whole process."""
    steps: float
    """Mean number of text steps, of those that follow the text alone."""


def emoji_pipeline() -> EditablePipeline:
    return load_pipeline(WEIGHTS / "pipeline")


def mid_size_pipeline(*, side: int = 16, channels: Sequence[int] = (96, 192)) -> EditablePipeline:
    """Return the emoji model with a random U-Net that costs some fifteen times more."""
    pipeline = emoji_pipeline()
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=side,
        block_out_channels=tuple(channels),
        layers_per_block=2,
        cross_attention_dim=pipeline.encoder.width,
        attention_head_dim=8,
        norm_num_groups=16,
        down_block_types=("CrossAttnDownBlock2D",) * len(channels),
        up_block_types=("CrossAttnUpBlock2D",) * len(channels),
    )
    small = pipeline.generator
    scale = small.autoencoder.downscale
    generator = UNet(
        unet.requires_grad_(False).eval(), small.autoencoder, small.scheduler, image_size=(side * scale, side * scale)
    )
    return dataclasses.replace(pipeline, generator=generator)


def describe_settings(case: str, side: str) -> StageOneSettings:
    """Ours are the defaults; a guidance and solver steps that suit the emoji model are given to both sides."""
    objective: Objective = "text" if case == "text" else "hybrid"
    if side == "ours":
        return StageOneSettings(objective=objective, guidance_scale=3.0)
    return StageOneSettings.preset("published", objective=objective, guidance_scale=3.0)


def pairs_of(concepts: int) -> list[tuple[str, str]]:
    """Concepts of the first half of the list become concepts of the second half."""
    names = _names()
    middle = (len(names) - HELD_OUT) // 2
    if not 1 <= concepts <= middle:
        raise SystemExit(f"--concepts must be 1 to {middle}")
    return [(names[i], names[middle + i]) for i in range(0, middle, max(1, middle // concepts))][:concepts]


def edits_of(concepts: int, settings: StageOneSettings) -> list[ConceptEdit]:
    return [ConceptEdit(source, DestinationPrompt(goal), settings=settings) for source, goal in pairs_of(concepts)]


def _names() -> list[str]:
    return [concept.name for concept in read_concepts() if concept.skew is None]


def plain_value(pipeline: EditablePipeline, edit: ConceptEdit, *, pixels: Tensor | None, steps: int) -> EditValue:
    """Run the published loop for one concept; `pixels` (p, 3, height, width) of the destination, for a hybrid edit."""
    assert isinstance(edit.destination, DestinationPrompt)
    settings, encoder, tokenizer = edit.settings, pipeline.encoder, pipeline.tokenizer
    sources = [tokenizer.locate(template, edit.source) for template in edit.templates]
    destinations = [tokenizer.encode(fill_template(template, edit.destination.prompt)) for template in edit.templates]
    rows = torch.arange(len(sources))
    subjects = torch.tensor([position.last_subject_index for position in sources])
    source_ends, destination_ends = (
        torch.tensor([prompt.text_end for prompt in prompts]) for prompts in (sources, destinations)
    )
    layer = encoder.value_layer
    delta = torch.zeros(encoder.width, requires_grad=True)
    optimizer = torch.optim.Adam([delta], lr=settings.learning_rate)
    generator = torch.Generator().manual_seed(settings.seed)
    hidden: Tensor | None = None
    losses: list[float] = []

    def add_delta(_: object, __: object, output: Tensor) -> Tensor:
        nonlocal hidden
        if hidden is None:
            hidden = output[rows, subjects].detach().mean(0)
        return output.index_put((rows, subjects), delta.expand(len(rows), -1), accumulate=True)

    for _ in range(steps):
        hook = encoder.blocks[layer].layer.register_forward_hook(add_delta)
        states = encoder.model(encoder.pad([prompt.ids for prompt in sources]).ids)[0]  # (p, s, d)
        hook.remove()
        with torch.no_grad():
            wanted = encoder.model(encoder.pad([prompt.ids for prompt in destinations]).ids)[0]
        at_eos = states[rows, source_ends] - wanted[rows, destination_ends]  # (p, d)
        text = at_eos.square().mean()
        loss = text
        if pixels is not None:
            latents = pipeline.generator.encode_images(pixels).sample(rows, generator=generator)
            noised = pipeline.generator.add_noise(latents, generator=generator)
            predict = functools.partial(pipeline.generator.predict, noised.noisy, noised.timesteps)
            with torch.no_grad():
                target = predict(Condition(wanted))
            loss = (predict(Condition(states)) - target).square().mean() + settings.text_weight * text
        assert hidden is not None
        loss = loss + settings.weight_decay * delta.square().sum() / hidden.square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            delta.mul_((settings.max_delta_norm * hidden.norm() / delta.norm().clamp_min(1e-12)).clamp(max=1))
        losses.append(float(text.detach()))
    assert hidden is not None
    return EditValue({encoder.name: EncoderValue(layer, delta.detach().clone(), hidden)}, tuple(losses))


def plain_pictures(pipeline: EditablePipeline, edit: ConceptEdit) -> Tensor | None:
    """One of the destination for each template, (p, 3, height, width); none for a text-only edit."""
    if edit.objective == "text":
        return None
    assert isinstance(edit.destination, DestinationPrompt)
    prompts = [fill_template(template, edit.destination.prompt) for template in edit.templates]
    settings = edit.settings
    drawn = draw_pictures(
        pipeline,
        prompts,
        seeds=range(len(prompts)),
        num_inference_steps=settings.num_inference_steps,
        guidance_scale=settings.guidance_scale,
    )
    return torch.stack([to_pixels(picture, size=pipeline.generator.image_size) for picture in drawn])


def measure(case: str, side: str, *, concepts: int, plain_steps: int | None, out: Path) -> Cost:
    """Optimize in this process and write each value to a file in the folder `out`."""
    pipeline = mid_size_pipeline() if case == "mid-size" else emoji_pipeline()
    edits = edits_of(concepts, describe_settings(case, side))
    start = time.process_time()
    if side == "ours":
        values = [value for value in optimize_values(pipeline, edits) if isinstance(value, EditValue)]
        seconds = time.process_time() - start
    else:
        steps_of_edit = edits[0].settings.optimization_steps
        steps = min(plain_steps or steps_of_edit, steps_of_edit)
        pictures = [plain_pictures(pipeline, edit) for edit in edits]
        drawn = time.process_time()
        values = [
            plain_value(pipeline, edit, pixels=pixels, steps=steps)
            for edit, pixels in zip(edits, pictures, strict=True)
        ]
        seconds = drawn - start + (time.process_time() - drawn) * steps_of_edit / steps
    if len(values) < len(edits):
        raise SystemExit("an edit has failed")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    out.mkdir()
    for number, value in enumerate(values):
        (out / f"{number}.safetensors").write_bytes(value.to_safetensors())
    steps_taken = sum(len(value.text_losses) for value in values) / len(values)
    return Cost(len(values), seconds / len(values), peak, steps_taken)


def judge(folders: Sequence[Path], *, concepts: int) -> list[dict[str, float]]:
    """S2D and HD of stage II on the values in each folder."""
    pipeline = emoji_pipeline()
    examiner = Examiner(pipeline, load_classifier())
    moments = SecondMoments.load(WEIGHTS / "pipeline" / "second_moments.safetensors")
    edits = edits_of(concepts, StageOneSettings())
    pairs = [
        (edit.source, edit.destination.prompt) for edit in edits if isinstance(edit.destination, DestinationPrompt)
    ]
    task = Task(tuple(pairs), aliases=(), held_out=tuple(_names()[-HELD_OUT:]))
    before = examiner.means(task)
    results = []
    for folder in folders:
        values = [
            EditValue.from_safetensors((folder / f"{number}.safetensors").read_bytes()) for number in range(len(edits))
        ]
        update = compute_update(pipeline.encoder, edits, values, moments)
        scores = compare(before, examiner.means(task, update))
        encoders = [value.encoders[pipeline.encoder.name] for value in values]
        lengths = [own.delta_norm / own.hidden_norm for own in encoders]
        results.append({"s2d": scores.s2d_free, "hd": scores.hd, "length": sum(lengths) / len(lengths)})
    return results


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    report: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for case in arguments.cases:
            few = 1 if case == "mid-size" else arguments.plain_concepts
            many = arguments.concepts if case == "text" else few
            sides = {"ours": many, "plain": few}
            files = {side: Path(folder) / f"{case}-{side}.safetensors" for side in ("few", *sides)}
            costs = {}
            for side, concepts in sides.items():
                costs[side] = child(
                    MODULE, case, side, str(files[side]), "--concepts", str(concepts), *_plain_steps(arguments, case)
                )
            report[case] = {
                **costs,
                "ratio": round(costs["plain"]["cpu_seconds"] / costs["ours"]["cpu_seconds"], 1),
            }
            if case != "mid-size" and not arguments.plain_steps:
                same = files["ours"]
                if many != few:
                    same = files["few"]
                    child(MODULE, case, "ours", str(same), "--concepts", str(few))
                quality = child(MODULE, "judge", str(same), str(files["plain"]), "--concepts", str(few))
                report[case]["quality"] = dict(zip(("ours", "plain"), quality, strict=True))
    return report


def _plain_steps(arguments: argparse.Namespace, case: str) -> list[str]:
    steps = arguments.plain_steps or (arguments.mid_size_steps if case == "mid-size" else None)
    return ["--plain-steps", str(steps)] if steps else []


def table(report: dict[str, Any]) -> str:
    lines = [
        "| case | side | concepts | CPU s a concept | peak RSS, MiB | text steps | S2D | HD | ‖δ‖/‖h‖ |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for case, found in report.items():
        for side in ("plain", "ours"):
            cost, quality = found[side], found.get("quality", {}).get(side)
            judged = [f"{quality[key]:.3f}" for key in ("s2d", "hd", "length")] if quality else ["–"] * 3
            cells = [CASES[case], side, str(cost["concepts"]), f"{cost['cpu_seconds']:.3f}", f"{cost['peak_mib']:.0f}"]
            lines.append("| " + " | ".join([*cells, f"{cost['steps']:.0f}", *judged]) + " |")
        lines.append(f"| {CASES[case]} | **ratio** | | **{found['ratio']}** | | | | | |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.stage_one", description=__doc__.splitlines()[0])
    parser.add_argument("--concepts", type=int, default=100, help="for our text-only side (default: %(default)s)")
    parser.add_argument(
        "--plain-concepts",
        type=int,
        default=4,
        help="for all else; the mid-size U-Net has one",
    )
    parser.add_argument("--plain-steps", type=int, help="measure only these of the plain loop's steps; no quality")
    parser.add_argument("--mid-size-steps", type=int, default=10, help="the same for the mid-size U-Net")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.child:
        print(json.dumps(_run_child(arguments)))  # noqa: T201
        return
    report = run(arguments)
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1), encoding="utf-8")
    print(table(report))  # noqa: T201
    print(json.dumps({case: found["ratio"] for case, found in report.items()}))  # noqa: T201


def _run_child(arguments: argparse.Namespace) -> Any:
    if arguments.child[0] == "judge":
        return judge([Path(file) for file in arguments.child[1:]], concepts=arguments.concepts)
    case, side, file = arguments.child
    cost = measure(case, side, concepts=arguments.concepts, plain_steps=arguments.plain_steps, out=Path(file))
    return dataclasses.asdict(cost)


if __name__ == "__main__":
    main()
