"""The command line of a recipe: its options, their defaults for each task, and which of them shape which stage."""

from __future__ import annotations

import sys
from argparse import HelpFormatter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from importlib.util import find_spec
from itertools import pairwise
from typing import Any, Literal

import torch
from recipe_checks import check_numbers, check_partners
from recipe_task import Task
from transformers import HfArgumentParser, TrainingArguments

from rebnn_hf import ReBNNConfig, ReBNNTrainingArguments, stage_conflict
from rebnn_hf.presets import CONFIGS, loss_fields

DEFAULT_MODEL = "google-bert/bert-base-uncased"


def option(help_text: str, default: Any = None, **metadata: Any) -> Any:
    """A field of a group of options; the help names its default."""
    if default not in (None, False):
        help_text += f"; default: {default}"
    return field(default=default, metadata={"help": help_text, **metadata})


@dataclass
class TeacherArguments:
    """The float model: where it comes from and how it is fine-tuned."""

    _argument_group_name = "teacher"

    model_name_or_path: str | None = option(f"the pretrained encoder; default: {DEFAULT_MODEL}")
    teacher: str | None = option("an already fine-tuned model (name or folder); without it one is fine-tuned first")
    teacher_learning_rate: float | None = option("default: the task's")
    teacher_epochs: float | None = option("default: the task's")
    teacher_runs: int | None = option(
        "average the weights of this many fine-tunings, which differ in data order and dropout; default: the task's"
    )

    @property
    def source(self) -> str | None:
        """Where model and tokenizer come from; None for the demo's, which are made from nothing."""
        return self.teacher or self.model_name_or_path


@dataclass
class EncoderStudentArguments:
    """How a 1-bit student is distilled; without a default here, that of task, preset or `ReBNNTrainingArguments`."""

    _argument_group_name = "student"

    student: str | None = option(
        "folder of a latent model (`latent` of an earlier run, also of another task or of embedder.py) whose encoder "
        "the first stage goes on from, under the head of the teacher; default: the teacher itself, binarized"
    )
    learning_rate: float | None = option("of everything that stays float; default: the task's")
    latent_learning_rate: float | None = option("of the latent weights; default: the learning rate")
    scale_learning_rate: float | None = option("of the scales; default: the learning rate")
    activation_learning_rate: float | None = option(
        "of scales and shifts of few-bit activations; default: ten times the learning rate"
    )
    epochs: float | None = option("of each stage; default: the task's")
    max_steps: int = option("this many steps instead of epochs; -1 counts epochs", default=-1)
    batch_size: int | None = option("examples per step, over all processes; default: the task's")
    dropout: float = option("of the student; it imitates a teacher without dropout", default=0.0)
    train_embeddings: bool = option("train the float embeddings too, not only what reads them", default=False)
    warm_up: float = option("share of the steps before the learning rate falls linearly to 0", default=0.06)
    latent_weight_decay: float | None = option("weight decay of the latent weights")
    hidden_loss: Literal["relative_mse", "mse", "direction"] | None = option("distance between hidden states")
    hidden_weight: float | None = option("weight of the hidden-state loss")
    relation_weight: float | None = option("weight of the query/key/value relation loss")
    attention_weight: float | None = option("weight of the attention-score loss")
    stage_teacher: Literal["float", "previous"] = option("teacher of the stages behind the first", default="float")
    stage_weight_scales: Literal["carry", "reset"] = option(
        "weight scales of a later stage: those of the one before, or new", default="carry"
    )
    stage_activation_scales: Literal["carry", "reset"] = option("the same of its activations", default="reset")


@dataclass
class StudentArguments(EncoderStudentArguments):
    """The same of a student that answers with logits, and may learn from labels too."""

    logits_loss: Literal["kl", "soft_cross_entropy", "mse"] | None = option("distance between logits")
    logits_weight: float | None = option("weight of the logits loss")
    logits_reduction: Literal["batch", "batch_class"] | None = option("mean of the soft cross-entropy")
    temperature: float | None = option("of the logits loss")
    label_weight: float | None = option("weight of the loss against the labels")


@dataclass
class AugmentationArguments:
    """New training sentences for the student by replacing words, as in TinyBERT."""

    _argument_group_name = "augmentation"

    augment: int = option(
        "N new sentences for each training example of the student, whose epochs become N + 1 times as long; default: 0",
        default=0,
    )
    augmentation_probability: float = option("probability of each word to be replaced", default=0.4)
    augmentation_candidates: int = option("words to choose from for each word that is replaced", default=15)
    augmentation_model: str | None = option(
        "masked language model that proposes the words; default: the pretrained encoder, whose embedding neighbours "
        "are taken where it has no such head"
    )

    def check(self) -> None:
        """Raises a ValueError where options are wrong or contradict each other."""
        if self.augment < 0:
            raise ValueError(f"--augment {self.augment} counts sentences: at least 0")
        if not 0 < self.augmentation_probability <= 1:
            raise ValueError(
                f"--augmentation_probability {self.augmentation_probability} must be greater than 0 and at most 1"
            )
        if self.augmentation_candidates < 1:
            raise ValueError(f"--augmentation_candidates {self.augmentation_candidates} must be at least 1")

    def settings(self) -> dict[str, Any]:
        """The options as settings of a stage; none where nothing is augmented."""
        return asdict(self) if self.augment else {}


@dataclass
class BalanceArguments:
    """The balance rule; without an option here, that of the method."""

    _argument_group_name = "balance"

    balance_rule: Literal["flip_maxgrad", "maxgrad", "const", "none"] | None = option("the rule for the balance")
    balance_form: Literal["gradient", "decoupled"] | None = option("where the pull of the balance is applied")
    balance_strength: float | None = option("strength of the decoupled form")
    balance_value: float | None = option("the balance itself, with --balance_rule const")
    balance_lower: float | None = option("lower bound of the balance")
    balance_upper: float | None = option("upper bound of the balance")

    def given(self) -> dict[str, Any]:
        """The fields of `ReBNNConfig` that are chosen."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    def check(self) -> None:
        """Raises a ValueError where options cannot be combined."""
        ReBNNConfig(**self.given())


def balance_partners(methods: Iterable[ReBNNConfig]) -> dict[str, tuple[bool, str]]:
    """What options of the balance need, for `check_partners`, and whether one of the methods has it."""
    methods = list(methods)
    return {
        "balance_value": (any(m.balance_rule == "const" for m in methods), "--balance_rule const"),
        "balance_strength": (any(m.balance_form == "decoupled" for m in methods), "--balance_form decoupled"),
    }


@dataclass
class BinaryArguments(BalanceArguments):
    """What becomes 1-bit and by which rule; without a default here, that of the preset or of `ReBNNConfig`."""

    _argument_group_name = "binarization"

    preset: str | None = option("a named method; the options below override its choices", choices=list(CONFIGS))
    stages: list[str] = field(
        default_factory=list,
        metadata={"help": "presets to train through before --preset, each from the one before", "nargs": "+"},
    )

    weight_scale: Literal["learned", "mean_abs"] | None = option("where the scales come from")
    scale_granularity: Literal["row", "tensor"] | None = option("one scale for each row or for each tensor")
    scale_gradient: Literal["none", "exact", "xnor"] | None = option("gradient through a closed-form scale")
    weight_center: Literal["none", "row", "tensor"] | None = option("mean taken off before the sign")
    center_gradient: bool | None = option("take that mean off the gradient too", nargs="?", const=True)
    weight_ste: Literal["clip", "identity"] | None = option("window of the straight-through gradient")
    ste_slope: Literal["scale", "unit"] | None = option("slope of the straight-through gradient")
    activation: Literal["none", "sign", "rsign", "elastic", "token"] | None = option("inputs of 1-bit layers")
    activation_bits: int | None = option("their bits")
    signed_init: float | None = option("first scale of signed elastic activations, in units of mean|x|")
    unsigned_init: float | None = option("the same of those that are not negative")
    attention: Literal["softmax", "bool", "elastic"] | None = option("attention with few bits")
    ffn_activation: Literal["model", "relu", "rprelu"] | None = option("function of the feed-forward block")
    ties: Literal["up", "released"] | None = option("values exactly on a threshold")
    word_embeddings: bool | None = option("make the word embeddings 1-bit too", nargs="?", const=True)
    pooler: bool | None = option("make the pooler 1-bit too", nargs="?", const=True)
    head: bool | None = option("make the linear layers of the head 1-bit too", nargs="?", const=True)
    modules_to_not_convert: list[str] | None = field(
        default=None, metadata={"help": "names of modules to leave float", "nargs": "+"}
    )

    def config(self, preset: str | None = None) -> ReBNNConfig:
        """The configuration these options describe, of an earlier stage with the preset of that stage.

        Raises:
            ValueError: If they cannot be combined.
        """
        preset = preset or self.preset
        options = {name: value for name, value in self.given().items() if name not in ("preset", "stages")}
        return ReBNNConfig.preset(preset, **options) if preset else ReBNNConfig(**options)

    def check(self) -> None:
        """Raises a ValueError where options cannot be combined."""
        self.config()


@dataclass
class AdapterArguments:
    """A LoRA adapter on the packed model, trained with the data, losses and teacher of the student."""

    _argument_group_name = "adapter"

    lora: int | None = option(
        "train a LoRA adapter of this rank on the packed model, 8 where no number follows; needs PEFT",
        nargs="?",
        const=8,
        metavar="RANK",
    )
    lora_learning_rate: float = option("of the adapter", default=5e-3)
    lora_epochs: float | None = option("of the adapter, where --max_steps does not count; default: the student's")

    def check(self) -> None:
        """Raises a ValueError where PEFT is missing."""
        if self.lora is not None and find_spec("peft") is None:
            raise ValueError("--lora needs PEFT: pip install 'rebnn_hf[peft]'")

    def settings(self) -> dict[str, Any]:
        """The options as settings of a stage; none where there is no adapter."""
        return {} if self.lora is None else asdict(self)


@dataclass
class RunArguments:
    """Where and how everything runs."""

    _argument_group_name = "run"

    output_dir: str | None = option("default: runs/<task>")
    overwrite: bool = option("redo the stages whose settings changed since the last run in this folder", default=False)
    seed: int = option("of the data order, the new head and the demo's model", default=42)
    bf16: bool = option("train in bfloat16 mixed precision", default=False)
    gradient_accumulation_steps: int = option(
        "compute the batch of a step in this many parts, one after the other (batch normalization sees one part)",
        default=1,
    )
    packed_dtype: Literal["float32", "float16", "bfloat16"] = option(
        "dtype of what stays float in the packed model", default="float32"
    )
    save_steps: int = option("steps between checkpoints", default=500)
    logging_steps: int = option("steps between log lines", default=50)
    report_to: str = option("`none`, `tensorboard`, `wandb`, ...", default="none")
    license: str | None = option("of the models, for their cards, as the Hub spells it, e.g. apache-2.0; default: none")

    def settings(self) -> dict[str, Any]:
        """The options that shape the models."""
        names = ("bf16", "gradient_accumulation_steps", "seed")
        return {name: getattr(self, name) for name in names}

    def training(self) -> dict[str, Any]:
        """The options that every training has, by the names of `TrainingArguments`."""
        names = ("bf16", "gradient_accumulation_steps", "save_steps", "logging_steps", "report_to")
        return {name: getattr(self, name) for name in names}


@dataclass
class EncoderRunArguments(RunArguments):
    """The same of models that can forget activations."""

    gradient_checkpointing: bool = option(
        "keep fewer activations and compute them again for the gradients: less memory, more time", default=False
    )

    def training(self) -> dict[str, Any]:
        """The options that every training has, by the names of `TrainingArguments`."""
        # Only where it is asked for: newer transformers have another name for it, and warn.
        return super().training() | ({"gradient_checkpointing": True} if self.gradient_checkpointing else {})


@dataclass(frozen=True)
class Distillation:
    """One stage of the distillation.

    Attributes:
        name: Of the stage and its folder.
        preset: Its method; None: that of the options alone.
        previous: The stage whose student it continues; None: it starts from the teacher.
    """

    name: str
    preset: str | None
    previous: str | None


@dataclass
class Arguments:
    """The whole command line: `argv` as it was typed, and what it says."""

    argv: list[str]
    data: Any  # each recipe has options of its own for what is learned
    teacher: TeacherArguments
    student: StudentArguments
    augmentation: AugmentationArguments
    binary: BinaryArguments
    adapter: AdapterArguments
    run: EncoderRunArguments

    def check(self) -> None:
        """Raises a ValueError where options are wrong or contradict each other."""
        check_numbers(self)
        self.data.check()
        for preset in self.binary.stages:
            if preset not in CONFIGS:
                raise ValueError(f"--stages: {preset!r} is no preset; expected some of {', '.join(CONFIGS)}")
        self._check_stages()
        self.augmentation.check()
        self.adapter.check()
        check_partners(self.argv, self.partners())

    def _check_stages(self) -> None:
        """What the later stages would refuse only after the earlier ones have been trained."""
        if self.binary.stages and self.binary.preset is None:
            raise ValueError("--stages names what comes before --preset: pass the preset of the last stage too")
        shared = [n for n in ("activation", "activation_bits", "attention") if getattr(self.binary, n) is not None]
        if self.binary.stages and shared:
            raise ValueError(f"--{shared[0]} would hold for every stage of --stages: choose presets that say it")
        methods = [self.binary.config(stage.preset) for stage in self.distillations()]
        for earlier, later in pairwise(methods):
            conflict = stage_conflict(earlier, later)
            if conflict:
                raise ValueError(f"--stages: {conflict}")

    def distillations(self) -> list[Distillation]:
        """The stages between teacher and packed model; the last is `latent`."""
        names = [f"stage-{number}" for number in range(1, len(self.binary.stages) + 1)] + ["latent"]
        presets = [*self.binary.stages, self.binary.preset]
        return [Distillation(*stage) for stage in zip(names, presets, [None, *names[:-1]], strict=True)]

    def partners(self) -> dict[str, tuple[bool, str]]:
        """What options need that do nothing alone, for `check_partners`, and whether it is there."""
        stages = self.distillations()
        methods = [self.binary.config(stage.preset) for stage in stages]
        losses = {self.student_settings(stage.name).get("logits_loss") for stage in stages}
        elastic = any("elastic" in (method.activation, method.attention) for method in methods)
        centered = any(method.weight_center != "none" for method in methods)
        needs = {
            ("stage_teacher", "stage_weight_scales", "stage_activation_scales"): (len(stages) > 1, "--stages"),
            ("logits_reduction",): ("soft_cross_entropy" in losses, "--logits_loss soft_cross_entropy"),
            ("temperature",): (losses != {"mse"}, "--logits_loss kl or soft_cross_entropy"),
            ("signed_init", "unsigned_init"): (elastic, "--activation elastic"),
            ("center_gradient",): (centered, "--weight_center row or tensor"),
            ("augmentation_probability", "augmentation_candidates", "augmentation_model"): (
                self.augmentation.augment > 0,
                "--augment N",
            ),
            ("lora_learning_rate", "lora_epochs"): (self.adapter.lora is not None, "--lora"),
            ("packed_dtype", "lora"): (self.packable(), "a packed model, and --ties released has none"),
        }
        return {name: need for names, need in needs.items() for name in names} | balance_partners(methods)

    def packable(self) -> bool:
        """Whether the student fits into bits: the signs of the released codes have three values."""
        return self.binary.config().ties == "up"

    def fill_in(self, task: Task) -> None:
        """Gives every option left out the default of `task`."""
        self.data.fill_in(task)
        student, teacher, run = self.student, self.teacher, self.run
        defaults = (
            (teacher, "teacher_learning_rate", task.teacher_learning_rate),
            (teacher, "teacher_epochs", task.teacher_epochs),
            (teacher, "teacher_runs", task.teacher_runs),
            (student, "learning_rate", task.student_learning_rate),
            (student, "epochs", task.student_epochs),
            (student, "batch_size", task.batch_size),
            (run, "output_dir", f"runs/{task.name}"),
        )
        for group, name, default in defaults:
            if getattr(group, name) is None:
                setattr(group, name, default)
        if self.adapter.lora_epochs is None:
            self.adapter.lora_epochs = student.epochs
        if student.activation_learning_rate is None:
            student.activation_learning_rate = 10 * student.learning_rate
        if task.name != "demo" and teacher.model_name_or_path is None:  # the demo's model is trained from scratch
            teacher.model_name_or_path = DEFAULT_MODEL

    def to_dict(self) -> dict[str, Any]:
        """All options with the values in use."""
        augmentation, adapter = asdict(self.augmentation), asdict(self.adapter)
        student = self.student_settings("latent")
        groups = (asdict(self.data), asdict(self.teacher), student, augmentation, adapter, asdict(self.run))
        return {name: value for group in groups for name, value in group.items()}

    def student_settings(self, stage: str) -> dict[str, Any]:
        """The options of distillation and binarization of a stage, those left out with the defaults of rebnn_hf."""
        preset = next(one.preset for one in self.distillations() if one.name == stage)
        given = {**(loss_fields(preset) if preset else {}), **self.losses()}
        distillation = {
            name: given.get(name, getattr(ReBNNTrainingArguments, name, None)) if value is None else value
            for name, value in asdict(self.student).items()
        }
        config = self.binary.config(preset)
        method = {o.name: getattr(config, o.name) for o in fields(self.binary) if o.name not in ("preset", "stages")}
        return {**distillation, "preset": preset, "stages": self.binary.stages, **method}

    def losses(self) -> dict[str, Any]:
        """The options given for distillation loss and learning rates, for `ReBNNTrainingArguments`."""
        own = {option.name for option in fields(ReBNNTrainingArguments)} - {o.name for o in fields(TrainingArguments)}
        return {name: value for name, value in asdict(self.student).items() if name in own and value is not None}

    def stage_settings(self, data_digest: str) -> dict[str, dict[str, Any]]:
        """For each stage the settings its result depends on, beside those of the stages before it.

        Where the data lie does not matter, only what they are (`data_digest`); how often to log or to save does not
        matter at all.
        """
        return {
            "teacher": {
                **self.data.settings(),
                "data": data_digest,
                **asdict(self.teacher),
                "batch_size": self.student.batch_size,
                "warm_up": self.student.warm_up,
                **self.run.settings(),
            },
            **{
                stage.name: self.student_settings(stage.name) | self.augmentation.settings()
                for stage in self.distillations()
            },
            "packed": {"packed_dtype": self.run.packed_dtype, **self.data.scoring()},
            "adapter": self.adapter.settings(),
        }

    def packed_dtype(self) -> torch.dtype:
        """The dtype of what stays float in the packed model."""
        return getattr(torch, self.run.packed_dtype)


def parse_arguments(argv: list[str] | None, data: type, kind: type[Arguments] = Arguments) -> Arguments:
    """The command line of a recipe that answers with logits of a text, with the options of its `data`.

    `Arguments.fill_in` completes it later.

    Raises:
        SystemExit: If the options are wrong or contradict each other.
    """
    groups = (
        data,
        TeacherArguments,
        StudentArguments,
        AugmentationArguments,
        BinaryArguments,
        AdapterArguments,
        EncoderRunArguments,
    )
    return parse_groups(kind, groups, argv)


def parse_groups(kind: type, groups: tuple[type, ...], argv: list[str] | None) -> Any:
    """The command line as a `kind` of arguments: `argv`, then the groups of its options.

    Raises:
        SystemExit: If `kind.check` refuses it.
    """
    parser = HfArgumentParser(
        groups,
        description="Fine-tune, binarize, distil, pack and evaluate.",
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    argv = sys.argv[1:] if argv is None else argv
    namespace = parser.parse_args(argv)
    arguments = kind(argv, *(group(**{f.name: getattr(namespace, f.name) for f in fields(group)}) for group in groups))
    try:
        arguments.check()
    except ValueError as error:
        parser.error(str(error))
    return arguments
