"""Edit many concepts at once and measure it: `python -m demo.sd3.edit FOLDER` prints the figures as JSON.

A concept is known three times, so one search finds a δ for each text encoder. Stage I starts with the text loss and
ends with the generator's loss. Stage II writes each encoder; half of what it preserves are names that are neither
edited nor judged. With `--encoders` only some of the three are written, which the others then contradict.

Seeds from 100 on are for tuning. Those below were never looked at before the settings here were final.
"""

import argparse
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import torch

import editing
from demo.classify import Classifier, load_classifier
from demo.concepts import read_concepts
from demo.llm.judging import judge_task
from demo.llm.settings import parse_settings
from demo.llm.tasks import Task, fill_names
from demo.sd3.data import draw_captions, read_drawn
from demo.sd3.draw import FOLDER, GUIDANCE, STEPS
from demo.sd3.pipeline import ENCODERS, T5_LENGTH
from editing.edits import ConceptEdit, DestinationPrompt, StageOneSettings
from editing.families.layout import choose_default_layers

TEMPLATES = ("a photo of a {}", "an image of a {}", "a drawing of a {}", "{}", "a {}", "a small {}")
CAPTIONS = 1500
HELD_OUT_CONCEPTS = 30


@dataclass(frozen=True)
class Settings:
    """How concepts are edited."""

    clip_layer: int = 0
    """L of both CLIPs. Later layers come after the other tokens have read the subject."""
    t5_layer: int = 0
    text_steps: int = 25
    noise_steps: int = 80
    """Steps of the generator's loss alone, after those of the text loss."""
    step_length: float = 0.06
    """Of Adam, as a share of ‖h‖ of all encoders together."""
    max_delta_norm: float = 0.45
    """Of each encoder's ‖h‖."""
    noise_batch_size: int = 2
    contexts: Literal["own", "many"] = "many"
    weight: float = 1000.0
    """Of everything that is preserved."""
    names: float = 0.5
    """The names' share of it."""
    alpha: float = 0.5

    @property
    def layers(self) -> dict[str, int]:
        """L of each encoder."""
        return dict(zip(ENCODERS, (self.clip_layer, self.clip_layer, self.t5_layer), strict=True))


def draw_task(*, edits: int, seed: int) -> Task:
    """Return edits of concepts that the pipeline draws. Other names of them are not judged."""
    drawn = read_drawn()
    concepts = [concept for concept in read_concepts() if concept.name in drawn]
    task = Task.draw("concepts", concepts, edits=edits, seed=seed, held_out=HELD_OUT_CONCEPTS)
    return replace(task, aliases=())


def load_engine(folder: Path, *, device: str, length: int = T5_LENGTH) -> editing.EditablePipeline:
    """Load the pipeline with the engine. T5 reads `length` tokens, as a call of the pipeline with that length."""
    pipeline = editing.load_pipeline(folder, device=device, generator_dtype=torch.float32)
    pipeline.encoders[-1].tokenizer.max_length = length
    return pipeline


def judge(
    pipeline: editing.EditablePipeline,
    classifier: Classifier,
    task: Task,
    *,
    batch: int,
    names: Sequence[str] = ("destination", "held_out"),
) -> dict[str, float]:
    """Return the mean confidence in the pictures of the task's questions of these names."""
    return judge_task(pipeline, classifier, task, names=names, steps=STEPS, guidance_scale=GUIDANCE, batch=batch)


def build_edits(pipeline: editing.EditablePipeline, task: Task, settings: Settings) -> list[ConceptEdit]:
    """Return the edits, with Adam's rate in the unit of the states after the edited layers."""
    probe_settings = StageOneSettings(objective="text", optimization_steps=1)
    probe = ConceptEdit(task.sources[0], DestinationPrompt(task.destinations[0]), TEMPLATES, probe_settings)
    (value,) = editing.optimize_values(pipeline, [probe], layers=settings.layers)
    if isinstance(value, Exception):
        raise value
    squares = sum(encoder.hidden_norm**2 for encoder in value.encoders.values())
    width = sum(encoder.width for encoder in pipeline.encoders)
    stage_one = StageOneSettings(
        objective="hybrid",
        warmup_steps=settings.text_steps,
        optimization_steps=settings.text_steps + settings.noise_steps,
        text_weight=0.0,  # after the warm-up, the generator's loss alone
        learning_rate=settings.step_length * (squares / width) ** 0.5,
        max_delta_norm=settings.max_delta_norm,
        num_images=len(TEMPLATES),
        num_inference_steps=12,
        guidance_scale=GUIDANCE,
        noise_batch_size=settings.noise_batch_size,
    )
    return [
        ConceptEdit(source, DestinationPrompt(goal), TEMPLATES, stage_one)
        for source, goal in zip(task.sources, task.destinations, strict=True)
    ]


def compute_updates(
    pipeline: editing.EditablePipeline,
    task: Task,
    edits: Sequence[ConceptEdit],
    values: Sequence[editing.EditValue | editing.EditingError],
    settings: Settings,
) -> dict[str, editing.Update]:
    """Run stage II and return the update of each encoder."""
    captions = [caption.text for caption in draw_captions(read_concepts(), count=CAPTIONS)]
    preserve = fill_names(task.preserved)
    updates = {}
    for encoder in pipeline.encoders:
        layers = choose_default_layers(encoder.family, encoder.name, last=settings.layers[encoder.name])
        updates[encoder.name] = editing.compute_update(
            encoder,
            edits,
            values,
            editing.estimate_second_moments(encoder, captions, layers=layers),
            layers=layers,
            moment_weight=settings.weight * (1 - settings.names),
            preserve=preserve,
            preserve_weight=settings.weight * settings.names / max(len(preserve), 1),
            alpha=settings.alpha,
            contexts=settings.contexts,
        )
    return updates


@contextmanager
def written(
    pipeline: editing.EditablePipeline, updates: Mapping[str, editing.Update], names: Sequence[str]
) -> Iterator[None]:
    """Write the updates of the encoders of these names for as long as the block runs."""
    chosen = [encoder for encoder in pipeline.encoders if encoder.name in names]
    with editing.apply_all_temporarily(chosen, [updates[encoder.name] for encoder in chosen]):
        yield


def measure(
    pipeline: editing.EditablePipeline,
    classifier: Classifier,
    task: Task,
    settings: Settings,
    choices: Sequence[Sequence[str]],
    *,
    batch: int,
) -> dict[str, Any]:
    """Edit, and judge with the edits written into each of the choices of encoders."""
    clock = [time.perf_counter()]
    before = judge(pipeline, classifier, task, batch=batch, names=("destination", "own_prompts", "held_out"))
    clock.append(time.perf_counter())
    edits = build_edits(pipeline, task, settings)
    values = editing.optimize_values(pipeline, edits, layers=settings.layers)
    clock.append(time.perf_counter())
    updates = compute_updates(pipeline, task, edits, values, settings)
    clock.append(time.perf_counter())
    seconds = zip(("judge", "stage_one", "stage_two"), clock, clock[1:], strict=False)
    report: dict[str, Any] = {"before": before, "seconds": {name: end - start for name, start, end in seconds}}
    report["relative_norms"] = {
        name: [round(change.relative_norm, 3) for change in update.layers.values()] for name, update in updates.items()
    }
    for names in choices:
        with written(pipeline, updates, names):
            after = judge(pipeline, classifier, task, batch=batch)
        report["all" if len(names) == len(ENCODERS) else "+".join(names)] = {
            "s2d": after["destination"] - before["destination"],
            "hd": after["held_out"] - before["held_out"],
            "after": after,
        }
    return report


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m demo.sd3.edit", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?", default=FOLDER, help="the pipeline (default: %(default)s)")
    parser.add_argument("--edits", type=int, default=30, help="number of edits (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of concepts (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    parser.add_argument(
        "--encoders", nargs="+", choices=("all", *ENCODERS), default=["all"], help="written; each alone, or all three"
    )
    parser.add_argument("--length", type=int, default=T5_LENGTH, help="tokens that T5 reads (default: %(default)s)")
    names = [setting.name for setting in fields(Settings)]
    parser.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE", help=f"change {', '.join(names)}")
    given = parser.parse_args(arguments)
    settings = replace(Settings(), **parse_settings(given.set))
    task = draw_task(edits=given.edits, seed=given.seed)
    report = measure(
        load_engine(given.folder, device=given.device, length=given.length),
        load_classifier(),
        task,
        settings,
        [ENCODERS if name == "all" else (name,) for name in given.encoders],
        batch=256 if given.device == "cuda" else 32,
    )
    made = {"edits": given.edits, "seed": given.seed, "held_out_concepts": len(task.held_out)}
    print(json.dumps({**made, **report, "settings": asdict(settings), "device": given.device}))  # noqa: T201


if __name__ == "__main__":
    main()
