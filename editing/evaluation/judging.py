"""Draw the pictures that questions ask for, and read the confidences off them."""

from collections.abc import Callable, Sequence

from editing.evaluation.classifiers import Classifier
from editing.evaluation.iceb import Answers, Question
from editing.pictures.draw import draw_pictures
from editing.pipelines import EditablePipeline

_DRAWN = 128  # pictures drawn before they are judged


def answer(
    pipeline: EditablePipeline,
    classifier: Classifier,
    questions: Sequence[Question],
    *,
    num_inference_steps: int,
    guidance_scale: float,
    destination_prompts: bool = False,
    at_a_time: int = _DRAWN,
    progress: Callable[[int], None] | None = None,
) -> Answers:
    """Draw the questions and return the confidences.

    With `destination_prompts` the destination replaces the source, and held-out concepts are not drawn. `progress` is
    called with the number of pictures judged so far, and may raise.
    """
    wanted: list[float | None] = [None] * len(questions)
    original: list[float | None] = [None] * len(questions)
    asked = [
        place
        for place, question in enumerate(questions)
        if not destination_prompts or question.destination_prompt is not None
    ]
    for start in range(0, len(asked), at_a_time):
        if progress:
            progress(start)
        places = asked[start : start + at_a_time]
        chosen = [questions[place] for place in places]
        pictures = draw_pictures(
            pipeline,
            [
                question.destination_prompt
                if destination_prompts and question.destination_prompt is not None
                else question.prompt
                for question in chosen
            ],
            seeds=[question.seed for question in chosen],
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
        )
        classes = sorted({name for q in chosen for name in (q.wanted, q.original) if name is not None})
        column = {name: number for number, name in enumerate(classes)}
        read = classifier.confidences(pictures, classes).tolist()  # (pictures, classes)
        for place, question, row in zip(places, chosen, read, strict=True):
            wanted[place] = row[column[question.wanted]]
            if question.original is not None:
                original[place] = row[column[question.original]]
    return Answers(tuple(wanted), tuple(original))
