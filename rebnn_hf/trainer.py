"""ReBNNTrainer: the transformers Trainer with a float teacher and the balance rule in its optimizer steps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from importlib.util import find_spec
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer, TrainingArguments
from transformers.trainer_utils import has_length
from transformers.utils import logging

from . import distillation
from .binarizers import PARAMETRIC, Elastic, calibrate
from .card import complete_card
from .checkpoints import WholeCheckpoints
from .layers import LATENT_TYPES, PACKED_TYPES
from .plotting import plot_oscillation
from .presets import loss_fields
from .projections import attention_loss, captured_projections, relations_loss
from .resilience import USE_INSTEAD, Resilience, attach, overall

logger = logging.get_logger(__name__)

LOGITS_LOSSES = ("kl", "soft_cross_entropy", "mse")
HIDDEN_LOSSES = ("relative_mse", "mse", "direction")
WEIGHTS = ("label_weight", "logits_weight", "hidden_weight", "relation_weight", "attention_weight")

DEEPSPEED = f"DeepSpeed steps flat copies of the weights out of sight of the balance rule; {USE_INSTEAD}."

FSDP = f"FSDP through the Trainer has not been tested with the balance rule; {USE_INSTEAD}."

PADDING = -1e4
"""Logit of a padding position: no probability, and finite at every temperature."""

CALIBRATION_EXAMPLES = 64
"""Training examples that the scales of elastic activations are found from."""


@dataclass
class ReBNNTrainingArguments(TrainingArguments):
    """Arguments of `ReBNNTrainer`: those of transformers, and the loss weights and learning rates of binarization.

    Total loss: `label_weight * L_labels + logits_weight * L_logits + hidden_weight * L_hidden + relation_weight *
    L_relations + attention_weight * L_attention`; the parts with a teacher need one. The reconstruction loss is not a
    part: the balance rule adds its gradient once per optimizer step.
    """

    label_weight: float | None = field(
        default=None, metadata={"help": "Weight of the task's own loss; default 0 with a teacher and 1 without."}
    )
    logits_weight: float = field(default=1.0, metadata={"help": "Weight of the loss on the teacher's logits."})
    logits_loss: str = field(
        default="kl",
        metadata={"help": "Loss on the logits; a regression (one logit) always uses mse.", "choices": LOGITS_LOSSES},
    )
    logits_reduction: str = field(
        default="batch",
        metadata={
            "help": "Mean of soft_cross_entropy over the batch, or over batch and classes (BiBERT, BiT); in question "
            "answering, where the classes are tokens, always over the batch.",
            "choices": ("batch", "batch_class"),
        },
    )
    temperature: float = field(default=1.0, metadata={"help": "Temperature of kl and soft_cross_entropy."})
    hidden_weight: float = field(
        default=1.0,
        metadata={
            "help": "Weight of the loss on the hidden states; of image models these are feature maps, whose shapes in "
            "student and teacher must be equal."
        },
    )
    hidden_loss: str = field(
        default="relative_mse", metadata={"help": "Loss on the hidden states of each layer.", "choices": HIDDEN_LOSSES}
    )
    relation_weight: float = field(
        default=0.0, metadata={"help": "Weight of the direction-matching loss on query, key and value relations."}
    )
    attention_weight: float = field(
        default=0.0, metadata={"help": "Weight of the mean squared distance of attention scores."}
    )
    latent_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of latent weights; default learning_rate."}
    )
    scale_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of learned scales; default learning_rate."}
    )
    activation_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of scales and shifts of activations; default learning_rate."}
    )
    latent_weight_decay: float = field(
        default=0.0, metadata={"help": "Weight decay of latent weights: it pulls toward the flipping point."}
    )
    log_oscillation: str = field(
        default="total",
        metadata={
            "help": "Log oscillation statistics over all layers, or of each layer.",
            "choices": ("total", "layer"),
        },
    )

    plot_oscillation: bool = field(
        default=True, metadata={"help": "Draw the oscillation statistics to output_dir/oscillation.png after training."}
    )

    def __post_init__(self):
        if self.deepspeed:
            raise ValueError(DEEPSPEED)
        if self.fsdp:
            raise ValueError(FSDP)
        super().__post_init__()
        for name, choices in (
            ("logits_loss", LOGITS_LOSSES),
            ("logits_reduction", ("batch", "batch_class")),
            ("hidden_loss", HIDDEN_LOSSES),
            ("log_oscillation", ("total", "layer")),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown; expected one of {', '.join(choices)}.")
        for name in WEIGHTS:
            if (getattr(self, name) or 0) < 0:
                raise ValueError(f"{name}={getattr(self, name)} is negative; loss weights are >= 0.")
        if self.temperature <= 0:
            raise ValueError(f"temperature={self.temperature} must be > 0.")
        if self.fp16 and "fused" in str(self.optim):
            raise ValueError(
                "fp16 with a fused optimizer hides gradients from the balance rule; set optim='adamw_torch'."
            )

    @classmethod
    def preset(cls, name: str, **arguments) -> ReBNNTrainingArguments:
        """Arguments with the losses that belong to `ReBNNConfig.preset(name)`, see `presets.LOSSES`.

        Args:
            name: of the preset.
            **arguments: all others, and losses to set otherwise.

        Raises:
            ValueError: no preset of that name.
        """
        return cls(**{**loss_fields(name), **arguments})


class ReBNNTrainer(WholeCheckpoints, Trainer):
    """Trainer for models made by `rebnn_hf.binarize`.

    Args:
        model: latent; or a PEFT model on a latent or packed base, whose adapters then train. Frozen latent weights
            stay what they are: the balance rule holds only those that train.
        args: default `ReBNNTrainingArguments()`.
        teacher: a float model, or the path or Hub name of one of the student's class; it is put into eval mode, frozen,
            placed like the student, and never saved. Without one, only the task's labels train.
        **kwargs: as for `transformers.Trainer`.

    Attributes:
        resilience: handle of the balance rule, once the optimizer exists (None before).

    Raises:
        ValueError: a model without 1-bit layers, nothing to train on, a teacher that is the student, or a way of
            sharing the work that the balance rule does not support.

    Example:
        >>> trainer = ReBNNTrainer(model=rebnn_hf.binarize(model), teacher=teacher, args=args, train_dataset=data)
        >>> trainer.train()
    """

    args: ReBNNTrainingArguments

    def __init__(
        self,
        model: PreTrainedModel | None = None,
        args: ReBNNTrainingArguments | None = None,
        teacher: PreTrainedModel | str | Path | None = None,
        **kwargs,
    ):
        args = args or ReBNNTrainingArguments()
        _check_arguments(args, teacher)
        if isinstance(model, nn.DataParallel):
            raise ValueError(f"nn.DataParallel trains copies that are thrown away; {USE_INSTEAD}.")
        super().__init__(model=model, args=args, **kwargs)
        self._check_distribution()
        if self.compute_loss_func is not None and teacher is not None and args.gradient_accumulation_steps > 1:
            raise ValueError(
                "compute_loss_func is expected to divide by the items of the whole accumulated batch, which the "
                "losses on the teacher do not; use gradient_accumulation_steps=1 or no compute_loss_func."
            )
        # transformers takes BERT's **kwargs for a loss normalised over the global batch, which it is not: loss and
        # gradients would grow with accumulation steps and processes (transformers issue 47688).
        self.model_accepts_loss_kwargs = False
        self.resilience: Resilience | None = None
        self.teacher = None if teacher is None else self._prepare_teacher(teacher)
        self._loss_sums: dict[str, Tensor] = {}
        self._loss_count = 0
        if not any(isinstance(m, LATENT_TYPES + PACKED_TYPES) for m in self.model.modules()):
            raise ValueError("the model has no 1-bit layer; call rebnn_hf.binarize(model) before building the trainer.")

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        """Optimizer with parameter groups for latent weights, scales and the rest, under the balance rule."""
        given = self.optimizer is not None
        optimizer = super().create_optimizer(model)
        if given and self.resilience is not None:
            return optimizer
        self._calibrate()  # here the model is final: made by model_init, loaded from a checkpoint, not yet wrapped
        if list(_latent_parameters(self.model)):
            if not given:
                self._regroup(optimizer)
            self.resilience = attach(optimizer, self.model)
        return optimizer

    def train(self, *args, **kwargs):
        """Train as transformers does, then draw the oscillation statistics to `output_dir/oscillation.png`."""
        result = super().train(*args, **kwargs)
        if self.args.plot_oscillation and self.resilience is not None and self.is_world_process_zero():
            self._plot()
        return result

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Distillation loss in training; in evaluation the task's own loss."""
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        parts, outputs = self._loss_parts(model, inputs, num_items_in_batch)
        for name, loss in parts.items():
            self._loss_sums[name] = self._loss_sums.get(name, 0) + loss.detach()
        self._loss_count += 1
        loss = sum(weight * parts[name] for name, weight in self._weights().items())
        return (loss, outputs) if return_outputs else loss

    def create_model_card(self, *args, **kwargs) -> None:
        """The card of transformers, which describes the training, and after it what is 1-bit and how to load it."""
        super().create_model_card(*args, **kwargs)
        if self.is_world_process_zero() and isinstance(self.model, PreTrainedModel):
            folder = Path(self.args.output_dir)
            complete_card(folder / "README.md", self.model, self.hub_model_id or folder.name)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add to each training log the parts of the loss, the reconstruction loss and the oscillation statistics."""
        if "loss" in logs:
            logs = {**logs, **self._mean_losses(), **self._oscillation()}
        super().log(logs, start_time)

    def _check_distribution(self) -> None:
        if self.args.n_gpu > 1:
            raise ValueError(
                f"one process sees {self.args.n_gpu} GPUs, for which transformers would take nn.DataParallel, and that "
                f"trains copies that are thrown away; {USE_INSTEAD}, or CUDA_VISIBLE_DEVICES=0 for one GPU."
            )
        if self.is_deepspeed_enabled:
            raise ValueError(DEEPSPEED)
        if self.is_fsdp_enabled:  # by the environment of accelerate launch
            raise ValueError(FSDP)

    def _calibrate(self) -> None:
        """Give elastic activations without one a scale, from the same examples on every process, and tell all of them
        the parts of a step's batch."""
        elastic = [module for module in self.model.modules() if isinstance(module, Elastic)]
        for module in elastic:
            module.batch_parts = self.args.world_size * self.args.gradient_accumulation_steps
        waiting = any(not module.calibrated for module in elastic)
        if waiting and self.train_dataset is not None:
            collate = self._get_collator_with_removed_columns(self.data_collator, "calibration")
            calibrate(self.model, self._prepare_inputs(collate(self._calibration_examples())))

    def _calibration_examples(self) -> list:
        """Examples drawn by the seed; of a stream, which cannot be drawn from, the first."""
        if not has_length(self.train_dataset):
            return list(islice(self.train_dataset, CALIBRATION_EXAMPLES))
        generator = torch.Generator().manual_seed(self.args.seed)
        indices = torch.randperm(len(self.train_dataset), generator=generator)[:CALIBRATION_EXAMPLES].tolist()
        return [self.train_dataset[index] for index in indices]

    def _plot(self) -> None:
        if find_spec("matplotlib") is None:
            logger.warning(
                "oscillation.png was not drawn: pip install 'rebnn_hf[plot]', or set plot_oscillation=False."
            )
        elif any("flip_ratio" in log for log in self.state.log_history):
            plot_oscillation(self.state.log_history, Path(self.args.output_dir) / "oscillation.png")

    def _weights(self) -> dict[str, float]:
        """Weights of the losses in use."""
        args = self.args
        label_weight = args.label_weight
        if label_weight is None:
            label_weight = 1.0 if self.teacher is None else 0.0
        weights = {"labels": label_weight}
        if self.teacher is not None:
            weights |= {
                "logits": args.logits_weight,
                "hidden": args.hidden_weight,
                "relations": args.relation_weight,
                "attention": args.attention_weight,
            }
        return {name: weight for name, weight in weights.items() if weight > 0}

    def _loss_parts(self, model, inputs, num_items_in_batch) -> tuple[dict[str, Tensor], object]:
        weights = self._weights()
        projections = weights.keys() & {"relations", "attention"}
        if "hidden" in weights:
            inputs = {**inputs, "output_hidden_states": True}
        unlabelled = {name: value for name, value in inputs.items() if name not in self.label_names}
        parts = {}
        with ExitStack() as stack:
            mine = stack.enter_context(captured_projections(self.model)) if projections else None
            if "labels" in weights:
                parts["labels"], outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
            else:
                outputs = model(**unlabelled)
        if weights.keys() <= {"labels"}:
            return parts, outputs
        with torch.no_grad(), ExitStack() as stack:
            theirs = stack.enter_context(captured_projections(self.teacher)) if projections else None
            target = self.teacher(**unlabelled)
        mask = inputs.get("attention_mask")
        if "logits" in weights:
            pairs = zip(_logits(outputs, mask), _logits(target, mask), strict=True)
            span = "start_logits" in outputs
            parts["logits"] = sum(self._logits_loss(student, teacher, mask, span) for student, teacher in pairs)
        tokens = None if mask is None else mask.flatten(0, -2)  # each choice of multiple choice is a sequence inside
        if "hidden" in weights:
            states = _hidden_states(outputs), _hidden_states(target)
            parts["hidden"] = distillation.hidden_loss(self.args.hidden_loss, *states, tokens)
        if "relations" in weights:
            parts["relations"] = relations_loss(mine, theirs, tokens)
        if "attention" in weights:
            parts["attention"] = attention_loss(mine, theirs, tokens)
        return parts, outputs

    def _logits_loss(self, student: Tensor, teacher: Tensor, mask: Tensor | None, span: bool) -> Tensor:
        """Loss of one tensor of logits; those of a span [B, S] have its tokens for classes, padding among them."""
        squares = self.args.logits_loss == "mse" or student.shape[-1] == 1
        per_token = student.ndim == 3 and mask is not None and student.shape[:2] == mask.shape
        if per_token or (span and squares and mask is not None):
            student, teacher = student[mask.bool()], teacher[mask.bool()]
        if squares:
            return distillation.logits_mse(student, teacher)
        if self.args.logits_loss == "kl":
            return distillation.kl_divergence(student, teacher, self.args.temperature)
        reduction = "batch" if span else self.args.logits_reduction
        return distillation.soft_cross_entropy(student, teacher, self.args.temperature, reduction)

    def _prepare_teacher(self, teacher: PreTrainedModel | str | Path) -> nn.Module:
        student = getattr(self.model, "get_base_model", lambda: self.model)()  # PEFT's wrapper loads adapters
        if isinstance(teacher, str | Path):
            teacher = type(student).from_pretrained(teacher)
        if teacher in (self.model, student):
            raise ValueError("the teacher is the student itself; pass a float copy made before binarize().")
        teacher = teacher.requires_grad_(False).eval()
        return self.accelerator.prepare_model(teacher.to(self.args.device), evaluation_mode=True)

    def _regroup(self, optimizer: torch.optim.Optimizer) -> None:
        """Move what has its own learning rate out of the groups that transformers made, into groups of its own."""
        args = self.args
        latent = list(_latent_parameters(self.model))
        scales = [
            m.weight_scale
            for m in self.model.modules()
            if isinstance(m, LATENT_TYPES) and m.weight_scale is not None and m.weight_scale.requires_grad
        ]
        activations = [
            p
            for m in self.model.modules()
            if isinstance(m, PARAMETRIC)
            for p in m.parameters(recurse=False)
            if p.requires_grad
        ]
        special = {id(p) for p in latent + scales + activations}
        for group in optimizer.param_groups:
            group["params"] = [p for p in group["params"] if id(p) not in special]
        optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
        for params, rate, decay in (
            (latent, args.latent_learning_rate, args.latent_weight_decay),
            (scales, args.scale_learning_rate, 0.0),
            (activations, args.activation_learning_rate, 0.0),
        ):
            if params:
                rate = args.learning_rate if rate is None else rate
                optimizer.add_param_group({"params": params, "lr": rate, "weight_decay": decay})

    def _mean_losses(self) -> dict[str, float]:
        """Mean of each part since the last log, over all processes."""
        means = {
            f"loss_{name}": self.accelerator.reduce(total / self._loss_count, "mean").item()
            for name, total in self._loss_sums.items()
        }
        self._loss_sums, self._loss_count = {}, 0
        return means

    def _oscillation(self) -> dict[str, float]:
        if self.resilience is None:
            return {}
        layers = self.resilience.statistics()
        logs = overall(layers)
        if self.resilience.rule.form == "gradient":  # the decoupled form minimises no loss
            logs["loss_reconstruction"] = self.resilience.reconstruction_loss()
        if self.args.log_oscillation == "layer":
            for name, statistics in layers.items():
                logs |= {f"{what}/{name}": value for what, value in statistics.items() if what != "weights"}
        return logs


def _check_arguments(args: TrainingArguments, teacher) -> None:
    if not isinstance(args, ReBNNTrainingArguments):
        raise TypeError(f"args must be ReBNNTrainingArguments, got {type(args).__name__}.")
    if teacher is None and args.label_weight == 0:
        raise ValueError("nothing to train on: label_weight=0 and no teacher; pass a teacher or a label_weight.")
    if teacher is not None and not any(getattr(args, name) for name in WEIGHTS):
        raise ValueError("nothing to train on: every loss weight is 0.")
    if (args.relation_weight or args.attention_weight) and args.torch_compile:
        raise ValueError(
            "relation_weight and attention_weight watch modules inside the model, which torch_compile hides; set both "
            "to 0, or torch_compile=False."
        )


def _logits(outputs, mask: Tensor | None) -> list[Tensor]:
    """The answers of a model: one tensor, or start and end of the span in question answering, without padding."""
    if "logits" in outputs:
        return [outputs["logits"]]
    if "start_logits" not in outputs:
        raise ValueError(f"logits_weight > 0, but the model returns only {', '.join(outputs)}; set logits_weight=0.")
    spans = [outputs["start_logits"], outputs["end_logits"]]
    if mask is None:
        return spans
    return [logits.float().masked_fill(mask == 0, PADDING) for logits in spans]


def _hidden_states(outputs) -> Sequence[Tensor]:
    if outputs.get("hidden_states") is None:
        raise ValueError(f"hidden_weight > 0, but the model returns only {', '.join(outputs)}; set hidden_weight=0.")
    return outputs["hidden_states"]


def _latent_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    for module in model.modules():
        if isinstance(module, LATENT_TYPES) and module.weight.requires_grad:
            yield module.weight
