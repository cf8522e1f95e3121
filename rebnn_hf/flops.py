"""What a forward pass multiplies, by the bits of the factors: `operations`.

An *equivalent FLOP* follows the convention of the literature on 1-bit networks: a multiply-accumulate of m-bit by n-bit
codes is m * n / 64 of a float one, as if a processor did 64 one-bit products (XNOR and popcount) in the time of one
float product. It is an ideal that compares methods, never a measured speed. A product with a float factor counts as a
float one whatever the other factor: signs of weights alone (W1A32) save multiplications, but no accumulations.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from .architecture import (
    LAYOUTS,
    base_relative,
    block_prefixes,
    blocks,
    inner_convolutions,
    layout_of,
    model_type,
    require_model,
)
from .binarizers import Elastic, TokenInt8
from .inputs import image_sides, pair
from .layers import LATENT_TYPES, PACKED_TYPES
from .notebook import html_table

TEXT_ENCODERS = (*LAYOUTS, "mpnet", "modernbert")
"""`model_type` of the encoders of text whose attention multiplies as BERT's does, each token by each."""

IMAGE_ENCODERS = ("vit", "deit")
"""`model_type` of those that read the patches of an image, and a token or two beside them."""

PARTS = (
    "linear layers of the embeddings",
    "linear layers of the blocks",
    "products of attention",
    "pooler",
    "stem and other convolutions",
    "convolutions of the blocks",
    "linear layers",
    "head",
)
"""Parts of `operations`, in the order of its rows."""

HEADS_ONCE = (
    "ForSequenceClassification",
    "ForMultipleChoice",
    "ForNextSentencePrediction",
    "ForImageClassification",
    "ForImageClassificationWithTeacher",
)
"""How the classes are called whose head sees one vector for each sequence or image."""

HEADS_EACH = ("ForTokenClassification", "ForQuestionAnswering", "ForMaskedLM")
"""How the classes are called whose head sees every token."""

COUNTED = (
    "Equivalent FLOPs: an m x n-bit multiply-accumulate is m * n / 64 of a float one, and with a float factor",
    "(W1A32) a whole one. An ideal for comparing methods, never a measured speed. Not counted: look-ups and",
    "elementwise float work (norms, softmax, activation functions, scales, biases, binarization).",
)
"""What the numbers are, in lines."""

WIDEST_CODE = 8
"""Bits of the widest integer codes; wider factors are float."""

Macs = dict[tuple[str, tuple[int, int]], int]
"""Multiply-accumulates by part and bits."""


@dataclass(frozen=True)
class Products:
    """Multiply-accumulates of one part with factors of the same bits.

    Attributes:
        part: one of `PARTS`.
        bits: of the two factors: weights and inputs of linear layers; in attention queries and keys, as probabilities
            and values.
        macs: multiply-accumulates.
        equivalent_flops: 2 * macs * m * n / 64, or 2 * macs with a float factor.
    """

    part: str
    bits: tuple[int, int]
    macs: int
    equivalent_flops: float


@dataclass(frozen=True)
class Operations:
    """Result of `operations`; `print`, and a notebook, show it as a table that says what is counted.

    Attributes:
        inputs: what is counted for, in words.
        rows: one per part and bits.
        totals: `macs`; `float_flops` = 2 * macs, were all float; `equivalent_flops`; and their `ratio`.
    """

    inputs: str
    rows: list[Products]
    totals: dict[str, float]

    def to_dict(self) -> dict:
        """Inputs, rows and totals as plain data for JSON."""
        return {"inputs": self.inputs, "rows": [asdict(row) for row in self.rows], "totals": dict(self.totals)}

    def __str__(self) -> str:
        lines = [self._header(), *self._lines()]
        table = [f"{part:<34}{bits:>8}{macs:>20}{flops:>20}" for part, bits, macs, flops in lines]
        return "\n".join([*table, self._in_float(), *COUNTED])

    def _repr_html_(self) -> str:
        return html_table(self._header(), self._lines(), (0,), [self._in_float(), " ".join(COUNTED)])

    def _header(self) -> tuple[str, ...]:
        return self.inputs, "bits", "MACs", "equivalent FLOPs"

    def _lines(self) -> list[tuple[str, ...]]:
        lines = [(row.part, "{} x {}".format(*row.bits), row.macs, row.equivalent_flops) for row in self.rows]
        lines.append(("total", "", self.totals["macs"], self.totals["equivalent_flops"]))
        return [(part, bits, f"{macs:,}", f"{flops:,.0f}") for part, bits, macs, flops in lines]

    def _in_float(self) -> str:
        totals = self.totals
        return (
            f"all in float: {totals['float_flops']:,} FLOPs (2 for each multiply-accumulate), "
            f"{totals['ratio']:.1f} x as many"
        )


def operations(model: nn.Module, tokens: int = 128, image_size: int | tuple[int, int] | None = None) -> Operations:
    """Multiply-accumulates of one sequence or one image, by the bits of their factors.

    A linear layer O x M takes tokens * O * M (pooler, and heads that see one vector for each sequence: O * M); the two
    products of attention take 2 * tokens^2 * hidden size in each block, windows too: what is masked is multiplied all
    the same; a convolution O * M for each position of its output, padding included, M = C / groups * kh * kw. The
    tokens of a vision transformer are the patches of the image, and its class and distillation tokens. Elementwise work
    and look-ups are not counted.

    Covered are BERT, RoBERTa, XLM-R, CamemBERT, ELECTRA, DistilBERT, MPNet and ModernBERT; ViT and DeiT; convolutional
    networks without attention. DeBERTa is not: it multiplies by relative positions too.

    Args:
        model: float, latent or packed, with a `model_type` in `TEXT_ENCODERS` or `IMAGE_ENCODERS`, or a convolutional
            network (a plain module too), which runs once on a blank image; it may be on the meta device.
        tokens: of the sequence, without padding.
        image_size: height and width of the image; default: those the model was made for (224 where its config does not
            say it).

    Returns:
        Rows and totals, also in equivalent FLOPs (see the head of this file). `print(operations(model))` shows a
        table, `.to_dict()` is JSON.

    Raises:
        TypeError: not a model, or a wrapper of one.
        ValueError: an architecture or head of which it is not known what it multiplies; `tokens` or `image_size` is no
            positive integer; an image smaller than a patch.

    Example:
        >>> print(rebnn_hf.operations(model, tokens=384))
    """
    require_model(model, "operations")
    if not _is_size(tokens):
        raise ValueError(f"tokens={tokens!r} must be a positive integer.")
    if not (image_size is None or _is_size(image_size) or _is_pair_of_sizes(image_size)):
        raise ValueError(f"image_size={image_size!r} must be a positive integer, or two of them, height and width.")
    height, width = image_sides(model) if image_size is None else pair(image_size)
    image = f"one image of {height} x {width}"
    if model_type(model) in IMAGE_ENCODERS:
        return _result(image, _vision_transformer_macs(model, height, width))
    if sum(isinstance(module, nn.Conv2d) for module in model.modules()) > 1:  # one embeds the patches of a transformer
        return _result(image, _convolutional_macs(model, height, width))
    _check_architecture(model)
    return _result(f"one sequence of {tokens} tokens", _transformer_macs(model, tokens))


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_pair_of_sizes(value: object) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and all(map(_is_size, value))


def _transformer_macs(model: PreTrainedModel, tokens: int) -> Macs:
    """Of the linear layers and of attention."""
    macs: Macs = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            part = _part(model, name)
            once = part == "pooler" or (part == "head" and _head_runs_once(model))
            key = (part, linear_bits(module))
            macs[key] = macs.get(key, 0) + (1 if once else tokens) * module.in_features * module.out_features
    for _, block in blocks(model):
        key = ("products of attention", _attention_bits(model, block))
        macs[key] = macs.get(key, 0) + 2 * tokens**2 * model.config.hidden_size
    return macs


def _vision_transformer_macs(model: PreTrainedModel, height: int, width: int) -> Macs:
    """Of a transformer whose tokens are the patches of an image, cut out by one convolution."""
    if model.base_model is not model:
        _head_runs_once(model)  # or it is not known what its convolutions see
    embeddings = model.base_model.embeddings
    convolution = embeddings.patch_embeddings.projection
    across, along = convolution.kernel_size
    patches = (height // across) * (width // along)
    if not patches:
        raise ValueError(f"an image of {height} x {width} is smaller than a patch, {across} x {along}.")
    beside = embeddings.position_embeddings.shape[1] - embeddings.patch_embeddings.num_patches
    key = ("stem and other convolutions", linear_bits(convolution))
    return _transformer_macs(model, patches + beside) | {key: patches * convolution.weight.numel()}


def _result(inputs: str, macs: Macs) -> Operations:
    rows = [
        Products(part, bits, count, 2 * count * _cost(bits))
        for (part, bits), count in sorted(macs.items(), key=lambda item: (PARTS.index(item[0][0]), item[0][1]))
    ]
    total, equivalent = sum(row.macs for row in rows), sum(row.equivalent_flops for row in rows)
    totals = {
        "macs": total,
        "float_flops": 2 * total,
        "equivalent_flops": equivalent,
        "ratio": 2 * total / equivalent,
    }
    return Operations(inputs, rows, totals)


class _ProductsOfFeatures(TorchDispatchMode):
    """Notices where features are multiplied by features, as in attention; such products belong to no layer."""

    def __init__(self):
        super().__init__()
        self.seen = False

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        self.seen |= name in ("bmm", "baddbmm") or name.startswith("_scaled_dot_product")
        return function(*args, **(kwargs or {}))


@torch.no_grad()
def _convolutional_macs(model: nn.Module, height: int, width: int) -> Macs:
    """Of a convolutional network, by what its layers make of a blank image."""
    inner = dict(inner_convolutions(model))
    macs: Macs = {}
    layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    first = next(module for module in layers.values() if isinstance(module, nn.Conv2d))

    def count(name: str, layer: nn.Module, output: Tensor) -> None:
        if isinstance(layer, nn.Linear):
            part, width = "linear layers", layer.in_features
        else:
            part = "convolutions of the blocks" if name in inner else "stem and other convolutions"
            width = layer.in_channels // layer.groups * math.prod(layer.kernel_size)
        key = (part, linear_bits(layer))
        macs[key] = macs.get(key, 0) + output.numel() * width

    handles = [m.register_forward_hook(lambda layer, _, y, n=n: count(n, layer, y)) for n, m in layers.items()]
    modes = [(module, module.training) for module in model.modules()]
    blank = first.weight.new_zeros(1, first.in_channels, height, width)  # the stem is float
    try:
        with _ProductsOfFeatures() as products:
            model.eval()
            model(pixel_values=blank) if isinstance(model, PreTrainedModel) else model(blank)
    finally:
        for module, training in modes:
            module.training = training
        for handle in handles:
            handle.remove()
    if products.seen:
        raise _unknown_attention(model)
    return macs


def linear_bits(linear: nn.Linear | nn.Conv2d) -> tuple[int, int]:
    """Bits of weights and inputs of a linear layer or convolution; those that are float have those of their type."""
    width = 8 * (linear.weight_scale if isinstance(linear, PACKED_TYPES) else linear.weight).itemsize
    if not isinstance(linear, LATENT_TYPES + PACKED_TYPES):
        return width, width
    return 1, width if linear.input_binarizer is None else code_bits(linear.input_binarizer)


def code_bits(binarizer: nn.Module) -> int:
    """Bits of the codes that a layer of `binarizers` gives."""
    if isinstance(binarizer, TokenInt8):
        return 8
    return binarizer.bits if isinstance(binarizer, Elastic) else 1


def _attention_bits(model: PreTrainedModel, block: nn.Module) -> tuple[int, int]:
    """Queries, keys, values and probabilities of 1-bit attention all have the same bits."""
    layout = layout_of(model)
    attention = None if layout is None else block.get_submodule(layout.attention)
    binary = getattr(attention, "binary_attention", None)
    bits = 8 * model.dtype.itemsize if binary is None else code_bits(binary.query)
    return bits, bits


def _cost(bits: tuple[int, int]) -> float:
    """Of a multiply-accumulate, in float ones."""
    return 1 if max(bits) > WIDEST_CODE else bits[0] * bits[1] / 64


def _part(model: PreTrainedModel, name: str) -> str:
    """The part a linear layer belongs to."""
    if "pooler" in name.split("."):
        return "pooler"
    if base_relative(model, name) is None:
        return "head"
    inside = name.startswith(block_prefixes(model))
    return "linear layers of the blocks" if inside else "linear layers of the embeddings"


def _head_runs_once(model: PreTrainedModel) -> bool:
    """Whether the head sees one vector for each sequence, by the name of its class in transformers."""
    for kind in type(model).__mro__:
        if kind.__name__.endswith(HEADS_ONCE):
            return True
        if kind.__name__.endswith(HEADS_EACH):
            return False
    raise ValueError(
        f"it is not known whether the head of {type(model).__name__} runs once or for every token; known are "
        f"{', '.join(HEADS_ONCE + HEADS_EACH)}. operations(model.base_model) counts all but the head."
    )


def _unknown_attention(model: nn.Module) -> ValueError:
    return ValueError(
        f"operations() must know what attention multiplies, and {model_type(model)!r} is not among "
        f"{', '.join(TEXT_ENCODERS + IMAGE_ENCODERS)}, nor a convolutional network without attention; summary(model) "
        "shows bits and bytes of every architecture."
    )


def _check_architecture(model: nn.Module) -> None:
    if model_type(model) not in TEXT_ENCODERS:
        raise _unknown_attention(model)
    if getattr(model.config, "is_decoder", False):
        raise ValueError("operations() counts encoders, and this model is a decoder (config.is_decoder=True).")
