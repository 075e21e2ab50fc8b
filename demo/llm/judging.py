"""Judge an edited pipeline by the pictures that it draws with the engine."""

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

import editing
from demo.classify import Classifier, classify
from demo.llm.tasks import Task


@torch.no_grad()
def draw_pictures(
    pipeline: editing.EditablePipeline, prompts: Sequence[str], *, steps: int, guidance_scale: float, batch: int
) -> Tensor:
    """Draw one picture for each prompt, (prompts, 3, 32, 32) in [-1, 1], with the prompt's position as its seed."""
    parts = []
    for start in range(0, len(prompts), batch):
        chosen = prompts[start : start + batch]
        latents = pipeline.sample(
            chosen,
            generators=[torch.Generator().manual_seed(start + row) for row in range(len(chosen))],
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
        )
        parts.append(pipeline.generator.decode(latents).clamp(-1, 1))
    return torch.cat(parts)


def measure_confidences(pictures: Tensor, shown: Sequence[str], classifier: Classifier) -> Tensor:
    """Return the confidence that each picture shows the concept of its name, (pictures,). On the CPU."""
    device = next(classifier.parameters()).device
    confidences = classify(pictures.to(device), classifier).concept.cpu()
    columns = torch.tensor([classifier.names.index(name) for name in shown])
    return confidences[torch.arange(len(shown)), columns]


def judge_task(
    pipeline: editing.EditablePipeline,
    classifier: Classifier,
    task: Task,
    *,
    names: Collection[str],
    steps: int,
    guidance_scale: float,
    batch: int,
) -> dict[str, float]:
    """Return the mean confidence in the pictures of the task's questions of these names."""
    questions = {name: asked for name, asked in task.questions.items() if name in names}
    asked = [pair for question in questions.values() for pair in question]
    pictures = draw_pictures(
        pipeline, [prompt for prompt, _ in asked], steps=steps, guidance_scale=guidance_scale, batch=batch
    )
    own = measure_confidences(pictures, [shown for _, shown in asked], classifier)
    parts = own.split([len(question) for question in questions.values()])
    return {name: part.mean().item() for name, part in zip(questions, parts, strict=True) if len(part)}
