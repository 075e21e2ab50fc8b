"""Run the demo: `python -m demo --out out/demo`."""

import argparse
import json
import sys
from pathlib import Path

from demo.concepts import WEIGHTS


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m demo", description="Edit concepts of the emoji model over HTTP.")
    parser.add_argument("--out", type=Path, default=Path("out/demo"), help="folder of the picture and the report")
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="folder of the pipeline (default: demo/weights)")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    arguments = parser.parse_args()

    import transformers

    transformers.utils.logging.set_verbosity_error()  # before diffusers is imported, which warns of unused parts
    from demo.run import DemoError, run

    try:
        report = run(arguments.out, weights=arguments.weights, quiet=arguments.json)
    except DemoError as error:
        sys.exit(str(error))
    if arguments.json:
        print(json.dumps(report, indent=2))  # noqa: T201


if __name__ == "__main__":
    main()
