"""1-bit attention through transformers' own attention interface: no modelling file is touched.

A self-attention module gets a child `binary_attention` that binarizes its queries, keys, values and probabilities;
the model's attention implementation is set to `rebnn`, which calls that child. Notation: Q, K, V [B, H, S, d] of H
heads of size d, `mask` [B, 1, S, S] with 0 for pairs that count and a very negative number for the others.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask
from transformers.utils.output_capturing import _active_collector

from . import kernels
from .activations import ActivationRule, bool_gate
from .binarizers import ClippedSign, Elastic

IMPLEMENTATION = "rebnn"
"""Name under which transformers knows the attention of this file."""


LARGEST_EXPONENT = 80.0
"""Scores may differ by so much before exp() of them leaves the range of a float."""


class BoolAttention(nn.Module):
    """BiBERT's Bi-Attention (B3): integers from beginning to end, no softmax.

    A = sign(Q) sign(K)^T * scaling + mask; B = bool(A); context = B sign(V), not normalised. Dropout acts on the
    scores, and what it drops is inactive. Gradients: `clipped_sign` and `bool_gate`.

    Args:
        rule: only its ties are used; `released` also opens the windows of the three signs, as BiBERT's code does.
    """

    def __init__(self, rule: ActivationRule):
        super().__init__()
        self.ties = rule.ties
        for name in ("query", "key", "value"):
            self.add_module(name, ClippedSign(rule.ties, open_window=rule.ties == "released"))

    bits = 1

    def engine_parts(self, head: int, scaling: float) -> tuple[None, Tensor, Tensor]:
        """Table, threshold and scale of `kernels.attention`: without a table a key counts by the sign of its score."""
        return None, torch.zeros(1), torch.ones(1)

    def fits_engine(self, head: int, scaling: float) -> bool:
        """Whether `kernels.attention` computes the same."""
        return self.ties == "up" and scaling > 0

    def scores(self, query: Tensor, key: Tensor, scaling: float) -> Tensor:
        """sign(Q) sign(K)^T * scaling, [B, H, S, S]."""
        return self.query(query)[0] @ self.key(key)[0].mT * scaling

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, dropout: float
    ) -> tuple[Tensor, Tensor]:
        """Context [B, H, S, d] and the bools [B, H, S, S]."""
        scores = _masked(self.scores(query, key, scaling), mask)
        if dropout:
            kept = F.dropout(torch.ones_like(scores), dropout)
            scores = (scores * kept).masked_fill(kept == 0, torch.finfo(scores.dtype).min)
        active = bool_gate(scores, self.ties)
        return active @ self.value(value)[0], active


class ElasticAttention(nn.Module):
    """BiT's attention (C1, C2): softmax over few-bit queries and keys, and its probabilities in {0, a}.

    P = softmax(Q_b K_b^T * scaling + mask); context = elastic(dropout(P)) V_b. The four scales are learned; there is no
    shift, whose part the biases of the projections play.

    Args:
        rule: bits, initial scales and ties.
    """

    def __init__(self, rule: ActivationRule):
        super().__init__()
        for name in ("query", "key", "value"):
            self.add_module(name, Elastic(rule.bits, True, rule.signed_init, ties=rule.ties))
        self.probabilities = Elastic(rule.bits, False, rule.unsigned_init, ties=rule.ties)
        self.bits = rule.bits

    def score_scale(self, scaling: float) -> Tensor:
        """What the integers of the scores are multiplied with, [1]."""
        return self.query.positive_scale() * self.key.positive_scale() * scaling

    def engine_parts(self, head: int, scaling: float) -> tuple[Tensor, Tensor, Tensor]:
        """Table, threshold and scale of `kernels.attention`, for heads of `head` features."""
        scale = self.probabilities.positive_scale() * self.value.positive_scale()
        return self.table(head, scaling), self.threshold(), scale

    def table(self, head: int, scaling: float) -> Tensor:
        """exp(score) for 1-bit queries and keys of `head` features by the number of bits that differ, [head + 1].

        Relative to the largest: a softmax divides by their sum.
        """
        scores = (head - 2 * torch.arange(head + 1)).float() * self.score_scale(scaling).float()
        return (scores - scores[0]).exp()

    def threshold(self) -> Tensor:
        """The smallest probability [1] whose 1-bit code is 1."""
        guess = (self.probabilities.positive_scale().float() / 2).view(torch.int32)
        near = (guess + torch.arange(-8, 9, dtype=torch.int32)).view(torch.float32)
        return near[(self.probabilities(near)[0] == 0).sum()].reshape(1)

    def fits_engine(self, head: int, scaling: float) -> bool:
        """Whether `kernels.attention` computes the same: 1 bit, and scores whose exponentials fit into a table."""
        calibrated = all(module.calibrated for module in (self.query, self.key, self.value, self.probabilities))
        if self.bits != 1 or self.query.ties != "up" or scaling <= 0 or not calibrated:
            return False
        return 2 * head * self.score_scale(scaling).item() <= LARGEST_EXPONENT

    def scores(self, query: Tensor, key: Tensor, scaling: float) -> Tensor:
        """Q_b K_b^T * scaling, [B, H, S, S]."""
        (query, query_scale), (key, key_scale) = self.query(query), self.key(key)
        return query @ key.mT * (query_scale * key_scale * scaling)

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, dropout: float
    ) -> tuple[Tensor, Tensor]:
        """Context [B, H, S, d] and the quantized probabilities [B, H, S, S]."""
        scores = _masked(self.scores(query, key, scaling), mask)
        probabilities = F.dropout(scores.softmax(-1), dropout)
        (codes, scale), (value, value_scale) = self.probabilities(probabilities), self.value(value)
        return codes @ value * (scale * value_scale), codes * scale


ATTENTION_OF = {"bool": BoolAttention, "elastic": ElasticAttention}
"""Kind of attention, as in `ReBNNConfig.attention` -> its module."""


def binary_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[Tensor, Tensor]:
    """transformers' attention function: hands over to the module's `binary_attention`.

    A module without one, left float or of a float model that shares its config, computes ordinary attention.

    Args:
        module: the self-attention module.
        query: [B, H, S, d].
        key: [B, H, S, d].
        value: [B, H, S, d].
        attention_mask: [B, 1, S, S], added to the scores.
        scaling: default 1 / sqrt(d).
        dropout: probability.
        **kwargs: what other attention functions take.

    Returns:
        Context [B, S, H, d], and attention [B, H, S, S], or None where the engine computed it: it does where nobody
        asked for attentions.
    """
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    attention = getattr(module, "binary_attention", _float_attention)
    if _engine_serves(attention, (query, key, value), attention_mask, scaling, dropout):
        parts = attention.engine_parts(query.shape[-1], scaling)
        return kernels.attention(query, key, value, attention_mask, *parts), None
    context, weights = attention(query, key, value, attention_mask, scaling, dropout)
    return context.transpose(1, 2).contiguous(), weights


def _engine_serves(attention, inputs: tuple[Tensor, ...], mask: Tensor | None, scaling: float, dropout: float) -> bool:
    """Whether the engine can compute this call: it knows 1-bit attention and padding, no gradients, no weights."""
    query, binary = inputs[0], isinstance(attention, BoolAttention | ElasticAttention)
    if not binary or dropout or not kernels.serves(query):
        return False
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (*inputs, *attention.parameters())):
        return False
    head = query.shape[-1]
    if head % 16 or head > 240 or recorded("attentions") or torch.compiler.is_compiling():
        return False
    return attention.fits_engine(head, scaling) and (mask is None or kernels.is_padding(mask, query.shape[2]))


def recorded(*names: str) -> bool:
    """Whether the running call of a transformers model was asked for one of these outputs from within."""
    collected = _active_collector.get()
    return bool(collected) and any(name in collected for name in names)


def use_binary_attention(module: nn.Module, attention: nn.Module) -> None:
    """Give a self-attention module few-bit attention, and an error where another implementation would ignore it."""
    if not hasattr(module, "binary_attention"):
        module.register_forward_pre_hook(_require_implementation)
    module.binary_attention = attention


def _require_implementation(module: nn.Module, inputs) -> None:
    if module.config._attn_implementation != IMPLEMENTATION:
        raise RuntimeError(
            f"the attention implementation was set to {module.config._attn_implementation!r} after binarize(), which "
            f"would ignore the 1-bit attention; call model.set_attn_implementation({IMPLEMENTATION!r})."
        )


def _float_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, dropout: float
) -> tuple[Tensor, Tensor]:
    probabilities = _masked(query @ key.mT * scaling, mask).softmax(-1)
    return F.dropout(probabilities, dropout) @ value, probabilities


def _masked(scores: Tensor, mask: Tensor | None) -> Tensor:
    return scores if mask is None else scores + mask


AttentionInterface.register(IMPLEMENTATION, binary_attention)
AttentionMaskInterface.register(IMPLEMENTATION, eager_mask)
