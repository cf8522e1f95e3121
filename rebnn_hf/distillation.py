"""Distillation losses between a 1-bit student and its full-precision teacher, as functions of tensors.

Logits: `soft_cross_entropy`, `kl_divergence`, of labels that do not exclude each other `binary_soft_cross_entropy`,
`binary_kl_divergence`; of regressions `logits_mse`. Hidden states of one layer: `hidden_mse`,
`hidden_relative_mse`, `direction_loss`; of all layers: `hidden_loss`. Queries, keys or values of one layer:
`relation_loss`.

Every loss treats the teacher as a constant, computes in float32 when the inputs are float16 or bfloat16
(float64 stays float64) and leaves padding out where it takes a mask. To the losses on hidden states, a feature map
[B, D, H, W] of an image model is [B, HW, D]: its positions are the tokens.

Papers: BiBERT (Qin et al., 2022, arXiv:2203.06390) for direction matching, BiT (Liu et al., 2022,
arXiv:2205.13016) for hidden-state MSE, ReActNet (Liu et al., 2020, arXiv:2003.03488) for the distributional
loss, Hinton et al. (2015, arXiv:1503.02531) for the temperature.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = [
    "binary_kl_divergence",
    "binary_soft_cross_entropy",
    "direction_loss",
    "hidden_loss",
    "hidden_mse",
    "hidden_relative_mse",
    "kl_divergence",
    "logits_mse",
    "relation_loss",
    "score_mse",
    "soft_cross_entropy",
    "uniform_layer_map",
]

# A norm or a mean square at or below this counts as zero.
_EPS = 1e-12


def soft_cross_entropy(
    student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0, reduction: str = "batch"
) -> Tensor:
    """Cross-entropy of the student's class probabilities under the teacher's.

    L = −T²/N · Σ_n Σ_c softmax(t_n/T)_c · log softmax(s_n/T)_c        (reduction="batch")

    At T = 1 this is the distributional loss of ReActNet, up to the teacher's entropy, a constant;
    reduction="batch_class" divides by the number of classes C as well and is the logit loss of the published
    BiBERT and BiT training code. With reduction="batch" the gradient is that of `kl_divergence` at every T.

    Args:
        student_logits: [..., C], C ≥ 2. Each leading index is one sample; select the tokens that count before
            the call (`logits[mask]`) when there is one row per token.
        teacher_logits: [..., C], the same shape.
        temperature: T > 0.
        reduction: "batch" (mean over samples, sum over classes) or "batch_class" (mean over both).

    Returns:
        Scalar.

    Raises:
        ValueError: shapes differ, there is a single logit, or temperature or reduction is not valid.
    """
    _check_reduction(reduction)
    student, teacher = _log_probabilities(student_logits, teacher_logits, temperature)
    loss = -(teacher.exp() * student).sum(-1).mean() * temperature**2
    return loss / student.shape[-1] if reduction == "batch_class" else loss


def kl_divergence(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Kullback-Leibler divergence from the teacher's class probabilities to the student's.

    L = T²/N · Σ_n Σ_c p_nc · (log p_nc − log q_nc),   p = softmax(t/T), q = softmax(s/T)

    T² keeps the size of the gradient as T grows (Hinton et al., section 2.1).

    Args:
        student_logits: [..., C], C ≥ 2; each leading index is one sample, as in `soft_cross_entropy`.
        teacher_logits: [..., C], the same shape.
        temperature: T > 0.

    Returns:
        Scalar ≥ 0 up to rounding; exactly 0 for equal logits.

    Raises:
        ValueError: shapes differ, there is a single logit, or temperature is not positive.
    """
    student, teacher = _log_probabilities(student_logits, teacher_logits, temperature)
    return (teacher.exp() * (teacher - student)).sum(-1).mean() * temperature**2


def binary_soft_cross_entropy(
    student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0, reduction: str = "batch"
) -> Tensor:
    """Cross-entropy of the student's labels under the teacher's, where each label is true or false by itself.

    L = −T²/N · Σ_n Σ_c [p_nc log q_nc + (1 − p_nc) log(1 − q_nc)],   p = σ(t/T), q = σ(s/T)

    It is `soft_cross_entropy` of the two classes of each label, since softmax(x, 0) = (σ(x), 1 − σ(x)), summed over
    the labels; its gradient is T (q − p)/N. reduction="batch_class" divides by the number of labels C as well.

    Args:
        student_logits: [..., C], C ≥ 1. Each leading index is one sample.
        teacher_logits: [..., C], the same shape.
        temperature: T > 0.
        reduction: "batch" (mean over samples, sum over labels) or "batch_class" (mean over both).

    Returns:
        Scalar.

    Raises:
        ValueError: shapes differ or are empty, or temperature or reduction is not valid.
    """
    _check_reduction(reduction)
    student, teacher = _logits(student_logits, teacher_logits)
    loss = soft_cross_entropy(_true_or_false(student), _true_or_false(teacher), temperature)
    return loss if reduction == "batch_class" else loss * student.shape[-1]


def binary_kl_divergence(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Kullback-Leibler divergence from the teacher's labels to the student's, each true or false by itself.

    L = T²/N · Σ_n Σ_c [p log(p/q) + (1 − p) log((1 − p)/(1 − q))],   p = σ(t/T), q = σ(s/T)

    `binary_soft_cross_entropy` with reduction="batch" up to the teacher's entropy, which is constant: the gradients
    are equal.

    Args:
        student_logits: [..., C], C ≥ 1; each leading index is one sample.
        teacher_logits: [..., C], the same shape.
        temperature: T > 0.

    Returns:
        Scalar ≥ 0 up to rounding; exactly 0 for equal logits.

    Raises:
        ValueError: shapes differ or are empty, or temperature is not positive.
    """
    student, teacher = _logits(student_logits, teacher_logits)
    return kl_divergence(_true_or_false(student), _true_or_false(teacher), temperature) * student.shape[-1]


def logits_mse(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Mean squared error of the logits, the only logit loss that fits regression.

    L = mean over all elements of (s − t)²        (BiBERT's training code, regression task STS-B)

    Args:
        student_logits: any shape.
        teacher_logits: the same shape.

    Returns:
        Scalar.

    Raises:
        ValueError: shapes differ or the tensors are empty.
    """
    student, teacher = _logits(student_logits, teacher_logits)
    return (student - teacher).square().mean()


def hidden_mse(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean squared error of the hidden states of one layer.

    L = 1/(N·D) · Σ_{n ∈ tokens} Σ_d (s_nd − t_nd)²,   N the number of unmasked tokens        (BiT)

    Args:
        student: [B, S, D].
        teacher: [B, S, D].
        mask: [B, S], 1 (or True) for a token and 0 for padding; None when there is no padding.

    Returns:
        Scalar; 0 when the mask leaves no token.

    Raises:
        ValueError: shapes do not fit.
    """
    student, teacher = _hidden_states(student, teacher, mask)
    return _mean_square(student - teacher, mask)


def hidden_relative_mse(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean squared error of the hidden states in units of the teacher's mean square.

    L = Σ (s − t)² / Σ t², both sums over unmasked tokens and features

    `hidden_mse` divided by the mean of t²: 1 for a student that says nothing (s = 0), whatever the scale of
    the layer, so that layers can be summed. A mean of t² under 1e-12 counts as 1e-12.

    Args:
        student: [B, S, D].
        teacher: [B, S, D].
        mask: [B, S], 1 (or True) for a token and 0 for padding; None when there is no padding.

    Returns:
        Scalar; 0 when the mask leaves no token.

    Raises:
        ValueError: shapes do not fit.
    """
    student, teacher = _hidden_states(student, teacher, mask)
    return _mean_square(student - teacher, mask) / _mean_square(teacher, mask).clamp_min(_EPS)


def direction_loss(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """Distance between the directions of two hidden states, each taken as one long vector.

    L = ‖ s/‖s‖_F − t/‖t‖_F ‖_F = √(2 − 2 cos(s, t)) ∈ [0, 2]

    with ONE Frobenius norm over all unmasked tokens and features of the batch, not squared: the hidden-state
    term of BiBERT ("Direction-Matching Distillation"; its code does not mask padding). A tensor of norm
    ≤ 1e-12 has no direction: it counts as zero and gets no gradient. Equal inputs give exactly 0, gradient 0.

    Args:
        student: [B, S, D].
        teacher: [B, S, D].
        mask: [B, S], 1 (or True) for a token and 0 for padding; None when there is no padding.

    Returns:
        Scalar.

    Raises:
        ValueError: shapes do not fit.
    """
    return _direction_distance(*_hidden_states(student, teacher, mask))


def relation_loss(student: Tensor, teacher: Tensor, heads: int, mask: Tensor | None = None) -> Tensor:
    """Distance between the directions of the token-to-token relations of queries, keys or values.

    R_h = F_h F_hᵀ/√d per head,   L = ‖ R_s/‖R_s‖_F − R_t/‖R_t‖_F ‖_F ∈ [0, √2]

    with ONE Frobenius norm over the whole [B, H, S, S] tensor, not squared: the query, key and value terms of
    BiBERT ("Direction-Matching Distillation"). F is the output of the query, key or value projection before
    it is binarized. A pair of positions counts when both are tokens (BiBERT's code does not mask padding).
    Zero and equal tensors are treated as in `direction_loss`. Student and teacher may differ in width, since
    R is tokens by tokens.

    Args:
        student: [B, S, H·d_student].
        teacher: [B, S, H·d_teacher].
        heads: H, for both; must divide both widths.
        mask: [B, S], 1 (or True) for a token and 0 for padding; None when there is no padding.

    Returns:
        Scalar.

    Raises:
        ValueError: shapes do not fit, or heads does not divide a width.
    """
    student, teacher = _tokens(student, teacher, mask)
    for name, states in (("student", student), ("teacher", teacher)):
        if heads < 1 or states.shape[-1] % heads:
            raise ValueError(
                f"Got heads={heads} for a {name} of width {states.shape[-1]}, expected a positive divisor; "
                "choose a number of heads that divides the widths of student and teacher."
            )
    return _direction_distance(_relations(student, heads), _relations(teacher, heads))


def score_mse(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean squared error of attention scores before the softmax (TinyBERT's attention loss).

    L = 1/(H N) sum_h sum_{pairs of tokens} (A_s - A_t)^2, N the number of pairs (i, j) in which both are tokens

    Args:
        student: [B, H, S, S], without mask added.
        teacher: [B, H, S, S].
        mask: [B, S], 1 (or True) for a token and 0 for padding; None when there is no padding.

    Returns:
        Scalar; 0 when the mask leaves no token.

    Raises:
        ValueError: shapes do not fit.
    """
    if student.shape != teacher.shape or student.ndim != 4 or student.numel() == 0:
        raise ValueError(
            f"Got student scores {list(student.shape)} and teacher scores {list(teacher.shape)}, expected one shape "
            "[B, H, S, S], not empty; give both models the same tokens and as many heads."
        )
    student, teacher = _widen(student, teacher)
    if mask is None:
        return (student - teacher).square().mean()
    token = mask.bool()
    pair = (token.unsqueeze(1) & token.unsqueeze(2)).unsqueeze(1)
    squares = (student - teacher).square().masked_fill(~pair, 0).sum()
    return squares / (pair.sum() * student.shape[1]).clamp_min(1)


def uniform_layer_map(student_layers: int, teacher_layers: int) -> list[int]:
    """Teacher hidden state for each student hidden state, uniformly spaced.

    index(i) = i · L_teacher/L_student,   i = 0 … L_student

    Item 0 is the embedding output, as in the `hidden_states` of transformers, so embeddings meet embeddings
    and the last layer meets the last layer. Layers counted from 0 without the embeddings (their queries, say)
    are paired by index(i + 1) − 1.

    Args:
        student_layers: L_student ≥ 1, without the embeddings.
        teacher_layers: L_teacher, a multiple of L_student.

    Returns:
        L_student + 1 indices.

    Raises:
        ValueError: there is no student layer, or the teacher's depth is not a multiple of the student's.
    """
    if student_layers < 1 or teacher_layers < student_layers or teacher_layers % student_layers:
        raise ValueError(
            f"Got {student_layers} student and {teacher_layers} teacher layers (embeddings not counted), "
            "expected at least one and a teacher depth that is a multiple of the student's; choose another "
            "teacher, leave the hidden states out (hidden_weight=0), or pair the layers yourself and call the loss "
            "of one pair."
        )
    step = teacher_layers // student_layers
    return [layer * step for layer in range(student_layers + 1)]


def hidden_loss(
    kind: str, students: Sequence[Tensor], teachers: Sequence[Tensor], mask: Tensor | None = None
) -> Tensor:
    """Sum over all layers of one hidden-state loss.

    L = Σ_{i = 0}^{L_student} ℓ(s_i, t_index(i)),   index as in `uniform_layer_map`

    Args:
        kind: ℓ: "relative_mse" (`hidden_relative_mse`), "mse" (`hidden_mse`, BiT) or "direction"
            (`direction_loss`, BiBERT).
        students: L_student + 1 tensors [B, S, D] or [B, D, H, W], the embedding output first.
        teachers: L_teacher + 1 tensors [B, S, D] or [B, D, H, W], the embedding output first.
        mask: [B, S], 1 (or True) for a token and 0 for padding; None when there is no padding.

    Returns:
        Scalar.

    Raises:
        ValueError: kind is unknown, or the number of layers or the shapes do not fit.
    """
    if kind not in _HIDDEN_LOSSES:
        raise ValueError(f"Got hidden-state loss {kind!r}, expected one of {sorted(_HIDDEN_LOSSES)}.")
    layer_map = uniform_layer_map(len(students) - 1, len(teachers) - 1)
    loss = _HIDDEN_LOSSES[kind]
    pairs = zip(students, layer_map, strict=True)
    return torch.stack([loss(student, teachers[index], mask) for student, index in pairs]).sum()


_HIDDEN_LOSSES = {"relative_mse": hidden_relative_mse, "mse": hidden_mse, "direction": direction_loss}


def _widen(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Student and constant teacher in one dtype of at least float32: half precision is too short for sums."""
    dtype = torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)
    return student.to(dtype), teacher.detach().to(dtype)


def _logits(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    if student.shape != teacher.shape or student.numel() == 0:
        raise ValueError(
            f"Got student logits {list(student.shape)} and teacher logits {list(teacher.shape)}, expected "
            "one shape that is not empty; use a teacher with the student's head, tuned on the same labels."
        )
    return _widen(student, teacher)


def _check_reduction(reduction: str) -> None:
    if reduction not in ("batch", "batch_class"):
        raise ValueError(f"Got reduction={reduction!r}, expected 'batch' or 'batch_class'.")


def _true_or_false(logits: Tensor) -> Tensor:
    """Logits of labels [..., C] -> logits of the two classes of each, [..., C, 2]."""
    return torch.stack((logits, torch.zeros_like(logits)), dim=-1)


def _log_probabilities(student: Tensor, teacher: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    student, teacher = _logits(student, teacher)
    if student.ndim < 2 or student.shape[-1] < 2:
        raise ValueError(
            f"Got logits {list(student.shape)}, expected [samples, classes] with at least two classes (the "
            "softmax of a single logit is always 1 and trains nothing); use logits_mse for regression."
        )
    if not temperature > 0:
        raise ValueError(f"Got temperature={temperature}, expected a number above 0; 1.0 changes nothing.")
    return F.log_softmax(student / temperature, dim=-1), F.log_softmax(teacher / temperature, dim=-1)


def _tokens(student: Tensor, teacher: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Widened states with zeros at padding positions; zeros add nothing to sums and norms."""
    same_tokens = student.ndim == teacher.ndim == 3 and student.shape[:2] == teacher.shape[:2]
    if not same_tokens or student.numel() == 0 or teacher.numel() == 0:
        raise ValueError(
            f"Got student states {list(student.shape)} and teacher states {list(teacher.shape)}, expected "
            "[B, S, width] with the same B and S, not empty; give both models the same tokens."
        )
    student, teacher = _widen(student, teacher)
    if mask is None:
        return student, teacher
    if mask.shape != student.shape[:2]:
        raise ValueError(
            f"Got mask {list(mask.shape)} for states {list(student.shape)}, expected [B, S]; "
            "pass the tokenizer's attention_mask (1 token, 0 padding), not an extended or additive mask."
        )
    # Filling, unlike multiplying, also keeps a NaN or infinity at a padding position out of the loss.
    padding = ~mask.bool().unsqueeze(-1)
    return student.masked_fill(padding, 0), teacher.masked_fill(padding, 0)


def _hidden_states(student: Tensor, teacher: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    if student.ndim == teacher.ndim == 4:
        if student.shape != teacher.shape:
            raise ValueError(
                f"Got student feature maps {list(student.shape)} and teacher feature maps {list(teacher.shape)}, "
                "expected one shape: the hidden-state losses compare features position by position; choose a teacher "
                "with the student's levels, or leave the hidden states out (hidden_weight=0)."
            )
        student, teacher = student.flatten(2).mT, teacher.flatten(2).mT
    student, teacher = _tokens(student, teacher, mask)
    if student.shape != teacher.shape:
        raise ValueError(
            f"Got a student of width {student.shape[-1]} and a teacher of width {teacher.shape[-1]}, "
            "expected equal widths: the hidden-state losses (mse, relative_mse, direction) compare features; "
            "use relation_loss, which compares tokens at any width, a teacher of equal width, or no hidden states "
            "(hidden_weight=0)."
        )
    return student, teacher


def _mean_square(states: Tensor, mask: Tensor | None) -> Tensor:
    """Mean of squares over unmasked elements, for states [B, S, D] that are zero at padding positions."""
    if mask is None:
        return states.square().mean()
    elements = mask.bool().sum() * states.shape[-1]
    return states.square().sum() / elements.clamp_min(1)


def _relations(states: Tensor, heads: int) -> Tensor:
    """[B, S, H·d] -> R = F Fᵀ/√d per head, [B, H, S, S]."""
    states = states.unflatten(-1, (heads, -1)).transpose(1, 2)
    # Autocast would round this product to half precision.
    with torch.autocast(states.device.type, enabled=False):
        return states @ (states / math.sqrt(states.shape[-1])).mT  # the features are fewer than the relations


def _direction_distance(student: Tensor, teacher: Tensor) -> Tensor:
    return _DirectionDistance.apply(student, teacher)


class _DirectionDistance(torch.autograd.Function):
    """d = ‖u − v‖ of the directions u = s/‖s‖ and v = t/‖t‖, with its gradient for s in closed form.

    ∂d/∂u = (u − v)/d, ∂u/∂s = (I − uuᵀ)/‖s‖ and u·(u − v) = (1 − ‖v‖² + d²)/2, where ‖v‖ is 1, or 0 without direction:

    ∂d/∂s = [(u − v) − u · (1 − ‖v‖² + d²)/2] / (d ‖s‖)

    Autograd would go through a batch of relations, which is the largest tensor of a step, ten times more.
    """

    @staticmethod
    def forward(ctx, student, teacher):
        by_student, by_teacher = _inverse_length(student), _inverse_length(teacher)
        # The norm of the difference, not √(2 − 2 cos): that loses its digits, and its gradient, near 0.
        difference = (student * by_student).sub_(teacher * by_teacher)
        distance = _frobenius_norm(difference)
        ctx.save_for_backward(student, difference, distance, by_student, by_teacher)
        return distance

    @staticmethod
    def backward(ctx, grad):
        student, difference, distance, by_student, by_teacher = ctx.saved_tensors
        factor = torch.where(distance > 0, grad * by_student / distance, 0)
        along = ((by_teacher == 0) + distance.square()) / 2
        return (difference * factor).sub_(student * (factor * along * by_student)), None


def _inverse_length(states: Tensor) -> Tensor:
    """1/‖s‖, and 0 where that is too short for a direction."""
    norm = _frobenius_norm(states)
    return torch.where(norm > _EPS, norm.clamp_min(_EPS).reciprocal(), 0)


def _frobenius_norm(states: Tensor) -> Tensor:
    # Rows first: one float32 norm over the 10⁷ elements that a batch of relations can have is wrong in the third digit
    # on a CPU.
    return torch.linalg.vector_norm(torch.linalg.vector_norm(states, dim=-1))
