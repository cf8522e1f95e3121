"""ReBNNTrainer: the transformers Trainer with a float teacher and the balance rule in its optimizer steps."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from importlib.util import find_spec
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import has_length
from transformers.utils import logging

from . import distillation
from .binarizers import PARAMETRIC, Elastic, calibrate, set_batch_parts
from .card import complete_card
from .checkpoints import WholeCheckpoints
from .epochs import EpochFlips
from .layers import LATENT_TYPES, PACKED_TYPES
from .plotting import plot_oscillation
from .projections import attention_loss, captured_projections, relations_loss
from .resilience import USE_INSTEAD, Resilience, attach, overall
from .training_arguments import DEEPSPEED, FSDP, WEIGHTS, ReBNNTrainingArguments

logger = logging.get_logger(__name__)

PADDING = -1e4
"""Logit of a padding position: no probability, and finite at every temperature."""

CALIBRATION_EXAMPLES = 64
"""Training examples that the scales of elastic activations are found from."""


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
        epoch_flips: the signs at the last epoch's end, with it; each whole epoch logs its `epoch_flip_ratio`.

    Raises:
        ValueError: a model without 1-bit layers, a packed one without adapters, nothing to train on, a teacher that is
            the student, or a way of sharing the work that the balance rule does not support.

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
        if model is not None:
            _check_model(model)
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
        self.epoch_flips: EpochFlips | None = None
        self.add_callback(_EpochEnds(self))
        self.teacher = None if teacher is None else self._prepare_teacher(teacher)
        self._loss_sums: dict[str, Tensor] = {}
        self._loss_count = 0
        if self.teacher is not None and args.hidden_weight and not _gives_hidden_states(self.model):
            raise ValueError(
                f"hidden_weight={args.hidden_weight} needs hidden states, and {type(self.model).__name__}.forward() "
                "does not take output_hidden_states; use hidden_weight=0.0."
            )

    def call_model_init(self, trial=None) -> nn.Module:
        """The model of `model_init`, if it can be trained."""
        model = super().call_model_init(trial)
        _check_model(model)
        return model

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
            self.epoch_flips = EpochFlips(self.resilience.modules)
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

    def log_epoch(self) -> None:
        """Log the flip ratios of the epoch that ends here (see `epochs`)."""
        layers = {} if self.epoch_flips is None else self.epoch_flips.end_epoch()
        if layers:
            due = self.control.should_log  # by the step, of which transformers takes this log to be the one
            self.log(overall(layers) | self._by_layer(layers))
            self.control.should_log = due

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.epoch_flips is not None and self.args.should_save:
            self.epoch_flips.save(output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if self.epoch_flips is not None and checkpoint is not None:
            self.epoch_flips.load(checkpoint)

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
        parts = self.args.world_size * self.args.gradient_accumulation_steps
        waiting = any(isinstance(module, Elastic) and not module.calibrated for module in self.model.modules())
        if waiting and self.train_dataset is not None:
            collate = self._get_collator_with_removed_columns(self.data_collator, "calibration")
            calibrate(self.model, self._prepare_inputs(collate(self._calibration_examples())), parts)
        else:
            set_batch_parts(self.model, parts)

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
            problem = self._problem_type(outputs, inputs)
            parts["logits"] = sum(self._logits_loss(*pair, mask, span, problem) for pair in pairs)
        tokens = None if mask is None else mask.flatten(0, -2)  # each choice of multiple choice is a sequence inside
        if "hidden" in weights:
            states = _hidden_states(outputs), _hidden_states(target)
            parts["hidden"] = distillation.hidden_loss(self.args.hidden_loss, *states, tokens)
        if "relations" in weights:
            parts["relations"] = relations_loss(mine, theirs, tokens)
        if "attention" in weights:
            parts["attention"] = attention_loss(mine, theirs, tokens)
        return parts, outputs

    def _problem_type(self, outputs, inputs) -> str | None:
        """What the logits mean: `problem_type` of the teacher's config, or else of the student's.

        Of heads with `num_labels` logits per example only: transformers reads it for no others, whose configs may hold
        that of an earlier task.
        """
        configs = [getattr(model, "config", None) for model in (self.teacher, self.model)]
        shape = outputs["logits"].shape if "logits" in outputs else ()
        if len(shape) != 2 or shape[1] not in [getattr(config, "num_labels", None) for config in configs]:
            return None
        kinds = [kind for config in configs if (kind := getattr(config, "problem_type", None)) is not None]
        if not kinds:
            _refuse_unexplained_labels(inputs, self.label_names)
        return kinds[0] if kinds else None

    def _logits_loss(
        self, student: Tensor, teacher: Tensor, mask: Tensor | None, span: bool, problem: str | None
    ) -> Tensor:
        """Loss of one tensor of logits; those of a span [B, S] have its tokens for classes, padding among them."""
        binary = problem == "multi_label_classification"
        single = student.shape[-1] == 1 and not binary
        squares = self.args.logits_loss == "mse" or problem == "regression" or single
        per_token = student.ndim == 3 and mask is not None and student.shape[:2] == mask.shape
        if per_token or (span and squares and mask is not None):
            student, teacher = student[mask.bool()], teacher[mask.bool()]
        if squares:
            return distillation.logits_mse(student, teacher)
        temperature = self.args.temperature
        if self.args.logits_loss == "kl":
            divergence = distillation.binary_kl_divergence if binary else distillation.kl_divergence
            return divergence(student, teacher, temperature)
        reduction = "batch" if span else self.args.logits_reduction
        cross_entropy = distillation.binary_soft_cross_entropy if binary else distillation.soft_cross_entropy
        return cross_entropy(student, teacher, temperature, reduction)

    def _prepare_teacher(self, teacher: PreTrainedModel | str | Path) -> nn.Module:
        student = getattr(self.model, "get_base_model", lambda: self.model)()  # PEFT's wrapper loads adapters
        if isinstance(teacher, str | Path):
            if not hasattr(type(student), "from_pretrained"):
                raise ValueError(
                    f"teacher={str(teacher)!r} is a name, which only transformers models are loaded by; pass the model."
                )
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
        return logs | self._by_layer(layers)

    def _by_layer(self, layers: dict[str, dict[str, float]]) -> dict[str, float]:
        """Statistics of each layer under names of their own, where they are asked for."""
        if self.args.log_oscillation == "total":
            return {}
        return {
            f"{what}/{name}": value
            for name, statistics in layers.items()
            for what, value in statistics.items()
            if what != "weights"
        }


class _EpochEnds(TrainerCallback):
    """Tells a trainer of the last step of each epoch, before the step's checkpoint is written."""

    def __init__(self, trainer: ReBNNTrainer):
        self.trainer = trainer

    def on_step_end(self, args, state, control, **kwargs):
        if state.epoch == int(state.epoch):
            self.trainer.log_epoch()


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


def _gives_hidden_states(model: nn.Module) -> bool:
    parameters = inspect.signature(model.forward).parameters.values()
    return any(p.name == "output_hidden_states" or p.kind is p.VAR_KEYWORD for p in parameters)


def _check_model(model: nn.Module) -> None:
    if isinstance(model, nn.DataParallel):
        raise ValueError(f"nn.DataParallel trains copies that are thrown away; {USE_INSTEAD}.")
    if not any(isinstance(module, LATENT_TYPES + PACKED_TYPES) for module in model.modules()):
        raise ValueError("the model has no 1-bit layer; call rebnn_hf.binarize(model) before building the trainer.")
    adapted = getattr(model, "peft_config", None)  # of PEFT's models, and of models with adapters of transformers
    if not adapted and not any(isinstance(module, LATENT_TYPES) for module in model.modules()):
        raise ValueError(
            "the model is packed: its bits cannot be trained, only what is float beside them would change. Train the "
            "latent model (the checkpoint saved before pack()), or put adapters on this one (peft.get_peft_model)."
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


def _refuse_unexplained_labels(inputs, names: list[str]) -> None:
    for labels in (inputs[name] for name in names if name in inputs):
        if labels.is_floating_point() and labels.shape[1:].numel() > 1:
            raise ValueError(
                f"the labels are floats {list(labels.shape)}, and no config says what they mean; set problem_type in "
                "the configs of teacher and student to 'multi_label_classification', to 'regression', or, where they "
                "are shares of classes that exclude each other, to 'single_label_classification'."
            )


def _hidden_states(outputs) -> Sequence[Tensor]:
    if outputs.get("hidden_states") is None:
        raise ValueError(f"hidden_weight > 0, but the model returns only {', '.join(outputs)}; set hidden_weight=0.")
    return outputs["hidden_states"]


def _latent_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    for module in model.modules():
        if isinstance(module, LATENT_TYPES) and module.weight.requires_grad:
            yield module.weight
