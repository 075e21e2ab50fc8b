"""The commands that hold an edited pipeline against its base: RoAD, TIMED, artists, gender, preservation."""

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from rich.console import Console
from rich.progress import Progress

from editing import ENGINE_VERSION
from editing.evaluation import artists, contrasts, gender, preservation
from editing.evaluation.contrasts import ContrastTask
from editing.evaluation.cost import measured
from editing.evaluation.drawing import Sampling
from editing.evaluation.intervals import Interval
from editing.evaluation.metrics import Clip, FeatureMoments, inception_features, lpips_distance
from editing.evaluation.results import Results
from editing.evaluation.road import load_road
from editing.evaluation.rows import Loaded, Oddity
from editing.evaluation.timed import load_timed
from editing.families.layout import describe_pipeline
from editing.files import write_atomically
from editing.pipelines import EditablePipeline, load_pipeline


def add_commands(benchmarks: Any) -> None:
    """Add a parser for each to argparse's subparsers, with its function as `run`."""
    _add_contrasts(benchmarks, "road", load_road, "roles and appearances: CLIP win rates")
    _add_contrasts(benchmarks, "timed", load_timed, "implicit assumptions: CLIP win rates")

    add = _add(benchmarks, "artists", _artists, "held-out artists' styles: CLIP score, LPIPS")
    add.add_argument("--lpips", choices=["alex", "vgg", "squeeze"], help="measure LPIPS (the extra `evaluation`)")
    add.add_argument("--limit", type=_at_least_one, metavar="N", help="the file's first prompts only")

    add = _add(benchmarks, "gender", _gender, "gender balance of professions: Δ_p")
    add.add_argument("--seeds", type=_at_least_one, default=1, help="runs, each of its own pictures")
    add.add_argument("--pictures", type=_at_least_one, default=gender.PICTURES, help="of a profession and run")
    add.add_argument("--limit", type=_at_least_one, metavar="N", help="the file's first professions only")

    add = _add(benchmarks, "preservation", _preservation, "captions such as COCO's: CLIP score, FID")
    add.add_argument("--column", help="of the captions' file (default: caption, else text)")
    add.add_argument("--limit", type=_at_least_one, metavar="N", help="the file's first captions only")
    add.add_argument("--fid", action="store_true", help="measure FID with clean-fid (the extra `evaluation`)")
    add.add_argument("--photographs", type=Path, metavar="FOLDER", help="of FID; without them it is against the base")


def _add(benchmarks: Any, name: str, measure: Callable[["_Setting"], Results], summary: str) -> argparse.ArgumentParser:
    add: argparse.ArgumentParser = benchmarks.add_parser(name, help=summary, description=summary)
    add.set_defaults(run=lambda given: _run(given, measure))
    add.add_argument("--model", type=Path, required=True, metavar="FOLDER", help="the edited pipeline")
    add.add_argument("--base", type=Path, required=True, metavar="FOLDER", help="the pipeline before the edits")
    add.add_argument("--data", type=Path, required=True, metavar="FILE", help="the benchmark's file, as shipped")
    add.add_argument("--clip", type=Path, required=True, metavar="FOLDER", help="the CLIP model that judges")
    add.add_argument(
        "--num-inference-steps", type=_at_least_one, default=20, help="of the solver (default: %(default)s)"
    )
    add.add_argument("--guidance-scale", type=float, default=7.5, help="(default: %(default)s)")
    add.add_argument("--device", default="cpu")
    add.add_argument("--json", type=Path, metavar="FILE", help="write the report there instead of printing it")
    return add


def _add_contrasts(benchmarks: Any, name: str, load: Callable[[Path], Loaded[ContrastTask]], summary: str) -> None:
    add = _add(benchmarks, name, lambda setting: _contrasts(setting, name, load(setting.given.data)), summary)
    add.add_argument("--seeds", type=_at_least_one, default=3, help="pictures of each prompt (default: %(default)s)")
    add.add_argument("--limit", type=_at_least_one, metavar="N", help="the file's first tasks only")


class _Setting:
    """What every command measures with, opened when it is first asked for: the benchmark's file is read before."""

    def __init__(self, given: argparse.Namespace, progress: Progress) -> None:
        self.given, self._progress = given, progress
        self.sampling = Sampling(given.num_inference_steps, given.guidance_scale)
        self.dtype = torch.float32 if torch.device(given.device).type == "cpu" else torch.float16

    def clip(self) -> Clip:
        return Clip.from_folder(self.given.clip, device=self.given.device)

    def base(self) -> EditablePipeline:
        return load_pipeline(self.given.base, device=self.given.device, dtype=self.dtype)

    def edited(self) -> EditablePipeline:
        return load_pipeline(self.given.model, device=self.given.device, dtype=self.dtype)

    @contextmanager
    def shown(self, name: str) -> Iterator[Callable[[int, int], None]]:
        bar = self._progress.add_task(name, total=None)
        yield lambda done, total: self._progress.update(bar, completed=done, total=total)

    def results(
        self,
        benchmark: str,
        rows: dict[str, dict[str, Interval]],
        *,
        oddities: Sequence[Oddity] = (),
        details: dict[str, Any] | None = None,
        **settings: Any,
    ) -> Results:
        told = {
            **settings,
            **asdict(self.sampling),
            "dtype": str(self.dtype).removeprefix("torch."),
            "device": torch.device(self.given.device).type,
            "engine": ENGINE_VERSION,
            "versions": {module.__name__: module.__version__ for module in (torch, diffusers, transformers)},
            "digests": {
                "base": describe_pipeline(self.given.base).digest,
                "edited": describe_pipeline(self.given.model).digest,
            },
        }
        return Results(benchmark, rows, told, oddities, details or {})


def _run(given: argparse.Namespace, measure: Callable[[_Setting], Results]) -> None:
    with Progress(console=Console(stderr=True)) as progress, measured(torch.device(given.device)) as cost:
        found = measure(_Setting(given, progress))
    report = found.as_json()
    report["settings"] |= asdict(cost)
    Console(width=160 if not sys.stdout.isatty() else None).print(found.as_table())
    if given.json is None:
        print(json.dumps(report, ensure_ascii=False))  # noqa: T201
    else:
        write_atomically(given.json, (json.dumps(report, indent=1, ensure_ascii=False) + "\n").encode())


def _contrasts(setting: _Setting, name: str, loaded: Loaded[ContrastTask]) -> Results:
    tasks = loaded.tasks[: setting.given.limit]
    clip = setting.clip()
    seeds = range(setting.given.seeds)
    base = setting.base()
    rows = {}
    for title, pipeline, prompts in (
        ("base", base, False),
        ("destination", base, True),
        ("edited", setting.edited(), False),
    ):
        with setting.shown(title) as progress:
            rates = contrasts.measure_contrasts(
                pipeline,
                tasks,
                clip,
                seeds=seeds,
                sampling=setting.sampling,
                destination_prompts=prompts,
                progress=progress,
            )
        rows[title] = contrasts.over_seeds(rates)
    return setting.results(name, rows, oddities=loaded.oddities, tasks=len(tasks), seeds=list(seeds))


def _artists(setting: _Setting) -> Results:
    loaded = artists.load_artists(setting.given.data)
    prompts = loaded.tasks[: setting.given.limit]
    network, device = setting.given.lpips, setting.given.device
    distance = lpips_distance(network, device=device) if network else None
    with setting.shown("base and edited") as progress:
        scores = artists.measure_styles(
            setting.base(),
            setting.edited(),
            prompts,
            setting.clip(),
            sampling=setting.sampling,
            distance=distance,
            progress=progress,
        )
    by_artist = {"base_clip": scores.by_artist(scores.base_clip), "edited_clip": scores.by_artist(scores.edited_clip)}
    return setting.results(
        "artists",
        scores.rows(),
        oddities=loaded.oddities,
        details=by_artist,
        prompts=len(prompts),
        seeds="listed",
        lpips=network,
    )


def _gender(setting: _Setting) -> Results:
    loaded = gender.load_professions(setting.given.data)
    professions = loaded.tasks[: setting.given.limit]
    clip, pictures, runs = setting.clip(), setting.given.pictures, range(setting.given.seeds)
    rows, details = {}, {}
    for title, pipeline in (("base", setting.base()), ("edited", setting.edited())):
        balances = []
        for run in runs:
            with setting.shown(f"{title}, run {run + 1}") as progress:
                balances.append(
                    gender.measure_balance(
                        pipeline,
                        professions,
                        clip,
                        pictures=pictures,
                        run=run,
                        sampling=setting.sampling,
                        progress=progress,
                    )
                )
        rows[title] = {"delta": Interval.of([balance.delta for balance in balances])}
        details[title] = [dict(balance.female_shares) for balance in balances]
    return setting.results(
        "gender",
        rows,
        oddities=loaded.oddities,
        details={"female_shares": details},
        professions=len(professions),
        pictures=pictures,
        runs=len(runs),
    )


def _preservation(setting: _Setting) -> Results:
    given = setting.given
    captions = preservation.load_captions(given.data, column=given.column, limit=given.limit)
    extract = inception_features(device=given.device) if given.fid else None
    photographs = None
    if extract is not None and given.photographs is not None:
        photographs = FeatureMoments.of_batches(map(extract, preservation.open_pictures(given.photographs)))
    clip = setting.clip()
    scores = {}
    for title, pipeline in (("base", setting.base()), ("edited", setting.edited())):
        with setting.shown(title) as progress:
            scores[title] = preservation.measure_captions(
                pipeline, captions, clip, sampling=setting.sampling, extract=extract, progress=progress
            )
    rows = preservation.compare(scores["base"], scores["edited"], photographs=photographs)
    return setting.results("preservation", rows, captions=len(captions), first_seed=0, fid=bool(extract))


def _at_least_one(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {number}")
    return number
