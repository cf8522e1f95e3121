"""Linear layers and embeddings in their two states, latent (trainable) and packed (one bit per weight), and the tables
of all such layers; `convolutions` has the others.

Latent layers are `nn.Linear`/`nn.Embedding` with the same `weight` and `bias` names, so a float checkpoint loads
unchanged; packed layers keep the bits under `weight` (uint8), so a checkpoint that is read by someone who forgot
`import rebnn_hf` fails on a shape instead of loading random weights.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import kernels
from .activations import integer_product
from .binarizers import codes_of, fits_int8
from .convolutions import BinaryConv2d, PackedConv2d
from .functional import WeightRule, binarize_rows
from .packing import unpack_signs
from .states import Latent, Packed, PackedProduct, compute_dtype, take_over


class BinaryLinear(Latent, nn.Linear):
    """Linear layer with latent float weights, used as `y = alpha * (x sign(W)^T) + bias` (ReBNN A1, gradients A2).

    With an `input_binarizer` (a layer of `activations`), x are its codes, and y takes their scale beside alpha.

    Args:
        in_features: M.
        out_features: O.
        bias: whether a float bias is added.
        rule: how weights become binary, see `WeightRule`.

    Shapes: `weight` [O, M], `weight_scale` [O] (absent for closed-form scales, [1] per tensor), `balance` [O]
    (the gamma of the reconstruction loss, kept by `rebnn_hf.attach`); input [..., M], output [..., O].
    """

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, rule: WeightRule | None = None, **kwargs
    ):
        super().__init__(in_features, out_features, bias, **kwargs)
        self.register_module("input_binarizer", None)
        self._init_rule(rule or WeightRule())

    @classmethod
    def from_float(cls, linear: nn.Linear, rule: WeightRule) -> BinaryLinear:
        """Take over the parameters of a float layer (the very same objects, no copy)."""
        latent = cls(linear.in_features, linear.out_features, linear.bias is not None, rule, device="meta")
        return take_over(latent, linear)

    def forward(self, x: Tensor) -> Tensor:
        """`alpha * (x b^T) + bias`: [..., M] -> [..., O]."""
        dtype = compute_dtype(x, self.weight)
        codes, input_scale = codes_of(x, self.input_binarizer, dtype)
        signs, scale = binarize_rows(self.weight, self.weight_scale, self.rule, dtype=dtype)
        return _binary_linear(codes, signs, scale, self.bias, input_scale, fits_int8(self.input_binarizer))

    def pack(self) -> PackedLinear:
        """Inference form with the same bits, scales and bias."""
        packed = PackedLinear(self.in_features, self.out_features, self.bias is not None, device="meta")
        packed._take(self)
        packed.bias = self.bias
        packed.input_binarizer = self.input_binarizer
        return packed.train(self.training)

    def to_float(self) -> nn.Linear:
        """Plain `nn.Linear` with weight `alpha * b`."""
        return _float_linear(self)


class BinaryEmbedding(Latent, nn.Embedding):
    """Embedding whose rows are `alpha_i * sign(w_i)`, one scale per token.

    Args:
        num_embeddings: tokens.
        embedding_dim: M.
        padding_idx: as in `nn.Embedding`: that row gets no gradient.
        rule: see `WeightRule`.

    Shapes: `weight` [tokens, M], `weight_scale` [tokens], `balance` [tokens]; input [...] of indices, output [..., M].
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        rule: WeightRule | None = None,
        **kwargs,
    ):
        super().__init__(num_embeddings, embedding_dim, padding_idx, **kwargs)
        self._init_rule(rule or WeightRule())

    @classmethod
    def from_float(cls, embedding: nn.Embedding, rule: WeightRule) -> BinaryEmbedding:
        """Take over the weight of a float embedding (the very same parameter, no copy)."""
        latent = cls(embedding.num_embeddings, embedding.embedding_dim, embedding.padding_idx, rule, device="meta")
        return take_over(latent, embedding)

    def forward(self, indices: Tensor) -> Tensor:
        """`alpha_i * sign(w_i)` for each index i: [...] -> [..., M]."""
        if len(self.balance) != len(self.weight):
            raise ValueError(
                f"the embedding was resized from {len(self.balance)} to {len(self.weight)} tokens after binarize(), "
                "and the new rows have no scale; call resize_token_embeddings() on the float model, then binarize()."
            )
        rows = F.embedding(indices, self.weight, self.padding_idx)
        scale = self.weight_scale
        if scale is not None and self.rule.granularity == "row":
            scale = F.embedding(indices, scale.unsqueeze(-1), self.padding_idx).squeeze(-1)
        signs, scale = binarize_rows(rows, scale, self.rule, table=self.weight)
        return signs * scale.unsqueeze(-1)

    def pack(self) -> PackedEmbedding:
        """Inference form with the same bits and scales."""
        packed = PackedEmbedding(self.num_embeddings, self.embedding_dim, self.padding_idx, device="meta")
        packed._take(self)
        return packed.train(self.training)

    def to_float(self) -> nn.Embedding:
        """Plain `nn.Embedding` with weight `alpha * b`."""
        return _float_embedding(self)


class PackedLinear(PackedProduct, nn.Linear):
    """Linear layer with one bit per weight: `y = scale * (x b^T) + bias`.

    Shapes: `weight` uint8 [O, ceil(M / 8)] (see `packing`), `weight_scale` [O], `bias` [O]; input [..., M], output
    [..., O]. With an `input_binarizer`, x are its codes, and y takes their scale too. On a CPU the engine computes it
    (see `kernels`); the reference product unpacks the signs of this one layer for the time of the call.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True, device=None, dtype=None):
        super().__init__(in_features, out_features, bias, device="meta")
        self._init_product()
        self._init_bits(out_features, in_features, device, dtype)
        if bias:
            self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype))

    @property
    def width(self) -> int:
        """Signs in a row."""
        return self.in_features

    @classmethod
    def like(cls, linear: nn.Linear) -> PackedLinear:
        """Empty packed layer of the shape, device and dtype of `linear`, for a checkpoint to fill."""
        weight = linear.weight
        return cls(linear.in_features, linear.out_features, linear.bias is not None, weight.device, weight.dtype)

    def _check_features(self, x: Tensor) -> None:
        if x.shape[-1] != self.in_features:
            raise ValueError(f"expected inputs of {self.in_features} features, got {tuple(x.shape)}.")

    def _make_layout(self, kind: int) -> Tensor:
        return kernels.cpu.layout(self.weight, self.in_features, kind)

    def _by_engine(self, x: Tensor, layout: Tensor | None, codes: kernels.Codes) -> Tensor:
        return kernels.linear(x, self.weight, layout, self.weight_scale, self.bias, codes)

    def reference(self, x: Tensor) -> Tensor:
        """`scale * (x b^T) + bias`: [..., M] -> [..., O], in floats and with gradients."""
        dtype = compute_dtype(x, self.weight_scale)
        codes, input_scale = codes_of(x, self.input_binarizer, dtype)
        signs = unpack_signs(self.weight, self.in_features, dtype)
        return _binary_linear(codes, signs, self.weight_scale, self.bias, input_scale, fits_int8(self.input_binarizer))

    def to_float(self) -> nn.Linear:
        """Plain `nn.Linear` with weight `scale * b`."""
        return _float_linear(self)


class PackedEmbedding(Packed, nn.Embedding):
    """Embedding with one bit per weight and one scale per token.

    Shapes: `weight` uint8 [tokens, ceil(M / 8)], `weight_scale` [tokens]; input [...] of indices, output [..., M].
    """

    def __init__(
        self, num_embeddings: int, embedding_dim: int, padding_idx: int | None = None, device=None, dtype=None
    ):
        super().__init__(num_embeddings, embedding_dim, padding_idx, device="meta")
        self._init_bits(num_embeddings, embedding_dim, device, dtype)

    @property
    def width(self) -> int:
        """Signs in a row."""
        return self.embedding_dim

    @classmethod
    def like(cls, embedding: nn.Embedding) -> PackedEmbedding:
        """Empty packed embedding of the shape, device and dtype of `embedding`, for a checkpoint to fill."""
        weight = embedding.weight
        return cls(*weight.shape, embedding.padding_idx, weight.device, weight.dtype)

    def forward(self, indices: Tensor) -> Tensor:
        """`scale_i * b_i` for each index i: [...] -> [..., M]; only the looked-up rows are unpacked."""
        if kernels.serves(self.weight_scale):
            return kernels.embedding(indices, self.weight, self.weight_scale, self.embedding_dim)
        scale = F.embedding(indices, self.weight_scale.unsqueeze(-1))
        return unpack_signs(F.embedding(indices, self.weight), self.embedding_dim, scale.dtype) * scale

    def to_float(self) -> nn.Embedding:
        """Plain `nn.Embedding` with weight `scale * b`."""
        return _float_embedding(self)


LATENT_OF = {nn.Linear: BinaryLinear, nn.Conv2d: BinaryConv2d, nn.Embedding: BinaryEmbedding}
"""The one table of layer types: float class -> latent class."""

PACKED_OF = {nn.Linear: PackedLinear, nn.Conv2d: PackedConv2d, nn.Embedding: PackedEmbedding}
"""Float class -> packed class."""


def float_type(module: nn.Module) -> type:
    """The float class of a layer in any state, a key of these tables."""
    return next(kind for kind in LATENT_OF if isinstance(module, kind))


LATENT_TYPES = tuple(LATENT_OF.values())
PACKED_TYPES = tuple(PACKED_OF.values())


def _binary_linear(
    x: Tensor,
    signs: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    input_scale: Tensor | None = None,
    int8: bool = False,
) -> Tensor:
    """`scale * (x b^T) + bias` in the type of the signs: promotion by float32 scales would undo autocast.

    A scale of the inputs, [1] or one for each token [..., 1], multiplies that of the rows. `int8`: x are integers that
    fit into 8 bits.
    """
    bias = None if bias is None else bias.to(signs.dtype)
    if signs.dtype == torch.float16:
        # A sum of M unscaled inputs can pass 65504 where the scaled one does not.
        x = x if input_scale is None else x * input_scale.to(x.dtype)
        return F.linear(x, signs * scale.to(signs.dtype).unsqueeze(-1), bias)
    scale = (scale if input_scale is None else scale * input_scale).to(signs.dtype)
    product = integer_product(x, signs) if int8 else F.linear(x, signs)
    return product * scale if bias is None else torch.addcmul(bias, product, scale)


def _float_linear(layer) -> nn.Linear:
    linear = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
    linear.weight = nn.Parameter(layer.binary_weight())
    linear.bias = layer.bias
    return linear.train(layer.training)


def _float_embedding(layer) -> nn.Embedding:
    embedding = nn.Embedding(layer.num_embeddings, layer.embedding_dim, layer.padding_idx, device="meta")
    embedding.weight = nn.Parameter(layer.binary_weight())
    return embedding.train(layer.training)
