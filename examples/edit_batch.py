"""Create the edits of a CSV file, apply those that are ready, and print the checkpoint: `python edit_batch.py`.

EMENDER_URL and EMENDER_API_KEY name the service and the key. The file has the columns `source` and `destination`.
"""

import argparse
import csv
import sys
from pathlib import Path

from emender import Client, Destination, EditCreate, EmenderError, StageOneSettings


def main() -> int:
    parser = argparse.ArgumentParser(description="Create the edits of a CSV file and apply them.")
    parser.add_argument("model", help="name of the model")
    parser.add_argument("file", type=Path, help="CSV file with the columns source and destination")
    parser.add_argument("--alias", help="alias to move to the checkpoint")
    arguments = parser.parse_args()
    settings = StageOneSettings(objective="text")
    with arguments.file.open(newline="", encoding="utf-8") as file:
        edits = [
            EditCreate(source=row["source"], destination=Destination(prompt=row["destination"]), settings=settings)
            for row in csv.DictReader(file)
        ]
    try:
        with Client() as client:
            batch = client.edits.create_batch(arguments.model, edits)
            ended = client.edits.wait_batch(batch)
            for edit in ended:
                if edit.problem is not None:
                    sys.stderr.write(f"{edit.source}: {edit.problem.detail}\n")
            ready = [edit.id for edit in ended if edit.state == "ready"]
            checkpoint = client.checkpoints.apply(arguments.model, edits=ready, alias=arguments.alias)
            checkpoint = client.checkpoints.wait(arguments.model, checkpoint.version)
    except EmenderError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    sys.stdout.write(f"{checkpoint.version}: {checkpoint.edit_count} edits, commit {checkpoint.commit}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
