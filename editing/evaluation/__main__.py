"""Measure edits from the command line: `python -m editing.evaluation iceb --help`."""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from editing.errors import EditingError, TaskUnreadable
from editing.evaluation.benchmark import Opening, list_benchmarks
from editing.evaluation.commands import add_commands
from editing.evaluation.methods import CONTEXTS, METHODS
from editing.evaluation.plot import plot_methods
from editing.evaluation.report import as_json, as_table
from editing.evaluation.runner import BASE, Unit, results, run
from editing.files import write_atomically

OUT = Path("out/evaluation")


def iceb(given: argparse.Namespace) -> None:
    """Methods on a task of ICEB, or of an edition of it."""
    methods = tuple(dict.fromkeys((BASE, *given.methods)))  # what others are compared with is always measured
    opening = Opening(
        model=given.model,
        classifier=given.classifier,
        data=given.data,
        second_moments=given.second_moments,
        device=given.device,
        num_inference_steps=given.num_inference_steps,
    )
    units = [Unit(given.task, given.edits, seed, method) for seed in range(given.seeds) for method in methods]
    jobs = given.jobs or (_cores() if opening.installed and given.device == "cpu" else 1)
    with Progress(console=Console(stderr=True)) as progress:
        bar = progress.add_task(f"{given.task}, {given.edits} edits", total=len(units))
        benchmark, found = run(opening, units, folder=given.out, jobs=jobs, done=lambda _: progress.advance(bar))
    measured = results(benchmark, found)
    Console(width=160 if not sys.stdout.isatty() else None).print(as_table(measured, of=units[0], seeds=given.seeds))
    report = as_json(benchmark, measured, of=units[0], seeds=given.seeds)
    if given.json is None:
        print(json.dumps(report, ensure_ascii=False))  # noqa: T201
    else:
        write_atomically(given.json, (json.dumps(report, indent=1, ensure_ascii=False) + "\n").encode())


def plot(given: argparse.Namespace) -> None:
    """S2D and HD against the number of edits, from reports that `iceb --json` wrote."""
    reports = []
    for path in given.reports:
        try:
            report = json.loads(path.read_text(encoding="utf-8"))
            reports.append({"edits": int(report["edits"]), "methods": dict(report["methods"])})
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise TaskUnreadable(f"{path} is no report of `iceb --json`: {error}") from error
    write_atomically(given.out, plot_methods(reports))


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _at_least_one(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {number}")
    return number


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m editing.evaluation", description=__doc__)
    benchmarks = parser.add_subparsers(required=True, metavar="BENCHMARK")
    add = benchmarks.add_parser("iceb", help="arbitrary editing and rectification", description=iceb.__doc__)
    add.set_defaults(run=iceb)
    names = ", ".join(list_benchmarks()) or "none"
    add.add_argument("--model", required=True, help=f"an installed benchmark ({names}), a folder, or an id on the hub")
    add.add_argument("--classifier", metavar="ID", help="with a folder or id: a classifier of ImageNet's classes")
    add.add_argument("--data", type=Path, metavar="FOLDER", help="with a folder or id: ICEB's own files")
    add.add_argument("--second-moments", type=Path, metavar="FILE", help="where they do not lie in the model's folder")
    add.add_argument("--task", choices=["arbitrary", "rectification"], default="arbitrary")
    add.add_argument("--edits", type=_at_least_one, default=100)
    add.add_argument("--seeds", type=_at_least_one, default=3, help="choices of edits (default: %(default)s)")
    add.add_argument(
        "--methods",
        nargs="+",
        choices=list(METHODS),
        default=[method for method in METHODS if method != CONTEXTS],
        metavar="NAME",
        help=f"of {', '.join(METHODS)} (default: all but {CONTEXTS})",
    )
    add.add_argument("--num-inference-steps", type=_at_least_one, help="of the solver, for each picture")
    add.add_argument("--device", default="cpu")
    add.add_argument("--jobs", type=_at_least_one, help="processes; default: one a core for an installed benchmark")
    add.add_argument(
        "--out",
        type=Path,
        default=OUT,
        metavar="FOLDER",
        help="what was measured is kept there, and not measured again (default: %(default)s)",
    )
    add.add_argument("--json", type=Path, metavar="FILE", help="write the report there instead of printing it")
    add = benchmarks.add_parser(
        "plot", help="of reports of iceb, against the number of edits", description=plot.__doc__
    )
    add.set_defaults(run=plot)
    add.add_argument("reports", nargs="+", type=Path, metavar="REPORT", help="one for each number of edits")
    add.add_argument("--out", type=Path, required=True, metavar="FILE", help="the picture, PNG")
    add_commands(benchmarks)
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    parser = _parser()
    given = parser.parse_args(arguments)
    try:
        given.run(given)
    except EditingError as error:
        parser.exit(1, f"{error.detail}\n")


if __name__ == "__main__":
    main()
