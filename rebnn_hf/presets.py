"""Named methods as plain sets of fields: of `ReBNNConfig` (what is 1-bit, by which rule) and, where a method prescribes
how it is distilled, of `ReBNNTrainingArguments`.

Any field can be overridden: `ReBNNConfig.preset("bit", balance_rule="flip_maxgrad")`.
"""

from __future__ import annotations

from typing import Any

# Weight rules

REBNN = {"weight_scale": "learned", "balance_rule": "flip_maxgrad"}
BWN = {"weight_scale": "mean_abs", "balance_rule": "none"}
REACTNET_WEIGHTS = {**BWN, "ste_slope": "unit"}  # D3
BIBERT_WEIGHTS = {**BWN, "weight_center": "row", "ste_slope": "unit"}  # B1
BIT_WEIGHTS = {  # C4
    **BWN,
    "scale_granularity": "tensor",
    "weight_center": "tensor",
    "center_gradient": False,
    "weight_ste": "identity",
    "ste_slope": "unit",
}

# Activations, attention and the feed-forward block

BIBERT_ACTIVATIONS = {"activation": "sign", "attention": "bool"}  # B2, B3
REACTNET_ACTIVATIONS = {"activation": "rsign", "attention": "bool", "ffn_activation": "rprelu"}  # D1, D2


def _elastic(bits: int) -> dict[str, Any]:
    """C1: inputs only, which every architecture has."""
    return {"activation": "elastic", "activation_bits": bits}


def _bit_activations(bits: int) -> dict[str, Any]:
    """C1, C2, C5."""
    return {**_elastic(bits), "attention": "elastic", "ffn_activation": "relu"}


EVERYTHING = {"word_embeddings": True, "pooler": True}
"""What the published fully binary models binarize beside the encoder's blocks (B5, C5)."""

RELEASED = {**EVERYTHING, "ties": "released"}

CONFIGS: dict[str, dict[str, Any]] = {
    # this package
    "rebnn-w1a32": REBNN,
    "rebnn-bibert-w1a1": {**REBNN, **BIBERT_ACTIVATIONS},
    "rebnn-bit-w1a1": {**REBNN, **_bit_activations(1)},
    "rebnn-bit-w1a2": {**REBNN, **_bit_activations(2)},
    "rebnn-bit-w1a4": {**REBNN, **_bit_activations(4)},
    "rebnn-bit-w1a8": {**REBNN, **_bit_activations(8)},
    "rebnn-elastic-w1a1": {**REBNN, **_elastic(1)},  # on every architecture
    # published methods, on the encoder's blocks
    "bwn-w1a32": BWN,
    "bibert": {**BIBERT_WEIGHTS, **BIBERT_ACTIVATIONS},
    "bit": {**BIT_WEIGHTS, **_bit_activations(1)},
    "bit-w1a2": {**BIT_WEIGHTS, **_bit_activations(2)},
    "bit-w1a4": {**BIT_WEIGHTS, **_bit_activations(4)},
    "bit-w1a8": {**BIT_WEIGHTS, **_bit_activations(8)},
    "reactnet": {**REACTNET_WEIGHTS, **REACTNET_ACTIVATIONS},
    # the same with the choices of the released code, for comparisons in training
    "bibert-released": {**BIBERT_WEIGHTS, **BIBERT_ACTIVATIONS, **RELEASED},
    "bit-released": {**BIT_WEIGHTS, **_bit_activations(1), **RELEASED},
    "rebnn-released": {
        **REBNN,
        **REACTNET_ACTIVATIONS,
        # Its faults A7.1 to A7.3: constant balance, slope without the scale (but for a factor), no window. Not its
        # wrong gradient of the scale (A7.4) and not its random first scale (A6).
        "balance_rule": "const",
        "ste_slope": "unit",
        "weight_ste": "identity",
        "ties": "released",
    },
}
"""Fields of `ReBNNConfig` behind each name."""

# Distillation

BIBERT_LOSSES = {  # B4
    "logits_loss": "soft_cross_entropy",
    "logits_reduction": "batch_class",
    "label_weight": 0.5,
    "hidden_loss": "direction",
    "relation_weight": 1.0,
}
BIT_LOSSES = {  # C6
    "logits_loss": "soft_cross_entropy",
    "logits_reduction": "batch_class",
    "hidden_loss": "mse",
}

LOSSES: dict[str, dict[str, Any]] = {
    "rebnn-bibert-w1a1": BIBERT_LOSSES,
    "bibert": BIBERT_LOSSES,
    "bibert-released": BIBERT_LOSSES,
    **dict.fromkeys(("bit", "bit-w1a2", "bit-w1a4", "bit-w1a8"), BIT_LOSSES),
    "bit-released": BIT_LOSSES,
}
"""Fields of `ReBNNTrainingArguments` that belong to a name; other names use its defaults."""


def config_fields(name: str) -> dict[str, Any]:
    """Fields of `ReBNNConfig` of a preset.

    Raises:
        ValueError: no preset of that name.
    """
    if name not in CONFIGS:
        raise ValueError(f"preset {name!r} is unknown; expected one of {', '.join(CONFIGS)}.")
    return dict(CONFIGS[name])


def loss_fields(name: str) -> dict[str, Any]:
    """Fields of `ReBNNTrainingArguments` of a preset.

    Raises:
        ValueError: no preset of that name.
    """
    config_fields(name)
    return dict(LOSSES.get(name, {}))
