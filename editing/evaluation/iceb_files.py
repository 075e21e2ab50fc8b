"""ICEB from its own files, as the published repository has them.

    arbitrary_{train,val}.csv      300 edits: their templates, and five free prompts each
    rectification_{train,val}.csv  the same for misunderstood aliases; some of them are in the second file only
    imgnet_aug_test.json           the held-out classes, with five prompts each
    imgnet_prompts_cls.json        how well the model draws each name of each class
    class2id.json                  the index of each class in the classifier

Seeds are numbers or text. In a free prompt that contains the source's name, `{}` replaces the name.
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
"""AL2D uses the aliases with which the model draws the class with at least this confidence."""

_COLUMNS = ("source", "dest", "prompts", "seeds", "source id", "dest id")


@dataclass(frozen=True)
class IcebFiles:
    """The tasks in a folder of ICEB's files, for a classifier of ImageNet's 1,000 classes.

    The task of seed 0 has the file's first edits with the seeds listed there. Another seed samples the edits from all
    rows and changes the seeds of stage I. A prompt is always drawn with its listed seed.
    """

    folder: Path
    settings: StageOneSettings = StageOneSettings()

    def count_edits(self, name: TaskName) -> int:
        """Return the largest number of edits of a task."""
        return len(self._cases(name))

    def build_task(self, name: TaskName, *, edits: int, seed: int) -> Task:
        cases = self._cases(name)
        if not 1 <= edits <= len(cases):
            raise TaskUnreadable(
                f"{self.folder.name}: edits must be from 1 to {len(cases)} in {name} editing, not {edits}"
            )
        chosen = cases[:edits]
        if seed:
            chosen = tuple(replace(case, seed=case.seed + seed) for case in random.Random(seed).sample(cases, edits))
        sources = {case.source_class for case in cases}
        held_out = tuple(concept for concept in self._concepts if concept.name not in sources)
        return Task(name, chosen, held_out, self.settings)

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The classes in the order of the classifier's logits. One that the file lacks is named by its index."""
        indices = self._read_json("class2id.json", dict)
        if not indices or not all(isinstance(index, int) and 0 <= index < 10_000 for index in indices.values()):
            raise TaskUnreadable("class2id.json: expected the index of each class by its name")
        names = [f"class {index}" for index in range(max(indices.values()) + 1)]
        for name, index in indices.items():
            names[index] = name
        return tuple(names)

    def _cases(self, name: TaskName) -> tuple[Case, ...]:
        return self._arbitrary if name == "arbitrary" else self._rectification

    @cached_property
    def _arbitrary(self) -> tuple[Case, ...]:
        return self._read_cases("arbitrary", aliases=True)

    @cached_property
    def _rectification(self) -> tuple[Case, ...]:
        return self._read_cases("rectification", aliases=False)

    def _read_cases(self, name: str, *, aliases: bool) -> tuple[Case, ...]:
        edits = {(row.source, row.source_id): row for row in self._read_rows(f"{name}_train.csv")}
        cases = []
        for row in self._read_rows(f"{name}_val.csv"):
            edit = edits.get((row.source, row.source_id))
            templates = edit.prompts if edit else DEFAULT_TEMPLATES
            seeds = edit.seeds if edit and edit.seeds else row.seeds[: len(templates)]
            free = _pair_seeds(row, row.prompts, row.seeds)
            cases.append(
                Case(
                    source=row.source,
                    destination=row.destination,
                    source_class=self._find_class(row, row.source_id),
                    destination_class=self._find_class(row, row.destination_id),
                    templates=_pair_seeds(edit or row, templates, seeds),
                    free=free,
                    aliases=self._find_aliases(row) if aliases else (),
                    alias_prompts=free if aliases else (),
                    seed=edit.seed if edit else row.seed,
                )
            )
        return tuple(cases)

    def _find_aliases(self, row: "_Row") -> tuple[str, ...]:
        scores = self._scores.get(str(row.source_id), {})
        try:
            understood = [name for name, score in scores.items() if score["mean"] >= UNDERSTOOD]
        except (AttributeError, KeyError, TypeError):
            raise TaskUnreadable(
                f"imgnet_prompts_cls.json, class {row.source_id}: expected the mean score of each name"
            ) from None
        return tuple(name for name in understood if name != row.source)

    @cached_property
    def _scores(self) -> Mapping[str, Any]:
        return self._read_json("imgnet_prompts_cls.json", dict)

    @cached_property
    def _concepts(self) -> tuple[HeldOut, ...]:
        prompts: dict[int, list[Prompt]] = {}
        for number, entry in enumerate(self._read_json("imgnet_aug_test.json", list)):
            try:
                index, text, seed = int(entry["class id"]), str(entry["text prompt"]), int(entry["random seed"])
                is_known = 0 <= index < len(self.names)
            except (KeyError, TypeError, ValueError):
                is_known = False
            if not is_known:
                raise TaskUnreadable(
                    f"imgnet_aug_test.json, entry {number}: expected a known class id, a text prompt and a random seed",
                    pointer=f"/{number}",
                )
            prompts.setdefault(index, []).append(Prompt(text, seed))
        return tuple(HeldOut(self.names[index], tuple(own)) for index, own in prompts.items())

    def _find_class(self, row: "_Row", index: int) -> str:
        if not 0 <= index < len(self.names):
            raise TaskUnreadable(f"{row.where}: class2id.json has no class {index}")
        return self.names[index]

    def _read_rows(self, name: str) -> list["_Row"]:
        with self._open(name) as file:
            reader = csv.DictReader(file)
            missing = [column for column in _COLUMNS if column not in (reader.fieldnames or ())]
            if missing:
                raise TaskUnreadable(f"{name}: there is no column {missing[0]!r}")
            return [_Row.parse(fields, where=f"{name}, row {number}") for number, fields in enumerate(reader, start=1)]

    def _read_json(self, name: str, kind: type[Any]) -> Any:
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
            raise TaskUnreadable(f"{self.folder} has no readable {name}: give the folder with ICEB's files") from error


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
    def parse(cls, fields: Mapping[str, Any], *, where: str) -> "_Row":
        """Parse the columns. Raises `TaskUnreadable` with the row and the column."""
        source = _parse_text(fields, "source", where=where)
        prompts = _parse_list(fields, "prompts", where=where)
        return cls(
            where=where,
            source=source,
            destination=_parse_text(fields, "dest", where=where),
            source_id=_parse_number(fields["source id"], "source id", where=where),
            destination_id=_parse_number(fields["dest id"], "dest id", where=where),
            prompts=tuple(_insert_placeholder(str(prompt), source, where=where) for prompt in prompts),
            seeds=tuple(
                _parse_number(seed, "seeds", where=where) for seed in _parse_list(fields, "seeds", where=where)
            ),
            seed=_parse_number(fields.get("seed_train") or 0, "seed_train", where=where),
        )


def _parse_text(fields: Mapping[str, Any], column: str, *, where: str) -> str:
    text = fields[column]
    if not isinstance(text, str) or not text.strip():
        raise TaskUnreadable(f"{where}: the column {column!r} is empty")
    return text


def _parse_list(fields: Mapping[str, Any], column: str, *, where: str) -> Sequence[Any]:
    try:
        items = ast.literal_eval(fields[column] or "")
    except (ValueError, SyntaxError):
        items = None
    if not isinstance(items, list):
        raise TaskUnreadable(f"{where}: the column {column!r} has no list")
    return items


def _parse_number(value: Any, column: str, *, where: str) -> int:
    try:
        return int(value)
    except (TypeError, ValueError):
        raise TaskUnreadable(f"{where}: the column {column!r} has {value!r}, which is no whole number") from None


def _insert_placeholder(prompt: str, source: str, *, where: str) -> str:
    """Return the prompt with one placeholder: its own, or one that replaces the source's name."""
    if PLACEHOLDER not in prompt:
        prompt = re.sub(re.escape(source), PLACEHOLDER, prompt, count=1, flags=re.IGNORECASE)
    if prompt.count(PLACEHOLDER) != 1:
        raise TaskUnreadable(f"{where}: the prompt {prompt!r} needs {{}} once, or the name {source!r} in its place")
    return prompt


def _pair_seeds(row: _Row, prompts: Sequence[str], seeds: Sequence[int]) -> tuple[Prompt, ...]:
    if len(prompts) != len(seeds):
        raise TaskUnreadable(f"{row.where}: {len(prompts)} prompts with {len(seeds)} seeds")
    return tuple(Prompt(text, seed) for text, seed in zip(prompts, seeds, strict=True))
