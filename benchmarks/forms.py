"""How far an edit reaches the other forms of its source, and the earlier layers that "clip skip" reads.

    OMP_NUM_THREADS=1 python -m benchmarks.forms --json forms.json

Ten text-only edits of the emoji model, applied one by one. The way is from what the text encoder outputs for the form
to what it outputs for the destination, both at the subject's last token in three prompts. A share of 1 is all of it,
0 is none. With clip skip k, the output is that of the last layer but k, normalized as diffusers does.
"""

import argparse
import json
from statistics import mean
from typing import Any

import torch
from torch import Tensor

import editing
from benchmarks.measuring import say
from editing import ConceptEdit, DestinationPrompt, EditablePipeline, StageOneSettings

PIPELINE = "demo/weights/pipeline"
SOURCES = {
    "dog": ("dogs", "puppy"), "cat": ("cats", "kitty"), "apple": ("apples", "red apple"),
    "car": ("cars", "automobile"), "bird": ("birds", "birdie"), "tree": ("trees", "oak"),
    "rocket": ("rockets", "spaceship"), "ship": ("ships", "boat"), "horse": ("horses", "pony"),
    "house": ("houses", "home"),
}  # fmt: skip
"""By source, its plural and another name of it."""
DESTINATION = "robot"
PROMPTS = ("a photo of a {}", "a drawing of the {}", "{} in the rain")
SKIPS = (0, 1, 2, 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", help="write the results to this file")
    parser.add_argument("--sources", type=int, default=len(SOURCES), help="number of edits")
    arguments = parser.parse_args()
    results = measure_forms(editing.load_pipeline(PIPELINE), dict(list(SOURCES.items())[: arguments.sources]))
    for name, share in results.items():
        say(f"{name}: {share:.2f}")
    if arguments.json:
        with open(arguments.json, "w", encoding="utf-8") as file:
            json.dump(results, file, indent=1)


def measure_forms(pipeline: EditablePipeline, sources: dict[str, tuple[str, str]]) -> dict[str, float]:
    """Return the mean share of the way by form, and by clip skip for the source itself."""
    moments = editing.SecondMoments.load(f"{PIPELINE}/second_moments.safetensors")
    settings = StageOneSettings(objective="text")
    edits = [ConceptEdit(source, DestinationPrompt(DESTINATION), settings=settings) for source in sources]
    values = editing.optimize_values(pipeline, edits)
    shares: dict[str, list[float]] = {}
    for edit, value in zip(edits, values, strict=True):
        plural, other = sources[edit.source]
        forms = {"name": edit.source, "capitals": edit.source.upper(), "plural": plural, "other name": other}
        update = editing.compute_update(pipeline.encoder, [edit], [value], moments)
        wanted = encode(pipeline, DESTINATION)
        before = {form: encode(pipeline, text) for form, text in forms.items()}
        with editing.apply_temporarily(pipeline.encoder, update):
            after = {form: encode(pipeline, text) for form, text in forms.items()}
        for form in forms:
            shares.setdefault(form, []).append(compute_share(before[form][:, 0], after[form][:, 0], wanted[:, 0]))
        for skip in SKIPS:
            found = compute_share(before["name"][:, skip], after["name"][:, skip], wanted[:, skip])
            shares.setdefault(f"name, clip skip {skip}", []).append(found)
    return {name: round(mean(found), 3) for name, found in shares.items()}


@torch.no_grad()
def encode(pipeline: EditablePipeline, subject: str) -> Tensor:
    """Return the states of the subject's last token, (prompts, skips, d)."""
    encoder, model = pipeline.encoder, pipeline.encoder.model
    rows = []
    for prompt in PROMPTS:
        located = encoder.tokenizer.locate(prompt, subject)
        ids = torch.tensor([encoder.tokenizer.pad(located.ids)], device=encoder.device)
        hidden: Any = model(ids, output_hidden_states=True).hidden_states  # each (1, s, d), before the final norm
        states = torch.stack([hidden[-1 - skip][0, located.last_subject_index] for skip in SKIPS])
        rows.append(encoder.normalize(states))
    return torch.stack(rows).double()


def compute_share(before: Tensor, after: Tensor, wanted: Tensor) -> float:
    """Project the move onto the way, over all prompts: three tensors (prompts, d)."""
    way = wanted - before
    return float(((after - before) * way).sum() / way.square().sum())


if __name__ == "__main__":
    main()
