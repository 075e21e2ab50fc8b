"""Measure edits from the command line: `python -m editing.evaluation iceb --help`."""

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from editing.errors import EditingError, TaskUnreadable
from editing.evaluation.benchmark import BenchmarkSource, list_benchmarks
from editing.evaluation.commands import add_commands, at_least_one, print_table, write_report
from editing.evaluation.methods import CONTEXTS, METHODS
from editing.evaluation.plot import plot_methods
from editing.evaluation.report import build_report, build_table
from editing.evaluation.runner import BASE, Unit, measure_units, summarize_methods
from editing.files import write_atomically

OUT = Path("out/evaluation")


def run_iceb(arguments: argparse.Namespace) -> None:
    """Compare methods on a task of ICEB, or of an edition of it."""
    methods = tuple(dict.fromkeys((BASE, *arguments.methods)))  # scores are changes of the base
    source = BenchmarkSource(
        model=arguments.model,
        classifier=arguments.classifier,
        data=arguments.data,
        second_moments=arguments.second_moments,
        device=arguments.device,
        num_inference_steps=arguments.num_inference_steps,
    )
    seeds = arguments.seeds
    units = [Unit(arguments.task, arguments.edits, seed, method) for seed in range(seeds) for method in methods]
    jobs = arguments.jobs or (_count_cores() if source.is_installed and arguments.device == "cpu" else 1)
    with Progress(console=Console(stderr=True)) as progress:
        bar = progress.add_task(f"{arguments.task}, {arguments.edits} edits", total=len(units))
        benchmark, measurements = measure_units(
            source, units, folder=arguments.out, jobs=jobs, done=lambda _: progress.advance(bar)
        )
    results = summarize_methods(benchmark, measurements)
    print_table(build_table(results, unit=units[0], seeds=seeds))
    write_report(build_report(benchmark, results, unit=units[0], seeds=seeds), arguments.json)


def plot_reports(arguments: argparse.Namespace) -> None:
    """Plot S2D and HD against the number of edits, from reports of `iceb --json`."""
    reports = []
    for path in arguments.reports:
        try:
            report = json.loads(path.read_text(encoding="utf-8"))
            reports.append({"edits": int(report["edits"]), "methods": dict(report["methods"])})
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise TaskUnreadable(f"{path} is no report of `iceb --json`: {error}") from error
    write_atomically(arguments.out, plot_methods(reports))


def _count_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m editing.evaluation", description=__doc__)
    benchmarks = parser.add_subparsers(required=True, metavar="BENCHMARK")
    iceb = benchmarks.add_parser("iceb", help="arbitrary editing and rectification", description=run_iceb.__doc__)
    iceb.set_defaults(run=run_iceb)
    names = ", ".join(list_benchmarks()) or "none"
    iceb.add_argument("--model", required=True, help=f"an installed benchmark ({names}), a folder, or an id on the Hub")
    iceb.add_argument("--classifier", metavar="ID", help="of ImageNet's classes, with a folder or an id")
    iceb.add_argument("--data", type=Path, metavar="FOLDER", help="ICEB's own files, with a folder or an id")
    iceb.add_argument("--second-moments", type=Path, metavar="FILE", help="(default: in the model's folder)")
    iceb.add_argument("--task", choices=["arbitrary", "rectification"], default="arbitrary")
    iceb.add_argument("--edits", type=at_least_one, default=100, help="(default: %(default)s)")
    iceb.add_argument("--seeds", type=at_least_one, default=3, help="selections of edits (default: %(default)s)")
    iceb.add_argument(
        "--methods",
        nargs="+",
        choices=list(METHODS),
        default=[method for method in METHODS if method != CONTEXTS],
        metavar="NAME",
        help=f"of {', '.join(METHODS)} (default: all but {CONTEXTS})",
    )
    iceb.add_argument("--num-inference-steps", type=at_least_one, help="for each picture")
    iceb.add_argument("--device", default="cpu", help="(default: %(default)s)")
    iceb.add_argument("--jobs", type=at_least_one, help="processes (default: the cores, for an installed benchmark)")
    iceb.add_argument(
        "--out",
        type=Path,
        default=OUT,
        metavar="FOLDER",
        help="measurements are stored there and not repeated (default: %(default)s)",
    )
    iceb.add_argument("--json", type=Path, metavar="FILE", help="write the report there instead of printing it")
    plot = benchmarks.add_parser(
        "plot", help="reports of iceb against the number of edits", description=plot_reports.__doc__
    )
    plot.set_defaults(run=plot_reports)
    plot.add_argument("reports", nargs="+", type=Path, metavar="REPORT", help="one for each number of edits")
    plot.add_argument("--out", type=Path, required=True, metavar="FILE", help="the picture, PNG")
    add_commands(benchmarks)
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    parser = _build_parser()
    parsed = parser.parse_args(arguments)
    try:
        parsed.run(parsed)
    except EditingError as error:
        parser.exit(1, f"{error.detail}\n")


if __name__ == "__main__":
    main()
