"""Inputs and types at the edges of what numbers are: the engine gives what the reference gives, or refuses."""

import copy

import pytest
import torch
import transformers as hf
from operators import Recorded

import rebnn_hf
from rebnn_hf import ReBNNConfig, binarize, calibrate, fuse, is_fused, pack
from rebnn_hf.kernels import cpu, use_backend
from rebnn_hf.layers import PackedLinear

pytestmark = pytest.mark.skipif(not cpu.available(), reason=cpu.why_not() or "it is there")
LONGEST = 24
SIZES = dict(vocab_size=40, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48)
METHODS = {
    "w1a32": ReBNNConfig.preset("rebnn-w1a32"),
    "w1a1": ReBNNConfig.preset("rebnn-bit-w1a1"),
    "bibert": ReBNNConfig.preset("rebnn-bibert-w1a1"),
    "w1a8": ReBNNConfig(activation="token"),
    "w1a4": ReBNNConfig(activation="elastic", activation_bits=4),
}
SPECIAL = {"nan": float("nan"), "inf": float("inf"), "-inf": -float("inf")}


def make(method, dtype=None):
    torch.manual_seed(0)
    config = hf.BertConfig(**SIZES, max_position_embeddings=LONGEST)
    model = binarize(hf.BertForSequenceClassification(config).eval(), copy.deepcopy(METHODS[method]))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    calibrate(model, {"input_ids": torch.arange(32).reshape(2, 16)})
    return pack(model, dtype)


@pytest.fixture(scope="module")
def models():
    """One packed model for each method, made when it is first asked for."""
    made = {}
    return lambda method: made.setdefault(method, make(method))


@torch.no_grad()
def three_ways(model, **inputs):
    """Logits by the fused encoder where there is one, by the layers, and by the reference."""
    fuse(model)
    with use_backend("cpu"):
        fused = model(**inputs).logits
    fuse(model, False)
    try:
        with use_backend("cpu"), Recorded() as ops:
            layered = model(**inputs).logits
        with use_backend("reference"):
            reference = model(**inputs).logits
    finally:
        fuse(model)
    assert "rebnn::encoder" not in ops.names
    return fused, layered, reference


def check_equal(model, tolerance=1e-4, **inputs):
    fused, layered, reference = three_ways(model, **inputs)
    torch.testing.assert_close(layered, reference, rtol=tolerance, atol=tolerance, equal_nan=True)
    torch.testing.assert_close(fused, reference, rtol=tolerance, atol=tolerance, equal_nan=True)
    return reference


# NaN and infinity


@pytest.mark.parametrize("value", SPECIAL)
@pytest.mark.parametrize("method", METHODS)
def test_special_values_in_the_inputs(models, method, value):
    """In one number of one token, and in all of another sequence: three ways to the same answer, and the third sequence
    gets the answer it gets alone."""
    model = models(method)
    embeds = torch.randn(3, 8, 32, generator=torch.Generator().manual_seed(1))
    alone = check_equal(model, inputs_embeds=embeds[2:])
    embeds[0, 3, 5] = SPECIAL[value]
    embeds[1] = SPECIAL[value]
    together = check_equal(model, inputs_embeds=embeds)
    torch.testing.assert_close(together[2:], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("value", SPECIAL)
@pytest.mark.parametrize("method", METHODS)
def test_special_values_in_one_layer(models, method, value):
    """Without a LayerNorm before it, which turns an infinity into NaN."""
    layers = [m for m in models(method).modules() if isinstance(m, PackedLinear)]
    for layer in (layers[0], layers[5]):
        x = torch.randn(7, layer.in_features, generator=torch.Generator().manual_seed(2))
        x[1, 3], x[2] = SPECIAL[value], SPECIAL[value]
        with torch.no_grad(), use_backend("cpu"):
            y = layer(x)
        with torch.no_grad():
            torch.testing.assert_close(y, layer.reference(x), rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("method", METHODS)
def test_the_largest_and_the_smallest_numbers(models, method):
    layer = next(m for m in models(method).modules() if isinstance(m, PackedLinear))
    for size in (1e-45, 1e-38, 1e30):
        x = size * torch.randn(5, layer.in_features, generator=torch.Generator().manual_seed(3))
        with torch.no_grad(), use_backend("cpu"):
            y = layer(x)
        with torch.no_grad():
            torch.testing.assert_close(y, layer.reference(x), rtol=1e-5, atol=1e-5)


# Lengths


@pytest.mark.parametrize("shape", [(0, 5, 32), (2, 0, 32), (0, 32)])
@pytest.mark.parametrize("method", METHODS)
def test_layers_of_no_rows(models, method, shape):
    """(Whole models of no sequences are refused by transformers' own attention.)"""
    layer = next(m for m in models(method).modules() if isinstance(m, PackedLinear))
    with torch.no_grad(), use_backend("cpu"):
        y = layer(torch.empty(shape))
    assert y.shape == layer.reference(torch.empty(shape)).shape == (*shape[:-1], layer.out_features)


@pytest.mark.parametrize("shape", [(1, 1), (3, LONGEST)])
@pytest.mark.parametrize("method", METHODS)
def test_one_token_and_the_longest_sequence(models, method, shape):
    ids = torch.arange(shape[0] * shape[1]).reshape(shape) % 40
    assert check_equal(models(method), input_ids=ids, attention_mask=torch.ones_like(ids)).shape == (shape[0], 2)


@pytest.mark.parametrize("method", METHODS)
def test_more_tokens_than_positions_are_refused(models, method):
    ids = torch.zeros(1, LONGEST + 1, dtype=torch.long)
    for backend in ("cpu", "reference"):
        with use_backend(backend), pytest.raises((IndexError, RuntimeError, ValueError)):
            models(method)(input_ids=ids)


@pytest.mark.parametrize("method", METHODS)
def test_sequences_without_a_token(models, method):
    """Padding alone beside ordinary sequences: the ordinary ones get their answers, and no row becomes NaN."""
    ids = torch.arange(24).reshape(3, 8)
    mask = torch.ones_like(ids)
    mask[1], mask[2, 5:] = 0, 0
    fused, layered, reference = three_ways(models(method), input_ids=ids, attention_mask=mask)
    for logits in (fused, layered):
        torch.testing.assert_close(logits[[0, 2]], reference[[0, 2]], rtol=1e-4, atol=1e-4)
        assert logits.isfinite().all()
    if method != "w1a1":  # whose probabilities are all the same there: a matter of rounding
        torch.testing.assert_close(layered[1], reference[1], rtol=1e-4, atol=1e-4)


def test_a_sequence_without_a_token_comes_out_of_the_fused_encoder_as_zeros(models):
    model = models("w1a1")
    assert is_fused(model)
    ids, mask = torch.arange(16).reshape(2, 8), torch.ones(2, 8, dtype=torch.long)
    mask[1] = 0
    with torch.no_grad(), use_backend("cpu"):
        states = model.bert(input_ids=ids, attention_mask=mask).last_hidden_state
        ordinary = model.bert(input_ids=ids[:1], attention_mask=mask[:1]).last_hidden_state
    assert (states[1] == 0).all()
    assert torch.equal(states[:1], ordinary)


# Types


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("method", ["w1a32", "w1a8", "w1a4"])
def test_models_of_another_type(method, dtype):
    """A value near a threshold may get another code where it is rounded elsewhere; with float inputs there are none."""
    model = make(method, dtype)
    ids = torch.arange(16).reshape(2, 8)
    fused, layered, reference = three_ways(model, input_ids=ids)
    assert fused.dtype == layered.dtype == reference.dtype == dtype
    tolerance = {torch.float64: 1e-9, torch.float16: 0.02, torch.bfloat16: 0.1}[dtype]
    torch.testing.assert_close(layered, reference, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(fused, layered, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_binary_layers_of_another_type_are_exact_before_rounding(dtype):
    """Signs of the same inputs are the same in every type: the sums are integers, and only the result is rounded."""
    model = make("bibert", dtype)
    layer = next(m for m in model.modules() if isinstance(m, PackedLinear))
    x = torch.randn(9, layer.in_features, generator=torch.Generator().manual_seed(4)).to(dtype)
    with torch.no_grad(), use_backend("cpu"):
        y = layer(x)
    signs = torch.where(x >= 0, 1.0, -1.0).double()
    exact = signs @ layer.binary_weight().double().sign().T * layer.weight_scale.double() + layer.bias.double()
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), exact, rtol=2 * torch.finfo(dtype).eps, atol=2 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_fully_binary_models_of_another_type_run_and_are_finite(dtype):
    model = make("w1a1", dtype)
    for logits in three_ways(model, input_ids=torch.arange(16).reshape(2, 8)):
        assert logits.dtype == dtype and logits.isfinite().all()


def test_integers_are_no_inputs(models):
    layer = next(m for m in models("w1a32").modules() if isinstance(m, PackedLinear))
    with use_backend("cpu"), pytest.raises(TypeError, match=r"floating point inputs, got torch\.int64"):
        layer(torch.ones(2, layer.in_features, dtype=torch.long))
    assert rebnn_hf.is_fused(models("w1a1"))
