"""The fused encoder: all layers of a fully binary, packed BERT as one call of the engine.

Between two LayerNorms such a layer is integers, and everything that turns an integer product into a bit (scales, bias,
activation function, threshold) is a function of that integer alone. The limits where the bit changes are found by
evaluating the layer's own modules on every integer the product can be: the fused encoder therefore gives the same bits
as the layers one by one, except where two ways to round a float (LayerNorm, softmax) fall on two sides of a threshold.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

from . import kernels
from .architecture import ENCODERS, EncoderLayout, encoder_of, require_transformers_model
from .attention import BoolAttention, ElasticAttention, recorded
from .binarizers import engine_codes
from .kernels.image import make_image
from .layers import PackedLinear

HARMLESS_HOOKS = ("output_capturing_hook", "_require_implementation")
"""Names of hooks that see nothing in a fused call: transformers' recorder, idle, and a check of `attention`."""

PRODUCTS = 64
"""Integers for which a layer's outputs are evaluated at a time: little memory beside the model's own."""

NEVER = 2**31 - 1
"""A limit that no count reaches."""


def fuse(model: PreTrainedModel, enabled: bool = True) -> str | None:
    """Let the engine compute the encoder of a packed model as one call, or stop it. `pack` and loading do it.

    Calls that need more than the last hidden state (`output_hidden_states`, attentions, gradients, other masks than
    padding), and other devices, go through the layers one by one as before. At padded positions the fused encoder
    gives zeros. Changed parameters and modules are noticed, except through `parameter.data.add_()` and the like, which
    torch does not count: call `fuse` again.

    Args:
        model: packed, with 1-bit activations and attention, of the BERT family.
        enabled: False takes the fused encoder out again.

    Returns:
        None, or why this model cannot be fused; it then works as before.

    Raises:
        TypeError: not a transformers model.
    """
    require_transformers_model(model, "fuse")
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
    """Whether calls of this model can go through the fused encoder.

    Raises:
        TypeError: not a transformers model.
    """
    require_transformers_model(model, "is_fused")
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
        self._made_of: _Fingerprint | None = None

    def __call__(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs):
        """As the encoder's own forward."""
        if self._can_serve(hidden_states, attention_mask, kwargs):
            image = self.image()
            if image is not None and not self._watched():
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
        if self._made_of is None or not self._made_of.holds():
            made_of = _Fingerprint(self.encoder)
            self._image = self._make_image()
            self._made_of = made_of  # last, so that no other thread takes the old image for the new one
        return self._image

    def __getstate__(self) -> dict:
        """Copies and pickles make their images themselves."""
        return {**self.__dict__, "_image": None, "_made_of": None}

    def _make_image(self) -> Tensor | None:
        try:
            self.check()
            with torch.no_grad():
                layers = [_fields(block, self.layout, self.config) for block in self.encoder.layer]
        except NotFusableError:
            return None
        first = self.layout.of(self.encoder.layer[0])
        width, inner = first.query.in_features, first.inner.out_features
        image = make_image(width, self.config.num_attention_heads, inner, layers)
        del layers
        kernels.cpu.put_aside(module.weight for module in self.encoder.modules() if type(module) is PackedLinear)
        kernels.cpu.give_back_memory()
        return image

    def _can_serve(self, hidden: Tensor, mask: Tensor | None, kwargs: dict) -> bool:
        if self.encoder.training or not kernels.serves(hidden) or self._differentiable(hidden):
            return False
        if hidden.shape[1] > self.config.max_position_embeddings or kwargs.get("past_key_values") is not None:
            return False
        if kwargs.get("encoder_hidden_states") is not None:
            return False
        return torch.compiler.is_compiling() or mask is None or kernels.is_padding(mask, hidden.shape[1])

    def _differentiable(self, hidden: Tensor) -> bool:
        if not torch.is_grad_enabled():
            return False
        return hidden.requires_grad or any(parameter.requires_grad for parameter in self.encoder.parameters())

    def _watched(self) -> bool:
        """Whether something happens between the layers: transformers' recorder, a user's hook, dropout by itself."""
        if recorded("hidden_states", "attentions") or _global_forward_hooks or _global_forward_pre_hooks:
            return True
        hooks = (hook for registry in self._made_of.hooks if registry for hook in registry.values())
        if any(getattr(hook, "__name__", None) not in HARMLESS_HOOKS for hook in hooks):
            return True
        return any(module.training for module in self._made_of.modules)


class _Fingerprint:
    """What an encoder consists of, to see that a module was replaced or a tensor changed; looked at in every call."""

    def __init__(self, encoder: nn.Module):
        modules = list(encoder.modules())
        self.hooks = [registry for m in modules[1:] for registry in (m._forward_hooks, m._forward_pre_hooks)]
        self.modules = [m for m in modules if not isinstance(m, nn.ModuleList)]  # a shortened one is new: "in training"
        owned = [part for m in modules for part in (m._parameters, m._buffers, m._modules)]
        self._places = [(parts, name) for parts in owned for name in parts]
        self._parts = [parts[name] for parts, name in self._places]  # kept, so that no other one gets their ids
        self._ids = [id(part) for part in self._parts]
        self._tensors = [part for part in self._parts if isinstance(part, Tensor) and not part.is_inference()]
        self._versions = [tensor._version for tensor in self._tensors]

    def holds(self) -> bool:
        """Whether everything is as it was."""
        same = [id(parts.get(name)) for parts, name in self._places] == self._ids
        return same and [tensor._version for tensor in self._tensors] == self._versions


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
    _require(attention.fits_engine(head, head**-0.5), f"the attention of {where} is not 1-bit, or its scores too wide.")
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
    fields["table"], fields["threshold"], context_scale = attention.engine_parts(head, head**-0.5)
    fields["context"] = _context_limits(parts.output, context_scale, config.max_position_embeddings)
    fields["inner_unsigned"] = torch.tensor(
        [int(engine_codes(parts.outer.input_binarizer).kind == "levels")], dtype=torch.int32
    )
    fields |= _float_projection("output", parts.output, parts.output_norm)
    fields |= _float_projection("outer", parts.outer, parts.outer_norm)
    return fields


def _bit_projection(name: str, linear: PackedLinear, is_set: Callable[[Tensor], Tensor]) -> dict[str, Tensor | None]:
    codes = engine_codes(linear.input_binarizer)
    few, many = _limits(linear, is_set)
    return {
        f"{name}_shift": None if codes.shift is None else codes.shift.float(),
        f"{name}_layout": kernels.cpu.layout(linear.weight, linear.in_features, kernels.cpu.WORDS),
        f"{name}_few": few,
        f"{name}_many": many,
    }


def _limits(linear: PackedLinear, is_set: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """How many mismatches of input bits with weight bits make an output bit 1: at most `few`, or at least `many`.

    Args:
        linear: the layer; m mismatches are a product of M - 2 m.
        is_set: the bits [..., O] that values [..., O] of the layer become.

    Returns:
        Two int32 tensors [O rounded up to 16]; bits beyond O are never 1.

    Raises:
        NotFusableError: the bit changes more than twice.
    """
    products = linear.in_features - 2 * torch.arange(linear.in_features + 1, dtype=torch.int32)
    limits = _ends(torch.cat([is_set(_values(linear, some)) for some in products.split(PRODUCTS)]).t())
    extra = -linear.out_features % 16
    return tuple(nn.functional.pad(limit, (0, extra), value=v) for limit, v in zip(limits, (-1, NEVER), strict=True))


def _values(linear: PackedLinear, products: Tensor) -> Tensor:
    """The layer's outputs [P, O] for integer products [P]."""
    scale = engine_codes(linear.input_binarizer).scale
    scale = linear.weight_scale.float() * (1.0 if scale is None else scale.float())
    values = products.float().unsqueeze(1) * scale
    return values if linear.bias is None else values + linear.bias.float()


def _ends(bits: Tensor) -> tuple[Tensor, Tensor]:
    """Of each row of bits [O, P]: the index where its first run of ones ends (-1: none), and where a last one begins.

    Raises:
        NotFusableError: ones are elsewhere too.
    """
    count = bits.shape[1]
    leading = torch.where(bits.all(1), count, bits.byte().argmin(1))
    trailing = torch.where(bits.all(1), count, bits.flip(1).byte().argmin(1))
    few = (leading - 1).int()
    many = torch.where((leading == count) | (trailing == 0), NEVER, count - trailing).int()
    index = torch.arange(count, dtype=torch.int32)
    reached = (index <= few.unsqueeze(1)) | (index >= many.unsqueeze(1))
    _require(bool((reached == bits).all()), "the activation function makes bits that change more than twice.")
    return few, many


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


def _context_limits(linear: PackedLinear, scale: Tensor, longest: int) -> Tensor:
    """The smallest sum over attended values that sets each input bit of a layer, int32 [M]."""
    sums = torch.arange(longest, -longest - 1, -1, dtype=torch.int32)
    context = (sums.float() * scale.float()).unsqueeze(1).expand(-1, linear.in_features)
    few, _ = _ends((linear.input_binarizer(context)[0] > 0).t())
    return torch.where(few < 0, NEVER, longest - few).int()
