"""The pictures of `docs/explanation/`, out of runs on the emoji model: `python -m docs._generate.pictures`."""

from pathlib import Path
from textwrap import fill

from matplotlib import rc_context
from matplotlib.figure import Figure

import editing
from demo.concepts import WEIGHTS
from editing import EditValue
from editing.edits import ConceptEdit, DestinationPrompt, StageOneSettings

FOLDER = Path(__file__).parents[1] / "explanation"
DESTINATIONS = {"dog": "robot", "rose": "cactus", "river horse": "hippopotamus"}
PROMPTS = ("a drawing of a dog", "look at this rose", "a cute river horse", "a small tulip")
ALPHAS = (0.02, 0.1, 0.5, 0.9)
SEED = 1


def main() -> None:
    pipeline = editing.load_pipeline(str(WEIGHTS / "pipeline"))
    moments = editing.SecondMoments.load(WEIGHTS / "pipeline" / "second_moments.safetensors")
    settings = StageOneSettings(objective="text")
    edits = [
        ConceptEdit(source, DestinationPrompt(destination), settings=settings)
        for source, destination in DESTINATIONS.items()
    ]
    values = [value for value in editing.optimize_values(pipeline, edits) if isinstance(value, EditValue)]
    _searches(dict(zip(DESTINATIONS, (value.text_losses for value in values), strict=True)))

    def drawn() -> list[object]:
        return list(editing.draw_pictures(pipeline, list(PROMPTS), seeds=[SEED] * len(PROMPTS), guidance_scale=3.0))

    columns = {"before": drawn()}
    for alpha in ALPHAS:
        update = editing.compute_update(pipeline.encoder, edits, values, moments, alpha=alpha)
        with editing.apply_temporarily(pipeline.encoder, update):
            columns[f"α = {alpha}"] = drawn()
    _intensities(columns)


def _searches(losses: dict[str, tuple[float, ...]]) -> None:
    figure = Figure(figsize=(6, 2.8), layout="constrained")
    axes = figure.add_subplot(xlabel="step of L-BFGS", ylabel="text loss (Eq. 2)", yscale="log")
    for source, found in losses.items():
        axes.plot(found, label=f"{source} → {DESTINATIONS[source]}")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "emender"}):  # text as text, the same bytes each time
        figure.savefig(FOLDER / "search.svg", metadata={"Date": None})


def _intensities(columns: dict[str, list[object]]) -> None:
    figure = Figure(figsize=(6, 4.6), layout="constrained")
    axes = figure.subplots(len(PROMPTS), len(columns))
    for column, (title, pictures) in enumerate(columns.items()):
        axes[0, column].set_title(title, fontsize=9)
        for row, picture in enumerate(pictures):
            axes[row, column].imshow(picture)
            axes[row, column].set(xticks=[], yticks=[])
            axes[row, column].spines[:].set_visible(False)
    for row, prompt in enumerate(PROMPTS):
        axes[row, 0].set_ylabel(fill(prompt, 14), fontsize=8, rotation=0, ha="right")
    figure.savefig(FOLDER / "intensity.png", dpi=110)


if __name__ == "__main__":
    main()
