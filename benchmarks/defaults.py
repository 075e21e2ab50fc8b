"""Which settings of both stages edit best: `python -m benchmarks.defaults` fills and prints a table.

Every setting is tried on the emoji model at each number of edits with each seed of the choice of concepts. What was
measured is kept in `--out` and never measured twice, so that a run can be stopped and a setting added at any time.
"""

import argparse
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import product
from pathlib import Path
from statistics import mean, stdev

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from benchmarks.quality import Examiner, Means, Scores, Task, arbitrary_editing, compare
from demo.classify import load_classifier
from demo.concepts import WEIGHTS, read_concepts
from editing.edits import ConceptEdit, DestinationPrompt, StageOneSettings
from editing.errors import EditingError
from editing.pipelines import EditablePipeline, load_pipeline
from editing.second_moments.factors import FactoredMoments
from editing.second_moments.moments import SecondMoments
from editing.stage_one.optimize import optimize_values
from editing.stage_two.update import ResidualSchedule, Update, apply_temporarily, compute_update
from editing.values import EditValue, EncoderValue

OUT = Path("out/defaults")
TEXT = StageOneSettings(objective="text", optimization_steps=150, weight_decay=5e-4)
HYBRID = StageOneSettings(objective="hybrid", guidance_scale=3.0, num_inference_steps=10)
DECAYED = replace(HYBRID, weight_decay=5e-4)


@dataclass(frozen=True)
class Setting:
    """One row of the table. `layers` counts from the last edited one downwards; `power` is γ of C0^γ, `null_space` the
    share of C0's energy that edits must not touch."""

    stage_one: StageOneSettings = TEXT
    residual_schedule: ResidualSchedule = "spread"
    moment_weight: float = 4000.0
    alpha: float = 0.5
    first_layer: int = 0
    power: float = 1.0
    null_space: float | None = None
    preserve: int = 0
    """Names of how many other concepts, neither edited nor held out, are preserved."""
    preserve_weight: float = 1.0
    rehearsal: float | None = None
    """α of a first, weak edit; δ is then looked for on the encoder so edited, and written into the original one."""
    rehearsed: str = "delta"
    """What is kept of the second search: its "delta" on the original state, or its "target", h + δ."""


BASE = Setting()
SETTINGS: Mapping[str, Setting] = {
    "text, spread, 0–10, λ 4000": BASE,
    "published update": replace(BASE, residual_schedule="published"),
    "even": replace(BASE, residual_schedule="even"),
    "even, λ 100": replace(BASE, residual_schedule="even", moment_weight=100.0),
    "λ 100": replace(BASE, moment_weight=100.0),
    "λ 400": replace(BASE, moment_weight=400.0),
    "λ 1000": replace(BASE, moment_weight=1000.0),
    "λ 10000": replace(BASE, moment_weight=10_000.0),
    "α 0.6": replace(BASE, alpha=0.6),
    "layers 4–10": replace(BASE, first_layer=4),
    "layers 7–10": replace(BASE, first_layer=7),
    "C0^0.5": replace(BASE, power=0.5),
    "null space 0.99": replace(BASE, null_space=0.99),
    "‖δ‖ ≤ 1.0 ‖h‖": replace(BASE, stage_one=replace(TEXT, max_delta_norm=1.0)),
    "weight decay 5e-2": replace(BASE, stage_one=replace(TEXT, weight_decay=5e-2)),
    "layer 9": replace(BASE, stage_one=replace(TEXT, layer=9)),
    "hybrid": replace(BASE, stage_one=HYBRID),
    "hybrid, λ 1000": replace(BASE, stage_one=HYBRID, moment_weight=1000.0),
    "hybrid, weight decay 5e-4": replace(BASE, stage_one=DECAYED),
    "the same, λ 400": replace(BASE, stage_one=DECAYED, moment_weight=400.0),
    "noise, 60 steps, weight decay 5e-4": replace(
        BASE, stage_one=replace(DECAYED, objective="noise", optimization_steps=60)
    ),
    "rehearsal α 0.2, target": replace(BASE, rehearsal=0.2, rehearsed="target"),
    "preserve 100 others": replace(BASE, preserve=100),
}


@dataclass
class Bench:
    """The model, its statistics and what has been computed for them; `folder` keeps values and results."""

    folder: Path
    examiner: Examiner
    moments: SecondMoments
    model: str
    _factored: dict[tuple[float, float | None], FactoredMoments] = field(default_factory=dict)

    @classmethod
    def load(cls, folder: Path, weights: Path = WEIGHTS) -> "Bench":
        pipeline = weights / "pipeline"
        digest = hashlib.sha256((pipeline / "text_encoder" / "model.safetensors").read_bytes())
        digest.update((pipeline / "unet" / "diffusion_pytorch_model.safetensors").read_bytes())
        examiner = Examiner(load_pipeline(pipeline), load_classifier(weights / "classifier.safetensors"))
        return cls(
            folder, examiner, SecondMoments.load(pipeline / "second_moments.safetensors"), digest.hexdigest()[:16]
        )

    @property
    def pipeline(self) -> EditablePipeline:
        return self.examiner.pipeline

    def scores(self, setting: Setting, *, edits: int, seed: int) -> Scores:
        """Measure what the setting does to the task of this many edits and this seed."""
        key = _key({"model": self.model, "edits": edits, "seed": seed, "setting": asdict(setting)})
        kept = self.folder / f"scores-{key}.json"
        if not kept.is_file():
            task = arbitrary_editing(read_concepts(), edits=edits, seed=seed)
            after = self.examiner.means(task, self._update(setting, task))
            scores = compare(self._base(task, edits=edits, seed=seed), after)
            kept.write_text(json.dumps(asdict(scores), indent=1), encoding="utf-8")
        return Scores(**json.loads(kept.read_text(encoding="utf-8")))

    def _base(self, task: Task, *, edits: int, seed: int) -> Means:
        kept = self.folder / f"base-{_key({'model': self.model, 'edits': edits, 'seed': seed})}.json"
        if not kept.is_file():
            kept.write_text(json.dumps(asdict(self.examiner.means(task))), encoding="utf-8")
        return Means(**json.loads(kept.read_text(encoding="utf-8")))

    def _update(self, setting: Setting, task: Task) -> Update:
        edits = [ConceptEdit(s, DestinationPrompt(d), settings=setting.stage_one) for s, d in task.pairs]
        values = self._values(edits)
        if setting.rehearsal is not None:
            values = self._rehearsed(setting, setting.rehearsal, edits, values)
        named = {name for pair in task.pairs for name in pair} | set(task.held_out)
        others = [concept.name for concept in read_concepts() if concept.name not in named]
        preserve = [f"an image of a {name}" for name in others[: setting.preserve]]
        return self._written(setting, edits, values, alpha=setting.alpha, preserve=preserve)

    def _written(
        self,
        setting: Setting,
        edits: Sequence[ConceptEdit],
        values: Sequence[EditValue],
        *,
        alpha: float,
        preserve: Sequence[str] = (),
    ) -> Update:
        return compute_update(
            self.pipeline.encoder,
            edits,
            values,
            self._moments(setting.power, setting.null_space),
            alpha=alpha,
            moment_weight=setting.moment_weight,
            layers=range(setting.first_layer, self._own(values[0]).layer + 1),
            residual_schedule=setting.residual_schedule,
            preserve=preserve,
            preserve_weight=setting.preserve_weight,
        )

    def _rehearsed(
        self, setting: Setting, rehearsal: float, edits: Sequence[ConceptEdit], values: Sequence[EditValue]
    ) -> list[EditValue]:
        weak = self._written(setting, edits, values, alpha=rehearsal)
        with apply_temporarily(self.pipeline.encoder, weak):
            again = self._values(edits, of=f"rehearsal {_key(asdict(setting))}")
        rehearsed = []
        for first, second in zip(map(self._own, values), map(self._own, again), strict=True):
            own = replace(second, hidden=first.hidden)
            if setting.rehearsed == "target":
                own = replace(own, delta=second.hidden + second.delta - first.hidden)
            rehearsed.append(EditValue({self.pipeline.encoder.name: own}))
        return rehearsed

    def _values(self, edits: Sequence[ConceptEdit], *, of: str = "base") -> list[EditValue]:
        key = _key({"model": self.model, "of": of, "edits": [asdict(edit) for edit in edits]})
        kept = self.folder / f"values-{key}.safetensors"
        if not kept.is_file():
            found = []
            for outcome in optimize_values(self.pipeline, edits):
                if isinstance(outcome, EditingError):
                    raise outcome
                found.append(self._own(outcome))
            save_file({"values": torch.stack([torch.stack([own.delta, own.hidden]) for own in found])}, kept)
        layer = self.pipeline.encoder.value_layer if edits[0].settings.layer is None else edits[0].settings.layer
        rows: Tensor = load_file(kept)["values"]  # (n, 2, d)
        name = self.pipeline.encoder.name
        return [EditValue({name: EncoderValue(layer, delta, hidden)}) for delta, hidden in rows]

    def _own(self, value: EditValue) -> EncoderValue:
        """Return the value in the emoji model's one text encoder."""
        return value.encoders[self.pipeline.encoder.name]

    def _moments(self, power: float, null_space: float | None) -> FactoredMoments:
        if (power, null_space) not in self._factored:
            self._factored[power, null_space] = FactoredMoments(_reshaped(self.moments, power, null_space))
        return self._factored[power, null_space]


def _reshaped(moments: SecondMoments, power: float, null_space: float | None) -> SecondMoments:
    """C0 with its spectrum changed: C0^γ of equal trace; or, as null-space projection (AlphaEdit) in its limit, the
    directions that hold `null_space` of the energy made immovable and the others free."""
    if power == 1.0 and null_space is None:
        return moments
    changed = {}
    for layer, moment in moments.moments.items():
        spectrum, basis = torch.linalg.eigh(moment)  # ascending
        spectrum = spectrum.clamp_min(spectrum[-1] * 1e-12)
        if null_space is not None:
            free = spectrum.cumsum(0) <= (1 - null_space) * spectrum.sum()
            shaped = torch.where(free, spectrum.mean() * 1e-4, spectrum.mean() * 1e4)
        else:
            shaped = spectrum**power
            shaped = shaped * spectrum.sum() / shaped.sum()
        changed[layer] = (basis * shaped) @ basis.T
    return SecondMoments(changed, captions=moments.captions, tokens=moments.tokens)


def _key(facts: Mapping[str, object]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:24]


def measured(
    bench: Bench, settings: Sequence[str], *, edits: Sequence[int], seeds: Sequence[int]
) -> Iterator[tuple[str, int, list[Scores]]]:
    """Yield (setting, number of edits, scores by seed), as they are ready."""
    bar = tqdm(total=len(edits) * len(settings) * len(seeds), unit="task")
    for count, name in product(edits, settings):
        scores = []
        for seed in seeds:
            scores.append(bench.scores(SETTINGS[name], edits=count, seed=seed))
            bar.update()
        yield name, count, scores
    bar.close()


def table(results: Sequence[tuple[str, int, list[Scores]]]) -> Table:
    shown = Table(title="mean ± standard deviation over the seeds")
    names = ("SF", "S2D template", "S2D free", "AL2D", "HD", "F1")
    for column in ("edits", "setting", *names):
        shown.add_column(column, justify="left" if column == "setting" else "right", no_wrap=True)
    for name, count, scores in results:
        columns = zip(*((s.sf, s.s2d_template, s.s2d_free, s.al2d, s.hd, s.f1) for s in scores), strict=True)
        shown.add_row(str(count), name, *(_spread(column) for column in columns))
    return shown


def _spread(values: Sequence[float]) -> str:
    return f"{mean(values):.3f}" + (f" ± {stdev(values):.3f}" if len(values) > 1 else "")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.defaults", description=__doc__)
    parser.add_argument("--edits", type=int, nargs="+", default=[10, 30, 100])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--settings", nargs="+", choices=list(SETTINGS), default=list(SETTINGS), metavar="NAME")
    parser.add_argument("--out", type=Path, default=OUT, help="where results are kept (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the scores as JSON too")
    given = parser.parse_args(arguments)
    given.out.mkdir(parents=True, exist_ok=True)
    results = list(measured(Bench.load(given.out), given.settings, edits=given.edits, seeds=given.seeds))
    Console(width=140).print(table(results))
    if given.json:
        rows = [{"setting": name, "edits": n, "scores": [asdict(s) for s in scores]} for name, n, scores in results]
        given.json.write_text(json.dumps(rows, indent=1, ensure_ascii=False), encoding="utf-8")


if __name__ == "__main__":
    main()
