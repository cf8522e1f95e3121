"""Layers in their two states: same outputs, gradients of the equations, parameters taken over."""

import pytest
import torch
from torch import nn

from rebnn_hf import activations
from rebnn_hf.activations import ActivationRule
from rebnn_hf.binarizers import Elastic, binarizer_of
from rebnn_hf.functional import WeightRule
from rebnn_hf.layers import BinaryEmbedding, BinaryLinear, PackedEmbedding, PackedLinear

RULES = [
    WeightRule(),
    WeightRule(granularity="tensor", center="row"),
    WeightRule(scale="mean_abs"),
    WeightRule(scale="mean_abs", granularity="tensor", center="tensor", center_gradient=False, ste="identity"),
]
WIDTHS = [1, 3, 8, 33, 64, 127]


def linear(width, rows=5, dtype=torch.float64):
    torch.manual_seed(width)
    return nn.Linear(width, rows, dtype=dtype)


def explicit_weight(weight, rule):
    """alpha * sign(W - mu), written out."""
    mu = {"none": 0.0, "row": weight.mean(-1, keepdim=True), "tensor": weight.mean()}[rule.center]
    alpha = weight.abs().mean(-1, keepdim=True) if rule.granularity == "row" else weight.abs().mean()
    return alpha * torch.where(weight - mu >= 0, 1.0, -1.0).to(weight.dtype)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("width", WIDTHS)
def test_linear_is_alpha_times_sign_in_both_states(rule, width):
    source = linear(width)
    x = torch.randn(2, 3, width, dtype=torch.float64)
    expected = x @ explicit_weight(source.weight, rule).T + source.bias
    latent = BinaryLinear.from_float(source, rule)
    torch.testing.assert_close(latent(x), expected)
    packed = latent.pack()
    assert packed.weight.dtype == torch.uint8 and packed.weight.shape == (5, (width + 7) // 8)
    assert torch.equal(packed(x), latent(x))
    torch.testing.assert_close(packed.to_float()(x), expected)
    torch.testing.assert_close(latent.to_float()(x), expected)


@pytest.mark.parametrize("rule", RULES)
def test_embedding_is_alpha_times_sign_in_both_states(rule):
    torch.manual_seed(0)
    source = nn.Embedding(11, 13, padding_idx=0, dtype=torch.float64)
    indices = torch.tensor([[1, 10, 0], [3, 3, 5]])
    expected = explicit_weight(source.weight, rule)[indices]
    latent = BinaryEmbedding.from_float(source, rule)
    torch.testing.assert_close(latent(indices), expected, atol=1e-7, rtol=1e-7)  # the padding row's scale floor
    packed = latent.pack()
    assert torch.equal(packed(indices), latent(indices))
    assert packed.weight.shape == (11, 2)
    torch.testing.assert_close(packed.to_float()(indices), latent(indices))


def test_embedding_gradients_are_those_of_the_whole_table():
    """Gathering rows before the sign gives the gradients of looking up in the binarized table."""
    torch.manual_seed(1)
    latent = BinaryEmbedding(7, 5, rule=WeightRule(), dtype=torch.float64)
    indices = torch.tensor([1, 4, 4, 0])
    upstream = torch.randn(4, 5, dtype=torch.float64)
    latent(indices).backward(upstream)
    weight = latent.weight.detach().clone().requires_grad_()
    alpha = latent.weight_scale.detach().clone().requires_grad_()
    clipped = weight.clamp(-1, 1)
    table = alpha.unsqueeze(-1) * (clipped + (torch.where(weight >= 0, 1.0, -1.0) - clipped).detach())
    nn.functional.embedding(indices, table).backward(upstream)
    torch.testing.assert_close(latent.weight.grad, weight.grad)
    torch.testing.assert_close(latent.weight_scale.grad, alpha.grad)


def test_padding_row_gets_no_gradient_and_a_positive_scale():
    latent = BinaryEmbedding.from_float(nn.Embedding(4, 3, padding_idx=0), WeightRule())
    latent(torch.tensor([0, 2])).sum().backward()
    assert latent.weight.grad[0].abs().sum() == 0 and latent.weight.grad[2].abs().sum() > 0
    assert latent.weight_scale.grad[0] == 0
    assert latent.weight_scale[0].item() == pytest.approx(1e-8)


def test_parameters_are_taken_over_not_copied():
    source = linear(6)
    latent = BinaryLinear.from_float(source, WeightRule())
    assert latent.weight is source.weight and latent.bias is source.bias
    assert latent.pack().bias is source.bias
    assert {name for name, _ in latent.named_parameters()} == {"weight", "bias", "weight_scale"}
    assert torch.equal(latent.weight_scale.detach(), source.weight.detach().abs().mean(-1))
    assert set(latent.state_dict()) == {"weight", "bias", "weight_scale", "balance"}
    assert set(latent.pack().state_dict()) == {"weight", "bias", "weight_scale"}


def test_closed_form_layer_has_no_scale_parameter():
    latent = BinaryLinear.from_float(linear(6), WeightRule(scale="mean_abs"))
    assert {name for name, _ in latent.named_parameters()} == {"weight", "bias"}
    with torch.no_grad():
        latent.weight.mul_(3)
    assert torch.equal(latent.scale(), latent.weight.detach().abs().mean(-1))


def test_packed_layer_is_a_linear_layer_without_float_weights():
    packed = BinaryLinear.from_float(linear(16, 8, torch.float32), WeightRule()).pack()
    assert isinstance(packed, nn.Linear) and isinstance(packed, PackedLinear)
    assert sum(t.numel() * t.element_size() for t in packed.state_dict().values()) == 8 * 2 + 8 * 4 + 8 * 4
    assert isinstance(BinaryEmbedding(3, 9).pack(), PackedEmbedding | nn.Embedding)


def test_gradient_flows_through_a_packed_layer():
    latent = BinaryLinear.from_float(linear(9), WeightRule())
    x = torch.randn(4, 9, dtype=torch.float64, requires_grad=True)
    latent(x).square().sum().backward()
    expected, x.grad = x.grad.clone(), None
    latent.pack()(x).square().sum().backward()
    torch.testing.assert_close(x.grad, expected)


def test_autocast_keeps_the_reduced_type_and_exact_signs():
    latent = BinaryLinear.from_float(linear(64, 32, torch.float32), WeightRule())
    x = torch.randn(8, 64)
    with torch.autocast("cpu", torch.bfloat16):
        latent_out, packed_out = latent(x), latent.pack()(x)
    assert latent_out.dtype == torch.bfloat16
    assert torch.equal(latent_out, packed_out)
    # bf16 rounds inputs, scales and outputs (2^-9 each) but not the signs.
    bound = 3 * 2**-9 * (x.abs() @ latent.binary_weight().abs().T + latent.bias.abs())
    assert ((latent_out.float() - latent(x)).abs() <= bound).all()
    latent_out.float().sum().backward()
    assert latent.weight.grad.dtype == torch.float32


def test_a_float_checkpoint_loads_unchanged():
    source = linear(10)
    latent = BinaryLinear(10, 5, dtype=torch.float64)
    result = latent.load_state_dict(source.state_dict(), strict=False)
    assert set(result.missing_keys) == {"weight_scale", "balance"} and not result.unexpected_keys
    assert torch.equal(latent.weight, source.weight)


def test_compiled_layer_gives_the_same_gradients():
    latent = BinaryLinear.from_float(linear(12, dtype=torch.float32), WeightRule())
    x = torch.randn(3, 12)
    latent(x).square().sum().backward()
    expected = latent.weight.grad.clone(), latent.weight_scale.grad.clone()
    latent.zero_grad()
    torch.compile(latent, backend="aot_eager", fullgraph=True)(x).square().sum().backward()
    torch.testing.assert_close((latent.weight.grad, latent.weight_scale.grad), expected)


ACTIVATIONS = [
    ActivationRule("sign", 1),
    ActivationRule("rsign", 1),
    ActivationRule("elastic", 1),
    ActivationRule("elastic", 4),
    ActivationRule("elastic", 8),
    ActivationRule("token", 8),
]


def few_bit_layer(rule, signed=True):
    """A layer with few-bit inputs, ready to run, and inputs for it."""
    latent = BinaryLinear.from_float(linear(33, dtype=torch.float32), WeightRule())
    latent.input_binarizer = binarizer_of(rule, 33, signed)
    x = torch.randn(3, 33)
    if isinstance(latent.input_binarizer, Elastic):
        latent.input_binarizer.calibrate(x)
    return latent, x.requires_grad_()


def outputs_and_gradients(call, latent, x):
    latent.zero_grad()
    x.grad = None
    out = call(x)
    out.square().sum().backward()
    return [out.detach(), x.grad, *(parameter.grad for parameter in latent.parameters())]


@pytest.mark.parametrize("rule", ACTIVATIONS)
def test_compiled_layer_with_few_bit_inputs_gives_the_same_gradients(rule):
    latent, x = few_bit_layer(rule)
    expected = outputs_and_gradients(latent, latent, x)
    torch.compiler.reset()  # each rule is other code, of which the compiler keeps only so many versions
    compiled = torch.compile(latent, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(outputs_and_gradients(compiled, latent, x), expected)


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("rule", ACTIVATIONS)
def test_few_bit_products_do_not_depend_on_the_cpu(rule, signed, monkeypatch):
    """Codes 0 to 255 do not fit into 8 bits with a sign: that layer must multiply floats."""
    latent, x = few_bit_layer(rule, signed)
    results = []
    for fast in (True, False):
        monkeypatch.setattr(activations, "INT8_PRODUCTS", fast)
        results.append(outputs_and_gradients(latent, latent, x))
        packed = latent.pack()
        assert torch.equal(packed.reference(x), results[-1][0])
        torch.testing.assert_close(packed(x), results[-1][0])  # the engine rounds scale and bias by itself
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*results, strict=True))


def test_resizing_a_binary_embedding_is_refused_in_words():
    latent = BinaryEmbedding(4, 3)
    latent.weight = nn.Parameter(torch.zeros(6, 3))
    with pytest.raises(ValueError, match=r"resized from 4 to 6 tokens.*on the float model"):
        latent(torch.tensor([5]))


def test_half_precision_does_not_overflow_where_the_float_layer_does_not():
    """The sum of 768 inputs of 100 passes 65504; scaled by 0.03 it does not."""
    latent = BinaryLinear(768, 1, bias=False, dtype=torch.float16)
    with torch.no_grad():
        latent.weight.fill_(0.03)
    latent.reset_scale()
    x = torch.full((1, 768), 100.0, dtype=torch.float16)
    expected = torch.tensor([[768 * 100 * 0.03]], dtype=torch.float16)
    torch.testing.assert_close(latent(x), expected, rtol=2e-3, atol=0)
    assert torch.equal(latent(x), latent.pack()(x))


def test_a_frozen_layer_has_a_frozen_scale():
    source = linear(6).requires_grad_(False)
    latent = BinaryLinear.from_float(source, WeightRule())
    assert not any(parameter.requires_grad for parameter in latent.parameters())
