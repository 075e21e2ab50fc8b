"""Measure the confidences for the questions of a benchmark: draw their pictures and classify them."""

from collections.abc import Callable, Sequence

from editing.evaluation.classifiers import Classifier
from editing.evaluation.iceb import Confidences, Question
from editing.pictures.draw import draw_pictures
from editing.pipelines import EditablePipeline

_CHUNK = 128  # pictures drawn before they are classified


def measure_confidences(
    pipeline: EditablePipeline,
    classifier: Classifier,
    questions: Sequence[Question],
    *,
    num_inference_steps: int,
    guidance_scale: float,
    destination_prompts: bool = False,
    chunk: int = _CHUNK,
    progress: Callable[[int], None] | None = None,
) -> Confidences:
    """Draw the picture of each question and return the classifier's confidences.

    With `destination_prompts` the destination replaces the source, and held-out concepts are not drawn. `progress` is
    called with the number of pictures so far, and may raise.
    """
    wanted: list[float | None] = [None] * len(questions)
    original: list[float | None] = [None] * len(questions)
    prompts = [each.destination_prompt if destination_prompts else each.prompt for each in questions]
    drawn = [index for index, prompt in enumerate(prompts) if prompt is not None]
    for start in range(0, len(drawn), chunk):
        if progress:
            progress(start)
        indices = drawn[start : start + chunk]
        chosen = [questions[index] for index in indices]
        pictures = draw_pictures(
            pipeline,
            [prompts[index] or "" for index in indices],
            seeds=[question.seed for question in chosen],
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
        )
        classes = sorted({name for each in chosen for name in (each.wanted, each.original) if name is not None})
        column = {name: number for number, name in enumerate(classes)}
        confidences = classifier.classify(pictures, classes).tolist()  # (pictures, classes)
        for index, question, row in zip(indices, chosen, confidences, strict=True):
            wanted[index] = row[column[question.wanted]]
            if question.original is not None:
                original[index] = row[column[question.original]]
    return Confidences(tuple(wanted), tuple(original))
