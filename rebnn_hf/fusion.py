"""The fused encoder: all layers of a fully binary, packed BERT as one call of the engine.

Between two LayerNorms such a layer is integers, and everything that turns an integer product into a bit (scales, bias,
activation function, threshold) is a function of that integer alone. The limits where the bit changes are found by
evaluating the layer's own modules on every integer the product can be: the fused encoder therefore gives the same bits
as the layers one by one, except where two ways to round a float (LayerNorm, softmax) fall on two sides of a threshold.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions
from transformers.utils.output_capturing import _active_collector

from . import kernels
from .architecture import ENCODERS, EncoderLayout, encoder_of
from .attention import BoolAttention, ElasticAttention
from .binarizers import engine_codes
from .kernels.image import make_image
from .layers import PackedLinear

LARGEST_EXPONENT = 80.0
"""Scores may differ by so much before exp() of them leaves the range of a float."""

NEVER, ALWAYS = 2**31 - 1, -(2**31)
ROWS = 256
"""Outputs whose limits are found at a time."""


def fuse(model: PreTrainedModel, enabled: bool = True) -> str | None:
    """Let the engine compute the encoder of a packed model as one call, or stop it. `pack` and loading do it.

    Calls that need more than the last hidden state (`output_hidden_states`, attentions, gradients, other masks than
    padding), and other devices, go through the layers one by one as before. At padded positions the fused encoder
    gives zeros.

    Args:
        model: packed, with 1-bit activations and attention, of the BERT family.
        enabled: False takes the fused encoder out again.

    Returns:
        None, or why this model cannot be fused; it then works as before.
    """
    encoder = encoder_of(model)
    if encoder is None:
        return f"{model.config.model_type!r} is not among {', '.join(ENCODERS)}."
    encoder.__dict__.pop("forward", None)
    if not enabled:
        return None
    fused = FusedForward(encoder, ENCODERS[model.config.model_type], model.config)
    try:
        fused.check()
    except NotFusableError as reason:
        return str(reason)
    encoder.forward = fused
    return None


def is_fused(model: PreTrainedModel) -> bool:
    """Whether calls of this model can go through the fused encoder."""
    encoder = encoder_of(model)
    return encoder is not None and isinstance(encoder.__dict__.get("forward"), FusedForward)


class NotFusableError(ValueError):
    """A model whose encoder has something that the fused one does not compute."""


class FusedForward:
    """The `forward` of a fused encoder; it belongs to the encoder it was made for.

    Args:
        encoder: the module that holds the layers.
        layout: names inside of it.
        config: of the model.
    """

    def __init__(self, encoder: nn.Module, layout: EncoderLayout, config):
        self.encoder, self.layout, self.config = encoder, layout, config
        self._image: Tensor | None = None
        self._made_of: list[tuple[dict, str, nn.Module | Tensor | None, int]] = []

    def __call__(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs):
        """As the encoder's own forward."""
        if self._can_serve(hidden_states, attention_mask, kwargs):
            image = self.image()
            if image is not None and not self._inner_outputs_wanted():
                last = kernels.encoder(hidden_states, attention_mask, image)
                return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=last)
        return type(self.encoder).forward(self.encoder, hidden_states, attention_mask, **kwargs)

    def check(self) -> None:
        """Look at every layer.

        Raises:
            NotFusableError: something in it is not as the fused encoder computes it.
        """
        if getattr(self.config, "is_decoder", False) or getattr(self.config, "add_cross_attention", False):
            raise NotFusableError("it is a decoder, or has cross-attention.")
        if not len(self.encoder.layer):
            raise NotFusableError("it has no layers.")
        for index, block in enumerate(self.encoder.layer):
            _check_block(f"layer {index}", block, self.layout)

    def image(self) -> Tensor | None:
        """What the engine needs of all layers, made when it is first needed and anew when a tensor changed.

        None while a compiler traces a model that never ran, or when the layers are not what they were.
        """
        if torch.compiler.is_compiling():
            return self._image
        if not self._made_of or not all(
            owner.get(name) is part and _version(part) == version for owner, name, part, version in self._made_of
        ):
            self._made_of = list(_parts(self.encoder))
            self._image = self._make_image()
        return self._image

    def _make_image(self) -> Tensor | None:
        try:
            self.check()
        except NotFusableError:
            return None
        with torch.no_grad():
            layers = [_fields(block, self.layout, self.config) for block in self.encoder.layer]
        first = self.layout.of(self.encoder.layer[0])
        width, inner = first.query.in_features, first.inner.out_features
        return make_image(width, self.config.num_attention_heads, inner, layers)

    def _can_serve(self, hidden: Tensor, mask: Tensor | None, kwargs: dict) -> bool:
        differentiable = torch.is_grad_enabled() and hidden.requires_grad
        if self.encoder.training or differentiable or not kernels.serves(hidden):
            return False
        if hidden.shape[1] > self.config.max_position_embeddings or kwargs.get("past_key_values") is not None:
            return False
        if kwargs.get("encoder_hidden_states") is not None:
            return False
        return torch.compiler.is_compiling() or mask is None or _is_padding(mask, hidden.shape[1])

    def _inner_outputs_wanted(self) -> bool:
        """Whether someone wants to see what happens between the layers: transformers' recorder, or a user's hook."""
        collected = _active_collector.get()
        if collected and any(key in collected for key in ("hidden_states", "attentions")):
            return True
        hooked = (part._forward_hooks for _, _, part, _ in self._made_of if isinstance(part, nn.Module))
        return any(hook.__name__ != "output_capturing_hook" for hooks in hooked if hooks for hook in hooks.values())


def _is_padding(mask: Tensor, length: int) -> bool:
    try:
        kernels.padding_mask(mask, length)
    except ValueError:
        return False
    return True


def _parts(module: nn.Module) -> Iterator[tuple[dict, str, nn.Module | Tensor | None, int]]:
    """Everything inside a module, with where it is kept and its version: what to look at to see that it changed."""
    for owned in (module._parameters, module._buffers, module._modules):
        for name, part in owned.items():
            yield owned, name, part, _version(part)
            if isinstance(part, nn.Module):
                yield from _parts(part)


def _version(part: nn.Module | Tensor | None) -> int:
    return part._version if isinstance(part, Tensor) and not part.is_inference() else 0


# What a layer must be


def _require(condition: bool, reason: str) -> None:
    if not condition:
        raise NotFusableError(reason)


def _check_block(where: str, block: nn.Module, layout: EncoderLayout) -> None:
    parts = layout.of(block)
    for name in ("query", "key", "value", "output", "inner", "outer"):
        linear = getattr(parts, name)
        _require(type(linear) is PackedLinear, f"{name} of {where} is a {type(linear).__name__}, not a packed layer.")
        codes = engine_codes(linear.input_binarizer)
        fits = codes is not None and codes.width == 1 and (codes.kind == "sign" or name == "outer")
        _require(fits, f"the inputs of {name} of {where} are not 1-bit.")
    attention = getattr(parts.attention, "binary_attention", None)
    _require(isinstance(attention, BoolAttention | ElasticAttention), f"the attention of {where} is not 1-bit.")
    head = parts.query.out_features // parts.heads
    _require(head % 16 == 0 and head <= 240, f"heads of {head} features; the engine needs a multiple of 16 up to 240.")
    if isinstance(attention, ElasticAttention):
        _require(attention.query.bits == 1, f"the attention of {where} is not 1-bit.")
        spread = 2 * head * _score_scale(attention, head).item()
        _require(spread <= LARGEST_EXPONENT, f"the scores of {where} range over {spread:.3g}, too far for a table.")
    for norm in (parts.output_norm, parts.outer_norm):
        _require(type(norm) is nn.LayerNorm and norm.elementwise_affine, f"a norm of {where} is not a plain LayerNorm.")


# What the engine needs of a layer


def _fields(block: nn.Module, layout: EncoderLayout, config) -> dict[str, Tensor | None]:
    """The fields of `image.FIELDS`."""
    parts = layout.of(block)
    attention = parts.attention.binary_attention
    head = parts.query.out_features // parts.heads
    fields: dict[str, Tensor | None] = {}
    for name in ("query", "key", "value"):
        binarizer = getattr(attention, name)
        fields |= _bit_projection(name, getattr(parts, name), lambda y, b=binarizer: b(y)[0] > 0)
    fields |= _bit_projection("inner", parts.inner, lambda y: parts.outer.input_binarizer(parts.activation(y))[0] > 0)
    fields |= _attention_fields(attention, head)
    fields["context"] = _context_limits(parts.output, _context_scale(attention), config.max_position_embeddings)
    fields["inner_unsigned"] = torch.tensor(
        [int(engine_codes(parts.outer.input_binarizer).kind == "levels")], dtype=torch.int32
    )
    fields |= _float_projection("output", parts.output, parts.output_norm)
    fields |= _float_projection("outer", parts.outer, parts.outer_norm)
    return fields


def _bit_projection(name: str, linear: PackedLinear, is_set: Callable[[Tensor], Tensor]) -> dict[str, Tensor | None]:
    codes = engine_codes(linear.input_binarizer)
    high, low = _limits(linear, is_set)
    return {
        f"{name}_shift": None if codes.shift is None else codes.shift.float(),
        f"{name}_layout": kernels.cpu.layout(linear.weight, linear.in_features, kernels.cpu.WORDS),
        f"{name}_high": _padded(high, NEVER),
        f"{name}_low": _padded(low, ALWAYS),
    }


def _limits(linear: PackedLinear, is_set: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """Where the bit of each output is 1: products of at least `high` [O], or at most `low` [O], int32.

    Args:
        linear: the layer.
        is_set: the bits [..., O] that values [..., O] of the layer become.

    Raises:
        NotFusableError: the bit changes more than twice.
    """
    inputs, outputs = linear.in_features, linear.out_features
    products = torch.arange(-inputs, inputs + 1, 2, dtype=torch.int32)
    bits = is_set(_values(linear, products))
    return _ends(products, bits.t()) if outputs else (products[:0], products[:0])


def _values(linear: PackedLinear, products: Tensor) -> Tensor:
    """The layer's outputs [P, O] for integer products [P]."""
    scale = engine_codes(linear.input_binarizer).scale
    scale = linear.weight_scale.float() * (1.0 if scale is None else scale.float())
    values = products.float().unsqueeze(1) * scale
    return values if linear.bias is None else values + linear.bias.float()


def _ends(products: Tensor, bits: Tensor) -> tuple[Tensor, Tensor]:
    """Of each row of bits [O, P] at rising products [P]: where its last run of ones begins and its first one ends."""
    from_end = bits.flip(1).cummin(1).values.sum(1)
    from_start = torch.where(from_end == len(products), 0, bits.cummin(1).values.sum(1))
    padded = torch.cat([products, products.new_tensor([NEVER])])
    high = padded[len(products) - from_end]
    low = torch.where(from_start > 0, products[(from_start - 1).clamp_min(0)], ALWAYS)
    reached = (products >= high.unsqueeze(1)) | (products <= low.unsqueeze(1))
    _require(bool((reached == bits).all()), "the activation function makes bits that change more than twice.")
    return high, low


def _padded(limits: Tensor, filler: int) -> Tensor:
    return nn.functional.pad(limits, (0, -len(limits) % 16), value=filler).to(torch.int32)


def _float_projection(name: str, linear: PackedLinear, norm: nn.LayerNorm) -> dict[str, Tensor]:
    scale = engine_codes(linear.input_binarizer).scale
    scale = linear.weight_scale.float() * (1.0 if scale is None else scale.float())
    bias = torch.zeros(linear.out_features) if linear.bias is None else linear.bias.float()
    norm_bias = torch.zeros(linear.out_features) if norm.bias is None else norm.bias.float()
    return {
        f"{name}_layout": kernels.cpu.layout(linear.weight, linear.in_features, kernels.cpu.WORDS),
        f"{name}_scale": scale,
        f"{name}_bias": bias,
        f"{name}_norm_weight": norm.weight.float(),
        f"{name}_norm_bias": norm_bias,
        f"{name}_eps": torch.tensor([norm.eps], dtype=torch.float32),
    }


def _score_scale(attention: ElasticAttention, head: int) -> Tensor:
    return attention.query.positive_scale() * attention.key.positive_scale() * head**-0.5


def _attention_fields(attention: nn.Module, head: int) -> dict[str, Tensor | None]:
    """exp(score) by the number of bits in which query and key differ, and the share of the sum that counts."""
    if isinstance(attention, BoolAttention):
        return {"table": None, "threshold": torch.zeros(1)}
    scores = (head - 2 * torch.arange(head + 1)).float() * _score_scale(attention, head).float()
    return {"table": (scores - scores[0]).exp(), "threshold": _smallest_counted(attention.probabilities)}


def _smallest_counted(probabilities: nn.Module) -> Tensor:
    """The smallest probability [1] whose code is 1."""
    guess = (probabilities.positive_scale().float() / 2).view(torch.int32)
    near = (guess + torch.arange(-8, 9, dtype=torch.int32)).view(torch.float32)
    return near[probabilities(near)[0] > 0][:1].clone()


def _context_scale(attention: nn.Module) -> Tensor:
    if isinstance(attention, BoolAttention):
        return torch.ones(1)
    return attention.probabilities.positive_scale() * attention.value.positive_scale()


def _context_limits(linear: PackedLinear, scale: Tensor, longest: int) -> Tensor:
    """The smallest sum over attended values that sets each input bit of a layer, int32 [M]."""
    sums = torch.arange(-longest, longest + 1, dtype=torch.int32)
    context = (sums.float() * scale.float()).unsqueeze(1).expand(-1, linear.in_features)
    high, _ = _ends(sums, (linear.input_binarizer(context)[0] > 0).t())
    return high
