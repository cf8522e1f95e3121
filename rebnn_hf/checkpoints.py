"""Training checkpoints that are whole or not there: written aside, put in place in one step, checked before they are
read."""

from __future__ import annotations

import os
import shutil
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers import TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint, rotate_checkpoints
from transformers.utils import logging

logger = logging.get_logger(__name__)

STATE_FILE = "trainer_state.json"

DRAFT = "checkpoint.draft"
"""Where a checkpoint is until it is whole; no loader takes a folder of that name for one."""

SIGNS_FILE = "epoch_signs.safetensors"
"""The signs at the last epoch's end in a checkpoint of `ReBNNTrainer`, one bit each."""

CHECKPOINTS = f"{PREFIX_CHECKPOINT_DIR}-*"


class WholeCheckpoints:
    """Gives a `transformers.Trainer` checkpoints that are whole or not there, whenever the process is killed.

    A checkpoint is written into `checkpoint.draft`, by all processes; once all of it is on disk it gets its name, in
    one step, and only then older ones are deleted. Training is continued from whole checkpoints only. To be put before
    the Trainer: `class MyTrainer(WholeCheckpoints, Trainer)`.
    """

    _drafting = False

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs):
        """Train as transformers does; `resume_from_checkpoint=True` continues from the newest whole checkpoint.

        Raises:
            ValueError: the checkpoint named is damaged, or with True there is none that is whole.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = self._newest_whole_checkpoint()
        elif resume_from_checkpoint:
            require_whole(resume_from_checkpoint)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _newest_whole_checkpoint(self) -> str:
        newest, latest = newest_checkpoint(self.args.output_dir), get_last_checkpoint(self.args.output_dir)
        if newest is None:
            require_whole(latest or self.args.output_dir)
        if latest is not None and Path(latest) != newest:
            logger.warning(f"{latest} is passed over: {damage(latest)}. Training continues from {newest}.")
        return str(newest)

    def _save_checkpoint(self, model, trial) -> None:
        run, name = Path(self._get_output_dir(trial)), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        draft = run / DRAFT
        if self.args.should_save:
            shutil.rmtree(draft, ignore_errors=True)  # of a run that was killed
        self.accelerator.wait_for_everyone()
        with self._output_in(draft), _explained(f"{run / name} could not be written"):
            super()._save_checkpoint(model, trial)
        if self.args.should_save:
            self._name_best_checkpoint(run, draft / name)
        self.accelerator.wait_for_everyone()  # every process has written its part
        if self.is_world_process_zero():
            put_in_place(draft / name, run / name)
        self.accelerator.wait_for_everyone()
        if self.is_local_process_zero() and (draft / name).exists():  # another machine, with a disk of its own
            put_in_place(draft / name, run / name)
        if self.args.should_save:
            shutil.rmtree(draft, ignore_errors=True)
            rotate_checkpoints(
                output_dir=str(run),
                save_total_limit=self.args.save_total_limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=True,
            )
        if self.args.push_to_hub:
            super()._push_from_checkpoint(str(run / name))

    def _get_output_dir(self, trial) -> str:
        run = super()._get_output_dir(trial)
        return os.path.join(run, DRAFT) if self._drafting else run

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if not self._drafting:  # the upload runs beside the training, and needs a folder that stays
            super()._push_from_checkpoint(checkpoint_folder)

    @contextmanager
    def _output_in(self, draft: Path) -> Iterator[None]:
        self._drafting = True
        try:
            yield
        finally:
            self._drafting = False

    def _name_best_checkpoint(self, run: Path, draft: Path) -> None:
        """Where the best checkpoint so far is this one, the Trainer noted the draft."""
        best = self.state.best_model_checkpoint
        if best is not None and Path(best) == draft:
            self.state.best_model_checkpoint = str(run / draft.name)
            self.state.save_to_json(str(draft / STATE_FILE))


def put_in_place(draft: Path, target: Path) -> None:
    """Give a folder its name in one step, once all of it is on disk; one that has the name is replaced."""
    for path in draft.rglob("*"):
        _flush(path)
    _flush(draft)
    if target.exists():
        shutil.rmtree(target)
    os.replace(draft, target)
    _flush(target.parent)


@contextmanager
def written_aside(folder: str | Path) -> Iterator[Path]:
    """A folder to write into; its files move into `folder`, each in one step, when all are written and on disk.

    Without an exception, that is; else nothing moves. Other files in `folder` stay.

    Raises:
        OSError: a file could not be written (the disk is full, say).

    Example:
        >>> with written_aside("runs/mine/packed") as draft:
        ...     model.save_pretrained(draft)
    """
    folder = Path(folder)
    draft = folder / "files.draft"
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    try:
        with _explained(f"{folder} could not be written"):
            yield draft
        files = sorted(path for path in draft.rglob("*") if path.is_file())
        for path in files:
            _flush(path)
        for path in files:
            target = folder / path.relative_to(draft)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, target)
        _flush(folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def newest_checkpoint(folder: str | Path) -> Path | None:
    """The whole checkpoint of most steps in a folder, None without one; damaged ones are passed over."""
    whole = [path for path in Path(folder).glob(CHECKPOINTS) if damage(path) is None]
    return max(whole, key=lambda path: read_state(path).global_step, default=None)


def read_state(checkpoint: str | Path) -> TrainerState:
    """The Trainer's state in a checkpoint."""
    return TrainerState.load_from_json(str(Path(checkpoint) / STATE_FILE))


def require_whole(checkpoint: str | Path) -> None:
    """Refuse a damaged checkpoint.

    Raises:
        ValueError: with what is damaged.
    """
    reason = damage(checkpoint)
    if reason is not None:
        raise ValueError(
            f"training cannot continue from {checkpoint}: {reason}. Delete that folder and continue from another "
            "checkpoint, or train from the start."
        )


def damage(checkpoint: str | Path) -> str | None:
    """What is wrong with a checkpoint, None if it is whole.

    Its state has to be readable, and no file of tensors may be cut: both formats, safetensors and torch's zip, tell so
    without being read as a whole.
    """
    checkpoint = Path(checkpoint)
    if not (checkpoint / STATE_FILE).is_file():
        return f"it has no {STATE_FILE}, which is written last"
    try:
        read_state(checkpoint)
    except (OSError, ValueError, TypeError) as error:
        return f"its {STATE_FILE} cannot be read ({error})"
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file())
    if not any(path.suffix in (".safetensors", ".bin", ".distcp") and path.name != SIGNS_FILE for path in files):
        return "it has no weights"
    cut = [str(path.relative_to(checkpoint)) for path in files if _is_cut(path)]
    return f"{', '.join(cut)} is cut or damaged" if cut else None


def _is_cut(path: Path) -> bool:
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, "pt"):
                return False
        except (SafetensorError, OSError):
            return True
    return path.suffix in (".pt", ".pth", ".bin") and not zipfile.is_zipfile(path)


@contextmanager
def _explained(what: str) -> Iterator[None]:
    """One kind of exception for what safetensors, torch and Python say of a disk that takes no more.

    Raises:
        OSError: with what failed, and why.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise OSError(f"{what}: {error}") from error
    except RuntimeError as error:
        if "PytorchStreamWriter" not in str(error):
            raise
        raise OSError(f"{what}: {error}") from error


def _flush(path: Path) -> None:
    """Wait until a file or the entries of a folder are on disk, where the system can tell."""
    if path.is_dir() and os.name == "nt":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
