"""The arguments of `ReBNNTrainer`: weights of the losses and learning rates of what binarization adds."""

from __future__ import annotations

from dataclasses import dataclass, field

from transformers import TrainingArguments

from .presets import loss_fields
from .resilience import USE_INSTEAD

LOGITS_LOSSES = ("kl", "soft_cross_entropy", "mse")
HIDDEN_LOSSES = ("relative_mse", "mse", "direction")
WEIGHTS = ("label_weight", "logits_weight", "hidden_weight", "relation_weight", "attention_weight")

DEEPSPEED = f"DeepSpeed steps flat copies of the weights out of sight of the balance rule; {USE_INSTEAD}."

FSDP = f"FSDP through the Trainer has not been tested with the balance rule; {USE_INSTEAD}."


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
        metadata={
            "help": "Loss on the logits; a regression (one logit, or config.problem_type) always uses mse, and kl and "
            "soft_cross_entropy take each label of a multi-label classification by itself.",
            "choices": LOGITS_LOSSES,
        },
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
