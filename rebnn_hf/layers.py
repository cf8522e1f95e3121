"""The layers in their two states: latent (trainable) and packed (one bit per weight).

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
from .binarizers import codes_of, engine_codes, fits_int8
from .functional import SCALE_FLOOR, WeightRule, binarize_rows, center, is_positive, mean_abs_scale
from .packing import pack_signs, packed_width, unpack_signs


class _Latent:
    """What latent layers share: the rule, the learned scale, the balance of each row."""

    def _init_rule(self, rule: WeightRule) -> None:
        self.rule = rule
        rows = self.weight.shape[0]
        like = {"device": self.weight.device, "dtype": self.weight.dtype}
        if rule.scale == "learned":
            size = rows if rule.granularity == "row" else 1
            self.weight_scale = nn.Parameter(torch.empty(size, **like), requires_grad=self.weight.requires_grad)
        else:
            self.register_parameter("weight_scale", None)
        # Not called gamma: checkpoint loaders rename keys that contain it.
        self.register_buffer("balance", torch.empty(rows, **like))
        self.reset_scale()

    @torch.no_grad()
    def reset_scale(self) -> None:
        """Start from the closed form, `alpha_i = mean_j |W_ij|` (A6), and from a balance of zero."""
        if self.weight_scale is not None:
            self.weight_scale.copy_(mean_abs_scale(self.weight, self.rule.granularity).clamp_min(SCALE_FLOOR))
        self.balance.zero_()

    @torch.no_grad()
    def scale(self) -> Tensor:
        """Scales in force, alpha > 0, without gradient: [rows] or [1]."""
        if self.weight_scale is not None:
            return self.weight_scale.abs()
        return mean_abs_scale(self.weight, self.rule.granularity)

    @torch.no_grad()
    def centered(self) -> Tensor:
        """Latent weights as the sign sees them, `W - mu` (the weights themselves where nothing is centered)."""
        return center(self.weight, self.rule)

    @torch.no_grad()
    def signs(self) -> Tensor:
        """Boolean [rows, M]: true where the binary weight is +1."""
        return is_positive(self.centered())

    @torch.no_grad()
    def binary_weight(self) -> Tensor:
        """Float binary weights `W_hat = alpha * b`, [rows, M], for export and inspection."""
        signs, scale = binarize_rows(self.weight, self.weight_scale, self.rule)
        return signs * scale.unsqueeze(-1)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, 1-bit latent, scale={self.rule.scale}"


class _Packed:
    """What packed layers share: bits and scales as buffers."""

    def _init_bits(self, rows: int, width: int, device=None, dtype=None) -> None:
        del self.weight
        # Garbage until loaded or packed into, like every module built for loading.
        self.register_buffer("weight", torch.empty(rows, packed_width(width), dtype=torch.uint8, device=device))
        self.register_buffer("weight_scale", torch.empty(rows, device=device, dtype=dtype))

    @torch.no_grad()
    def _take(self, latent) -> None:
        """Keep the signs and scales of a latent layer of the same shape."""
        self.weight = pack_signs(latent.signs())
        self.weight_scale = latent.scale().expand(latent.weight.shape[0]).clone()

    @torch.no_grad()
    def binary_weight(self) -> Tensor:
        """Float binary weights `W_hat = alpha * b`, [rows, M]: a copy, for export and inspection."""
        return unpack_signs(self.weight, self.width, self.weight_scale.dtype) * self.weight_scale.unsqueeze(-1)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, 1-bit packed"


class BinaryLinear(_Latent, nn.Linear):
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
        return _take_over(latent, linear)

    def forward(self, x: Tensor) -> Tensor:
        """`alpha * (x b^T) + bias`: [..., M] -> [..., O]."""
        dtype = _compute_dtype(x, self.weight)
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


class BinaryEmbedding(_Latent, nn.Embedding):
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
        return _take_over(latent, embedding)

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


class PackedLinear(_Packed, nn.Linear):
    """Linear layer with one bit per weight: `y = scale * (x b^T) + bias`.

    Shapes: `weight` uint8 [O, ceil(M / 8)] (see `packing`), `weight_scale` [O], `bias` [O]; input [..., M], output
    [..., O]. With an `input_binarizer`, x are its codes, and y takes their scale too. On a CPU the engine computes it
    (see `kernels`); the reference product unpacks the signs of this one layer for the time of the call.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True, device=None, dtype=None):
        super().__init__(in_features, out_features, bias, device="meta")
        self.register_module("input_binarizer", None)
        self._init_bits(out_features, in_features, device, dtype)
        self._layout, self._layout_of = None, (None,)
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

    def forward(self, x: Tensor) -> Tensor:
        """`scale * (x b^T) + bias`: [..., M] -> [..., O].

        Raises:
            ValueError: x has other than M features.
        """
        if x.shape[-1] != self.in_features:
            raise ValueError(f"expected inputs of {self.in_features} features, got {tuple(x.shape)}.")
        codes = engine_codes(self.input_binarizer) if kernels.serves(x) else None
        if codes is None:
            return self.reference(x)
        layout = None if codes.kind == "float" else self.layout(codes.layout)
        if torch.is_grad_enabled():
            parameters = [parameter for parameter in self.parameters() if parameter.requires_grad]
            if x.requires_grad or parameters:
                return _EngineProduct.apply(self, codes, layout, x, *parameters)
        return kernels.linear(x, self.weight, layout, self.weight_scale, self.bias, codes)

    def layout(self, kind: int) -> Tensor | None:
        """The bits in the order of the kernels: made when they are first needed, never saved, and made anew for other
        bits. None while a compiler traces, where they are made in each call unless the layer ran before."""
        if torch.compiler.is_compiling():
            return self._layout
        weight, (made_of, *state) = self.weight, self._layout_of
        version = 0 if weight.is_inference() else weight._version
        # The tensor itself too: another one can get the address of one that is gone.
        if made_of is not weight or state != [kind, weight.data_ptr(), version]:
            self._layout = kernels.cpu.layout(weight, self.in_features, kind)
            self._layout_of = (weight, kind, weight.data_ptr(), version)
        return self._layout

    def __getstate__(self) -> dict:
        """Copies and pickles make their layouts themselves."""
        return {**self.__dict__, "_layout": None, "_layout_of": (None,)}

    def reference(self, x: Tensor) -> Tensor:
        """What `forward` computes, in floats and with gradients."""
        dtype = _compute_dtype(x, self.weight_scale)
        codes, input_scale = codes_of(x, self.input_binarizer, dtype)
        signs = unpack_signs(self.weight, self.in_features, dtype)
        return _binary_linear(codes, signs, self.weight_scale, self.bias, input_scale, fits_int8(self.input_binarizer))

    def to_float(self) -> nn.Linear:
        """Plain `nn.Linear` with weight `scale * b`."""
        return _float_linear(self)


class PackedEmbedding(_Packed, nn.Embedding):
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


class _EngineProduct(torch.autograd.Function):
    """A packed layer by the engine; the backward pass is that of the reference, computed again."""

    @staticmethod
    def forward(ctx, layer, codes, layout, x, *parameters):
        ctx.layer = layer
        ctx.save_for_backward(x, *parameters)
        return kernels.linear(x, layer.weight, layout, layer.weight_scale, layer.bias, codes)

    @staticmethod
    def backward(ctx, grad):
        x, *parameters = ctx.saved_tensors
        with torch.enable_grad():
            x = x.detach().requires_grad_(ctx.needs_input_grad[3])
            y = ctx.layer.reference(x)
        wanted = [x] * x.requires_grad + parameters
        grads = list(torch.autograd.grad(y, wanted, grad, allow_unused=True))
        return None, None, None, grads.pop(0) if x.requires_grad else None, *grads


LATENT_OF = {nn.Linear: BinaryLinear, nn.Embedding: BinaryEmbedding}
"""The one table of layer types: float class -> latent class."""

PACKED_OF = {nn.Linear: PackedLinear, nn.Embedding: PackedEmbedding}
"""Float class -> packed class."""

LATENT_TYPES = tuple(LATENT_OF.values())
PACKED_TYPES = tuple(PACKED_OF.values())


def _compute_dtype(x: Tensor, weight: Tensor) -> torch.dtype:
    """Type of the product: autocast's where it is on, else that of the float parameters."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype


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


def _take_over(latent, source: nn.Module):
    latent.weight = source.weight
    if getattr(source, "bias", None) is not None:
        latent.bias = source.bias
    latent._init_rule(latent.rule)
    return latent.train(source.training)


def _float_linear(layer) -> nn.Linear:
    linear = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
    linear.weight = nn.Parameter(layer.binary_weight())
    linear.bias = layer.bias
    return linear.train(layer.training)


def _float_embedding(layer) -> nn.Embedding:
    embedding = nn.Embedding(layer.num_embeddings, layer.embedding_dim, layer.padding_idx, device="meta")
    embedding.weight = nn.Parameter(layer.binary_weight())
    return embedding.train(layer.training)
