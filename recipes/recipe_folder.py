"""The output folder of a recipe: which stages are complete, with which settings, and what they recorded."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rebnn_hf.checkpoints import CHECKPOINTS, DRAFT

STAGES = ("teacher", "latent", "packed")  # of a run that distils once
Settings = dict[str, dict[str, Any]]


def write_json(path: Path, content: Any) -> None:
    """Writes `content` in one step: after a crash the file is the old one or the new one, never half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f"{path.name}.draft")
    with draft.open("w", encoding="utf-8") as file:
        json.dump(content, file, indent=2, ensure_ascii=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(draft, path)


def read_json(path: Path) -> Any | None:
    """The content of a JSON file; None without the file, or where a file is in the place of its folder."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None


def final_stage(record: Mapping[str, Any]) -> str:
    """The stage whose model a run ends with, and whose scores stand for it: the latent one where nothing is packed.

    Args:
        record: Of the stage `packed`, or the results of the run.
    """
    return "latent" if "not_packed" in record else "packed"


class RunFolder:
    """Folder with one sub-folder per stage (`teacher`, ..., `packed`, `adapter`), each holding the model of that name.

    `stages/<stage>.json` is written when everything of the stage is on disk and stands for its completion;
    `settings.json` holds the settings the folder was begun with; `results.json` exists when all is done.
    """

    def __init__(self, root: str | Path, stages: Sequence[str] = STAGES):
        self.root = Path(root)
        self.stages = tuple(stages)
        self.settings_file = self.root / "settings.json"
        self.results_file = self.root / "results.json"

    def folder(self, stage: str) -> Path:
        """Where the model of a stage lies."""
        return self.root / stage

    def record(self, stage: str) -> dict[str, Any] | None:
        """What a complete stage recorded; None while it is incomplete."""
        return read_json(self._record_file(stage))

    def records(self) -> dict[str, dict[str, Any]]:
        """What the complete stages recorded."""
        return {stage: record for stage in self.stages if (record := self.record(stage)) is not None}

    def complete(self, stage: str, record: dict[str, Any]) -> None:
        """Marks a stage as complete. Everything it leaves behind must be on disk by now."""
        write_json(self._record_file(stage), record)

    def results(self) -> dict[str, Any] | None:
        """The results of a finished run."""
        return read_json(self.results_file)

    def check(self, settings: Settings, overwrite: bool) -> None:
        """Refuses to continue a run that was begun with other settings, unless `overwrite` gives it up.

        Raises:
            SystemExit: With the settings that changed, their old and their new values.
        """
        changes = self._changes(settings)
        if changes and not overwrite and self._has_work_since(next(iter(changes))):
            lines = "\n".join(f"  {line}" for stage in changes for line in changes[stage])
            raise SystemExit(
                f"{self.root} holds a run with other settings:\n{lines}\n"
                "Choose another --output_dir, or pass --overwrite to redo the stages these settings touch."
            )

    def has_work_left(self, settings: Settings) -> bool:
        """Whether a run with these settings has a stage to do, or to do again."""
        complete = self.records()
        return bool(self._changes(settings)) or any(
            stage not in complete for stage, wanted in settings.items() if wanted
        )

    def begin(self, settings: Settings) -> None:
        """Starts a run in a new folder, or continues the one in it.

        The first stage whose settings changed and all after it are dropped; those before it are kept. Results of a
        run that is not complete any more are dropped too.
        """
        changes = self._changes(settings)
        if changes:
            self._drop_from(next(iter(changes)))
        if self.has_work_left(settings):
            self.results_file.unlink(missing_ok=True)
        write_json(self.settings_file, settings)

    def _changes(self, settings: Settings) -> dict[str, list[str]]:
        begun = read_json(self.settings_file)
        if begun is None:
            first = self.stages[0]
            return {first: [f"{self.settings_file.name} is missing"]} if self._has_work_since(first) else {}
        settings = json.loads(json.dumps(settings))  # in the form they are read back
        changes = {stage: _differences(begun.get(stage, {}), settings[stage]) for stage in self.stages}
        return {stage: lines for stage, lines in changes.items() if lines}

    def _has_work_since(self, first: str) -> bool:
        """Whether stage `first` or one after it left anything that could get lost."""
        stages = self.stages[self.stages.index(first) :]
        return any(self._record_file(stage).exists() or self.folder(stage).exists() for stage in stages)

    def _record_file(self, stage: str) -> Path:
        return self.root / "stages" / f"{stage}.json"

    def _drop_from(self, first: str) -> None:
        dropped = self.stages[self.stages.index(first) :]
        self.results_file.unlink(missing_ok=True)
        for stage in reversed(dropped):  # the record first: a folder without it counts as incomplete
            self._record_file(stage).unlink(missing_ok=True)
        for folder in map(self.folder, dropped):
            if folder.exists():
                shutil.rmtree(folder)


def remove_checkpoints(folder: Path, keep: Path | None = None) -> None:
    """Deletes the checkpoints below `folder` but `keep`: with the optimizer's state each takes three times a model."""
    for path in [*folder.rglob(CHECKPOINTS), *folder.rglob(DRAFT)]:
        if path != keep and path.exists():  # a checkpoint in a draft went with it
            shutil.rmtree(path)


def _differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    names = [*new, *(name for name in old if name not in new)]
    return [f"{name}: {old.get(name)} -> {new.get(name)}" for name in names if old.get(name) != new.get(name)]
