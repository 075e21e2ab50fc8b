"""The commands that compare an edited pipeline with its base: RoAD, TIMED, artists, gender, preservation."""

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
from editing.evaluation.cost import measure_cost
from editing.evaluation.drawing import Sampling
from editing.evaluation.intervals import Interval
from editing.evaluation.metrics import Clip, FeatureMoments, load_inception, load_lpips
from editing.evaluation.results import Results
from editing.evaluation.road import load_road
from editing.evaluation.rows import Loaded, Note
from editing.evaluation.timed import load_timed
from editing.families.layout import describe_pipeline
from editing.files import write_atomically
from editing.pipelines import EditablePipeline, load_pipeline


def add_commands(benchmarks: Any) -> None:
    """Add a parser for each command to argparse's subparsers, with its function as `run`."""
    _add_contrasts(benchmarks, "road", load_road, "roles and appearances: CLIP win rates")
    _add_contrasts(benchmarks, "timed", load_timed, "implicit assumptions: CLIP win rates")

    parser = _add_command(benchmarks, "artists", _measure_artists, "held-out artists' styles: CLIP score, LPIPS")
    parser.add_argument("--lpips", choices=["alex", "vgg", "squeeze"], help="measure LPIPS (the extra `evaluation`)")
    parser.add_argument("--limit", type=at_least_one, metavar="N", help="the file's first prompts only")

    parser = _add_command(benchmarks, "gender", _measure_gender, "gender balance of professions: Δ_p")
    parser.add_argument("--seeds", type=at_least_one, default=1, help="runs, each with its own pictures")
    parser.add_argument("--pictures", type=at_least_one, default=gender.PICTURES, help="per profession and run")
    parser.add_argument("--limit", type=at_least_one, metavar="N", help="the file's first professions only")

    parser = _add_command(benchmarks, "preservation", _measure_preservation, "captions such as COCO's: CLIP score, FID")
    parser.add_argument("--column", help="of the captions' file (default: caption, else text)")
    parser.add_argument("--limit", type=at_least_one, metavar="N", help="the file's first captions only")
    parser.add_argument("--fid", action="store_true", help="measure FID with clean-fid (the extra `evaluation`)")
    parser.add_argument(
        "--photographs", type=Path, metavar="FOLDER", help="compare with these for FID (default: the base's pictures)"
    )


def _add_command(
    benchmarks: Any, name: str, measure: Callable[["_Setting"], Results], summary: str
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = benchmarks.add_parser(name, help=summary, description=summary)
    parser.set_defaults(run=lambda arguments: _run(arguments, measure))
    parser.add_argument("--model", type=Path, required=True, metavar="FOLDER", help="the edited pipeline")
    parser.add_argument("--base", type=Path, required=True, metavar="FOLDER", help="the pipeline before the edits")
    parser.add_argument("--data", type=Path, required=True, metavar="FILE", help="the benchmark's file, as published")
    parser.add_argument("--clip", type=Path, required=True, metavar="FOLDER", help="the CLIP model for the scores")
    parser.add_argument("--num-inference-steps", type=at_least_one, default=20, help="(default: %(default)s)")
    parser.add_argument("--guidance-scale", type=float, default=7.5, help="(default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="(default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report there instead of printing it")
    return parser


def _add_contrasts(benchmarks: Any, name: str, load: Callable[[Path], Loaded[ContrastTask]], summary: str) -> None:
    def measure(setting: "_Setting") -> Results:
        return _measure_contrasts(setting, name, load(setting.arguments.data))

    parser = _add_command(benchmarks, name, measure, summary)
    parser.add_argument("--seeds", type=at_least_one, default=3, help="pictures of each prompt (default: %(default)s)")
    parser.add_argument("--limit", type=at_least_one, metavar="N", help="the file's first tasks only")


class _Setting:
    """What every command measures with. Models are loaded on use, so that errors in the benchmark's file come first."""

    def __init__(self, arguments: argparse.Namespace, progress: Progress) -> None:
        self.arguments, self._progress = arguments, progress
        self.sampling = Sampling(arguments.num_inference_steps, arguments.guidance_scale)
        self.dtype = torch.float32 if torch.device(arguments.device).type == "cpu" else torch.float16

    def load_clip(self) -> Clip:
        return Clip.from_folder(self.arguments.clip, device=self.arguments.device)

    def load_base(self) -> EditablePipeline:
        return load_pipeline(self.arguments.base, device=self.arguments.device, dtype=self.dtype)

    def load_edited(self) -> EditablePipeline:
        return load_pipeline(self.arguments.model, device=self.arguments.device, dtype=self.dtype)

    @contextmanager
    def show_progress(self, name: str) -> Iterator[Callable[[int, int], None]]:
        bar = self._progress.add_task(name, total=None)
        yield lambda done, total: self._progress.update(bar, completed=done, total=total)

    def build_results(
        self,
        benchmark: str,
        rows: dict[str, dict[str, Interval]],
        *,
        notes: Sequence[Note] = (),
        details: dict[str, Any] | None = None,
        **settings: Any,
    ) -> Results:
        all_settings = {
            **settings,
            **asdict(self.sampling),
            "dtype": str(self.dtype).removeprefix("torch."),
            "device": torch.device(self.arguments.device).type,
            "engine": ENGINE_VERSION,
            "versions": {module.__name__: module.__version__ for module in (torch, diffusers, transformers)},
            "digests": {
                "base": describe_pipeline(self.arguments.base).digest,
                "edited": describe_pipeline(self.arguments.model).digest,
            },
        }
        return Results(benchmark, rows, all_settings, notes, details or {})


def _run(arguments: argparse.Namespace, measure: Callable[[_Setting], Results]) -> None:
    with Progress(console=Console(stderr=True)) as progress, measure_cost(torch.device(arguments.device)) as cost:
        results = measure(_Setting(arguments, progress))
    report = results.to_json()
    report["settings"] |= asdict(cost)
    print_table(results.build_table())
    write_report(report, arguments.json)


def print_table(table: Any) -> None:
    """Print a table. Without a terminal it is 160 columns wide."""
    Console(width=160 if not sys.stdout.isatty() else None).print(table)


def write_report(report: dict[str, Any], path: Path | None) -> None:
    """Write a report as JSON to a file, or print it."""
    if path is None:
        print(json.dumps(report, ensure_ascii=False))  # noqa: T201
    else:
        write_atomically(path, (json.dumps(report, indent=1, ensure_ascii=False) + "\n").encode())


def _measure_contrasts(setting: _Setting, name: str, loaded: Loaded[ContrastTask]) -> Results:
    tasks = loaded.tasks[: setting.arguments.limit]
    clip = setting.load_clip()
    seeds = range(setting.arguments.seeds)
    base = setting.load_base()
    models = (("base", base, False), ("destination", base, True), ("edited", setting.load_edited(), False))
    rows = {}
    for title, pipeline, prompts in models:
        with setting.show_progress(title) as progress:
            rates = contrasts.measure_contrasts(
                pipeline,
                tasks,
                clip,
                seeds=seeds,
                sampling=setting.sampling,
                destination_prompts=prompts,
                progress=progress,
            )
        rows[title] = contrasts.average_seeds(rates)
    return setting.build_results(name, rows, notes=loaded.notes, tasks=len(tasks), seeds=list(seeds))


def _measure_artists(setting: _Setting) -> Results:
    loaded = artists.load_artists(setting.arguments.data)
    prompts = loaded.tasks[: setting.arguments.limit]
    network, device = setting.arguments.lpips, setting.arguments.device
    distance = load_lpips(network, device=device) if network else None
    with setting.show_progress("base and edited") as progress:
        scores = artists.measure_styles(
            setting.load_base(),
            setting.load_edited(),
            prompts,
            setting.load_clip(),
            sampling=setting.sampling,
            distance=distance,
            progress=progress,
        )
    by_artist = {
        "base_clip": scores.average_by_artist(scores.base_clip),
        "edited_clip": scores.average_by_artist(scores.edited_clip),
    }
    return setting.build_results(
        "artists",
        scores.build_rows(),
        notes=loaded.notes,
        details=by_artist,
        prompts=len(prompts),
        seeds="listed",
        lpips=network,
    )


def _measure_gender(setting: _Setting) -> Results:
    loaded = gender.load_professions(setting.arguments.data)
    professions = loaded.tasks[: setting.arguments.limit]
    clip, pictures, runs = setting.load_clip(), setting.arguments.pictures, range(setting.arguments.seeds)
    rows, details = {}, {}
    for title, pipeline in (("base", setting.load_base()), ("edited", setting.load_edited())):
        balances = []
        for run in runs:
            with setting.show_progress(f"{title}, run {run + 1}") as progress:
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
    return setting.build_results(
        "gender",
        rows,
        notes=loaded.notes,
        details={"female_shares": details},
        professions=len(professions),
        pictures=pictures,
        runs=len(runs),
    )


def _measure_preservation(setting: _Setting) -> Results:
    arguments = setting.arguments
    captions = preservation.load_captions(arguments.data, column=arguments.column, limit=arguments.limit)
    extract = load_inception(device=arguments.device) if arguments.fid else None
    photographs = None
    if extract is not None and arguments.photographs is not None:
        photographs = FeatureMoments.from_batches(map(extract, preservation.open_pictures(arguments.photographs)))
    clip = setting.load_clip()
    scores = {}
    for title, pipeline in (("base", setting.load_base()), ("edited", setting.load_edited())):
        with setting.show_progress(title) as progress:
            scores[title] = preservation.measure_captions(
                pipeline, captions, clip, sampling=setting.sampling, extract=extract, progress=progress
            )
    rows = preservation.compare_captions(scores["base"], scores["edited"], photographs=photographs)
    return setting.build_results("preservation", rows, captions=len(captions), first_seed=0, fid=bool(extract))


def at_least_one(text: str) -> int:
    """Parse a command-line argument of 1 or more."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {number}")
    return number
