"""Queries, keys and values of a model: captured during a forward pass, and the losses between two models' ones."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from . import distillation

NAMES = (
    ("query", "key", "value"),
    ("q_lin", "k_lin", "v_lin"),
    ("q", "k", "v"),
    ("query_proj", "key_proj", "value_proj"),
    ("q_proj", "k_proj", "v_proj"),
)
"""What transformers' attention modules call their query, key and value projections."""


class Projections:
    """Outputs of the query, key and value projections of one forward pass.

    Attributes:
        attention: the attention modules in the order of the layers.
        outputs: for each of them what its query, key and value projection gave, [B, S, H * d].
        heads: H.
    """

    def __init__(self, model: nn.Module):
        self.heads: int = model.config.num_attention_heads
        self.attention: list[nn.Module] = []
        self.outputs: list[list[Tensor]] = []
        self._projections: list[list[nn.Module]] = []
        for module in model.modules():
            children = dict(module.named_children())
            for names in NAMES:
                if all(_is_linear(children.get(name)) for name in names):
                    self.attention.append(module)
                    self._projections.append([children[name] for name in names])
        if not self.attention:
            raise ValueError(
                "relation_weight and attention_weight need separate query, key and value projections, and "
                f"{type(model).__name__} has none (BERT, RoBERTa, DistilBERT, ELECTRA, MPNet, DeBERTa and ViT have); "
                "set both to 0."
            )

    def scores(self, layer: int) -> Tensor:
        """Attention scores before mask and softmax, [B, H, S, S]; of few-bit queries and keys where these are."""
        query, key, _ = (self._split(output) for output in self.outputs[layer])
        scaling = query.shape[-1] ** -0.5
        binary = getattr(self.attention[layer], "binary_attention", None)
        return query @ key.mT * scaling if binary is None else binary.scores(query, key, scaling)

    def _split(self, output: Tensor) -> Tensor:
        return output.unflatten(-1, (self.heads, -1)).transpose(1, 2)


@contextmanager
def captured_projections(model: nn.Module) -> Iterator[Projections]:
    """Capture the projections of the forward pass inside the `with` block.

    Raises:
        ValueError: the model has none that are separate.
    """
    captured = Projections(model)
    captured.outputs = [[None] * 3 for _ in captured.attention]
    handles = [
        module.register_forward_hook(_keep_in(captured.outputs[layer], which))
        for layer, modules in enumerate(captured._projections)
        for which, module in enumerate(modules)
    ]
    try:
        yield captured
    finally:
        for handle in handles:
            handle.remove()


def relations_loss(student: Projections, teacher: Projections, mask: Tensor | None) -> Tensor:
    """Direction-matching distances (BiBERT B4) summed over layers and over Q, K and V.

    Raises:
        ValueError: other numbers of heads, depths that do not fit, or outputs without gradient.
    """
    pairs = _matched(student, teacher)
    return sum(
        distillation.relation_loss(student.outputs[mine][which], teacher.outputs[theirs][which], student.heads, mask)
        for mine, theirs in pairs
        for which in range(3)
    )


def attention_loss(student: Projections, teacher: Projections, mask: Tensor | None) -> Tensor:
    """Mean squared distances of attention scores, `distillation.score_mse`, summed over layers.

    Raises:
        ValueError: as `relations_loss`.
    """
    pairs = _matched(student, teacher)
    return sum(distillation.score_mse(student.scores(mine), teacher.scores(theirs), mask) for mine, theirs in pairs)


def _matched(student: Projections, teacher: Projections) -> list[tuple[int, int]]:
    """Layers of the student with the teacher's they imitate."""
    if student.heads != teacher.heads:
        raise ValueError(
            f"relation_weight and attention_weight compare head by head: the student has {student.heads} heads, the "
            f"teacher {teacher.heads}; use a teacher with as many heads, or set both to 0."
        )
    if not all(output.requires_grad for layer in student.outputs for output in layer):
        raise ValueError(
            "relation_weight or attention_weight reached no gradient: reentrant gradient checkpointing hides the "
            "projections; set gradient_checkpointing_kwargs={'use_reentrant': False}, or both to 0."
        )
    layers = distillation.uniform_layer_map(len(student.outputs), len(teacher.outputs))[1:]
    return [(mine, theirs - 1) for mine, theirs in enumerate(layers)]


def _is_linear(module: nn.Module | None) -> bool:
    """Whether a module is a linear layer, by itself or inside the adapters of PEFT, whose output is then meant."""
    while hasattr(module, "base_layer"):
        module = module.base_layer
    return isinstance(module, nn.Linear)


def _keep_in(outputs: list[Tensor], which: int):
    def keep(_module, _inputs, output):
        outputs[which] = output

    return keep
