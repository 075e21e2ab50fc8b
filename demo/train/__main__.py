"""Train the emoji model: `python -m demo.train` runs all stages, `python -m demo.train unet` one. Interrupted stages
go on."""

import argparse
import dataclasses
from collections.abc import Callable
from pathlib import Path

from transformers import CLIPTokenizer

from demo import art
from demo.concepts import WEIGHTS, read_concepts
from demo.train import autoencoder, classifier, export, text_encoder, tokenizer, unet
from demo.train.loop import Schedule
from demo.train.text_encoder import states
from demo.train.unpack import unpack


@dataclasses.dataclass(frozen=True)
class Options:
    """What the command line asked for."""

    checkpoints: Path
    art: Path
    weights: Path
    warm_start: Path | None
    steps: int | None
    rate: float | None
    processes: int

    def schedule(self, usual: Schedule) -> Schedule:
        return dataclasses.replace(
            usual,
            steps=usual.steps if self.steps is None else self.steps,
            rate=usual.rate if self.rate is None else self.rate,
        )


def train_tokenizer(options: Options) -> None:
    tokenizer.train(read_concepts(), options.checkpoints, warm_start=options.warm_start)


def train_autoencoder(options: Options) -> None:
    schedule = options.schedule(autoencoder.SCHEDULE)
    autoencoder.train(art.load(options.art), options.checkpoints, schedule=schedule, warm_start=options.warm_start)


def train_meaning(options: Options) -> None:
    words, schedule = tokenizer.load(options.checkpoints), options.schedule(text_encoder.MEANING_SCHEDULE)
    text_encoder.train_meaning(
        read_concepts(), words, options.checkpoints, schedule=schedule, warm_start=options.warm_start
    )


def train_editability(options: Options) -> None:
    words, schedule = tokenizer.load(options.checkpoints), options.schedule(text_encoder.EDITABLE_SCHEDULE)
    text_encoder.train_editability(read_concepts(), words, options.checkpoints, schedule=schedule)


def train_text_encoder(options: Options) -> None:
    train_meaning(options)
    train_editability(options)


def train_unet(options: Options) -> None:
    concepts, pictures = read_concepts(), art.load(options.art)
    words = tokenizer.load(options.checkpoints)
    encoder = text_encoder.load(words, options.checkpoints)
    compressor = autoencoder.finished(pictures, options.checkpoints)
    shown = words(unet.shown_prompts(concepts), padding="max_length", return_tensors="pt").input_ids
    work = unet.TrainingInputs(
        art=pictures,
        latents=autoencoder.latents(compressor, pictures),
        caption_states=unet.encode_captions(concepts, words, encoder),
        shown=states(encoder, shown),
        autoencoder=compressor,
        concepts=concepts,
        folder=options.checkpoints,
        schedule=options.schedule(unet.SCHEDULE),
        widths=unet.WIDTHS,
        warm_start=options.warm_start,
        processes=options.processes,
    )
    unet.train(work)


def train_classifier(options: Options) -> None:
    pictures = art.load(options.art)
    compressor = autoencoder.finished(pictures, options.checkpoints)
    both = classifier.both_kinds(compressor, pictures)
    schedule = options.schedule(classifier.SCHEDULE)
    classifier.train(pictures, both, read_concepts(), options.checkpoints, schedule=schedule)


def write_weights(options: Options) -> None:
    concepts = read_concepts()
    words: CLIPTokenizer = tokenizer.load(options.checkpoints)
    export.export(
        options.weights,
        concepts=concepts,
        tokenizer=words,
        encoder=text_encoder.load(words, options.checkpoints),
        autoencoder=autoencoder.finished(art.load(options.art), options.checkpoints),
        unet=unet.load(options.checkpoints),
        classifier=classifier.load(concepts, options.checkpoints),
    )


STAGES: dict[str, Callable[[Options], None]] = {
    "tokenizer": train_tokenizer,
    "autoencoder": train_autoencoder,
    "text-encoder": train_text_encoder,
    "unet": train_unet,
    "classifier": train_classifier,
    "export": write_weights,
}
# Not of a whole run: the two phases of the text encoder by themselves, and the committed weights as checkpoints.
ALONE: dict[str, Callable[[Options], None]] = {
    text_encoder.MEANING: train_meaning,
    text_encoder.EDITABLE: train_editability,
    "unpack": lambda options: unpack(options.weights, options.checkpoints),
}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m demo.train", description=__doc__)
    parser.add_argument(
        "stage", nargs="*", choices=[[], *STAGES, *ALONE], help="stages to run, in order (default: all)"
    )
    parser.add_argument(
        "--work", type=Path, default=art.WORK, help="folder of art and checkpoints (default: %(default)s)"
    )
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="where export writes (default: %(default)s)")
    parser.add_argument(
        "--warm-start", type=Path, metavar="FOLDER", help="begin at the weights of this diffusers pipeline"
    )
    parser.add_argument("--steps", type=int, help="steps of the stages named, instead of the recipe's")
    parser.add_argument("--rate", type=float, help="highest learning rate of the stages named, instead of the recipe's")
    parser.add_argument(
        "--processes", type=int, default=2, help="one-thread processes of the U-Net (default: %(default)s)"
    )
    given = parser.parse_args(arguments)
    if not given.stage and (given.steps or given.rate):
        parser.error("--steps and --rate belong to single stages: name the stage that they are for")
    if given.warm_start is not None and not (given.warm_start / "model_index.json").is_file():
        parser.error(
            f"--warm-start: {given.warm_start} is not a diffusers pipeline folder (it has no model_index.json)"
        )
    options = Options(
        checkpoints=given.work / "checkpoints",
        art=given.work / "art.safetensors",
        weights=given.weights,
        warm_start=given.warm_start,
        steps=given.steps,
        rate=given.rate,
        processes=given.processes,
    )
    if not options.art.is_file():
        art.prepare(art.install_packages(given.work / "art"), options.art)
    for stage in given.stage or STAGES:
        (STAGES | ALONE)[stage](options)


if __name__ == "__main__":
    main()
