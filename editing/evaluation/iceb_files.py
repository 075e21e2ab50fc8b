"""ICEB from its own files, as the published repository has them.

    arbitrary_{train,val}.csv      300 edits: their templates, and five free prompts each
    rectification_{train,val}.csv  the same of misunderstood aliases; a few of them stand in the second file alone
    imgnet_aug_test.json           the held-out classes, with five prompts each
    imgnet_prompts_cls.json        how well the model draws each name of each class
    class2id.json                  the classes' places among the classifier's

Seeds are numbers or text. A free prompt that has the source's name written out has `{}` put in its place.
"""

import ast
import csv
import json
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from editing.edits import DEFAULT_TEMPLATES, PLACEHOLDER, StageOneSettings
from editing.errors import TaskUnreadable
from editing.evaluation.iceb import Case, HeldOut, Prompt, Task, TaskName

UNDERSTOOD = 0.5
"""Aliases that AL2D is measured on: those by whose name the model draws the class with at least this confidence."""

_COLUMNS = ("source", "dest", "prompts", "seeds", "source id", "dest id")


@dataclass(frozen=True)
class IcebFiles:
    """The tasks in a folder of ICEB's files, for a classifier of ImageNet's 1,000 classes.

    The task of seed 0 is the first edits of the file, with the seeds listed there. Others are drawn from all rows by
    their seed, and have other seeds of stage I; a prompt is always drawn at its listed seed.
    """

    folder: Path
    settings: StageOneSettings = StageOneSettings()

    def largest(self, name: TaskName) -> int:
        return len(self._cases(name))

    def task(self, name: TaskName, *, edits: int, seed: int) -> Task:
        cases = self._cases(name)
        if not 1 <= edits <= len(cases):
            raise TaskUnreadable(f"{self.folder.name}: {name} editing has from 1 to {len(cases)} edits, not {edits}")
        chosen = cases[:edits]
        if seed:
            chosen = tuple(replace(case, seed=case.seed + seed) for case in random.Random(seed).sample(cases, edits))
        sources = {case.source_class for case in cases}
        held_out = tuple(concept for concept in self._concepts if concept.name not in sources)
        return Task(name, chosen, held_out, self.settings)

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Of all classes in the order of the classifier's logits; one that the file leaves out has its number."""
        places = self._json("class2id.json", dict)
        if not places or not all(isinstance(place, int) and 0 <= place < 10_000 for place in places.values()):
            raise TaskUnreadable("class2id.json: expected the place of each class, by its name")
        names = [f"class {place}" for place in range(max(places.values()) + 1)]
        for name, place in places.items():
            names[place] = name
        return tuple(names)

    def _cases(self, name: TaskName) -> tuple[Case, ...]:
        return self._arbitrary if name == "arbitrary" else self._rectification

    @cached_property
    def _arbitrary(self) -> tuple[Case, ...]:
        return self._read("arbitrary", aliases=True)

    @cached_property
    def _rectification(self) -> tuple[Case, ...]:
        return self._read("rectification", aliases=False)

    def _read(self, name: str, *, aliases: bool) -> tuple[Case, ...]:
        edits = {(row.source, row.source_id): row for row in self._rows(f"{name}_train.csv")}
        cases = []
        for row in self._rows(f"{name}_val.csv"):
            edit = edits.get((row.source, row.source_id))
            templates = edit.prompts if edit else DEFAULT_TEMPLATES
            seeds = edit.seeds if edit and edit.seeds else row.seeds[: len(templates)]
            free = _paired(row, row.prompts, row.seeds)
            cases.append(
                Case(
                    source=row.source,
                    destination=row.destination,
                    source_class=self._class(row, row.source_id),
                    destination_class=self._class(row, row.destination_id),
                    templates=_paired(edit or row, templates, seeds),
                    free=free,
                    aliases=self._aliases(row) if aliases else (),
                    alias_prompts=free if aliases else (),
                    seed=edit.seed if edit else row.seed,
                )
            )
        return tuple(cases)

    def _aliases(self, row: "_Row") -> tuple[str, ...]:
        scores = self._scores.get(str(row.source_id), {})
        try:
            understood = [name for name, score in scores.items() if score["mean"] >= UNDERSTOOD]
        except (AttributeError, KeyError, TypeError):
            raise TaskUnreadable(
                f"imgnet_prompts_cls.json, class {row.source_id}: no mean score of each name"
            ) from None
        return tuple(name for name in understood if name != row.source)

    @cached_property
    def _scores(self) -> Mapping[str, Any]:
        return self._json("imgnet_prompts_cls.json", dict)

    @cached_property
    def _concepts(self) -> tuple[HeldOut, ...]:
        prompts: dict[int, list[Prompt]] = {}
        for number, entry in enumerate(self._json("imgnet_aug_test.json", list)):
            try:
                place, text, seed = int(entry["class id"]), str(entry["text prompt"]), int(entry["random seed"])
                known = 0 <= place < len(self.names)
            except (KeyError, TypeError, ValueError):
                known = False
            if not known:
                raise TaskUnreadable(
                    f"imgnet_aug_test.json, entry {number}: expected a known class id, a text prompt and a random seed",
                    pointer=f"/{number}",
                )
            prompts.setdefault(place, []).append(Prompt(text, seed))
        return tuple(HeldOut(self.names[place], tuple(asked)) for place, asked in prompts.items())

    def _class(self, row: "_Row", place: int) -> str:
        if not 0 <= place < len(self.names):
            raise TaskUnreadable(f"{row.where}: class2id.json has no class {place}")
        return self.names[place]

    def _rows(self, name: str) -> list["_Row"]:
        with self._open(name) as file:
            reader = csv.DictReader(file)
            missing = [column for column in _COLUMNS if column not in (reader.fieldnames or ())]
            if missing:
                raise TaskUnreadable(f"{name}: no column {missing[0]!r}")
            return [_Row.of(fields, where=f"{name}, row {number}") for number, fields in enumerate(reader, start=1)]

    def _json(self, name: str, kind: type[Any]) -> Any:
        with self._open(name) as file:
            try:
                content = json.load(file)
            except ValueError as error:
                raise TaskUnreadable(f"{name} is no JSON: {error}") from error
        if not isinstance(content, kind):
            raise TaskUnreadable(f"{name}: expected a JSON {'object' if kind is dict else 'list'}")
        return content

    def _open(self, name: str) -> Any:
        try:
            return (self.folder / name).open(encoding="utf-8", newline="")
        except OSError as error:
            raise TaskUnreadable(f"{self.folder} has no readable {name}: ICEB's files are wanted there") from error


@dataclass(frozen=True)
class _Row:
    where: str
    source: str
    destination: str
    source_id: int
    destination_id: int
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    seed: int

    @classmethod
    def of(cls, fields: Mapping[str, Any], *, where: str) -> "_Row":
        """From the columns' text. Raises `TaskUnreadable` naming the row and the column."""
        source = _text(fields, "source", where=where)
        prompts = _listed(fields, "prompts", where=where)
        return cls(
            where=where,
            source=source,
            destination=_text(fields, "dest", where=where),
            source_id=_number(fields["source id"], "source id", where=where),
            destination_id=_number(fields["dest id"], "dest id", where=where),
            prompts=tuple(_opened(str(prompt), source, where=where) for prompt in prompts),
            seeds=tuple(_number(seed, "seeds", where=where) for seed in _listed(fields, "seeds", where=where)),
            seed=_number(fields.get("seed_train") or 0, "seed_train", where=where),
        )


def _text(fields: Mapping[str, Any], column: str, *, where: str) -> str:
    text = fields[column]
    if not isinstance(text, str) or not text.strip():
        raise TaskUnreadable(f"{where}: the column {column!r} is empty")
    return text


def _listed(fields: Mapping[str, Any], column: str, *, where: str) -> Sequence[Any]:
    try:
        listed = ast.literal_eval(fields[column] or "")
    except (ValueError, SyntaxError):
        listed = None
    if not isinstance(listed, list):
        raise TaskUnreadable(f"{where}: the column {column!r} holds no list")
    return listed


def _number(value: Any, column: str, *, where: str) -> int:
    try:
        return int(value)
    except (TypeError, ValueError):
        raise TaskUnreadable(f"{where}: the column {column!r} holds {value!r}, which is no whole number") from None


def _opened(prompt: str, source: str, *, where: str) -> str:
    """The prompt with one placeholder: its own, or one in place of the source's name."""
    if PLACEHOLDER not in prompt:
        prompt = re.sub(re.escape(source), PLACEHOLDER, prompt, count=1, flags=re.IGNORECASE)
    if prompt.count(PLACEHOLDER) != 1:
        raise TaskUnreadable(f"{where}: the prompt {prompt!r} has no single {{}}, nor the name {source!r} in its place")
    return prompt


def _paired(row: _Row, prompts: Sequence[str], seeds: Sequence[int]) -> tuple[Prompt, ...]:
    if len(prompts) != len(seeds):
        raise TaskUnreadable(f"{row.where}: {len(prompts)} prompts with {len(seeds)} seeds")
    return tuple(Prompt(text, seed) for text, seed in zip(prompts, seeds, strict=True))
