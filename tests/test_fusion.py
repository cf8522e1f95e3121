"""The fused encoder: the same answers as the layers one by one, and whatever it cannot do goes through them."""

import copy
import ctypes
import functools
import itertools
import os
import pickle
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import transformers as hf
from operators import Recorded
from torch import nn

import rebnn_hf
from rebnn_hf import ReBNNConfig, binarize, calibrate, fuse, is_fused, kernels, pack
from rebnn_hf.architecture import ENCODERS, encoder_of
from rebnn_hf.attention import ElasticAttention
from rebnn_hf.binarizers import Elastic, RPReLU, engine_codes
from rebnn_hf.fusion import NotFusableError, _limits
from rebnn_hf.kernels import cpu
from rebnn_hf.layers import PackedLinear

pytestmark = pytest.mark.skipif(not cpu.available(), reason=cpu.why_not() or "it is there")
ISAS = [name for name, runs in cpu.instruction_sets().items() if runs] if cpu.available() else ["none"]
METHODS = {
    "bit": ReBNNConfig.preset("rebnn-bit-w1a1"),  # ReLU, {0, 1}
    "bit-gelu": ReBNNConfig.preset("rebnn-bit-w1a1", ffn_activation="model"),
    "bibert": ReBNNConfig.preset("rebnn-bibert-w1a1"),  # sign of GELU
    "reactnet": ReBNNConfig.preset("reactnet"),  # RPReLU
    "rsign-elastic": ReBNNConfig(activation="elastic", attention="bool", ffn_activation="rprelu"),
}
LENGTHS = [[9, 9, 9], [9, 4, 1], [9, 0, 5]]
LOWEST = torch.finfo(torch.float32).min


def config_of(name, head=32, heads=3, inner=100, layers=2, **fields):
    if name == "distilbert":
        sizes = {"dim": head * heads, "n_layers": layers, "n_heads": heads, "hidden_dim": inner}
    else:
        sizes = {
            **{"hidden_size": head * heads, "num_hidden_layers": layers, "num_attention_heads": heads},
            **{"intermediate_size": inner, "type_vocab_size": 2},
        }
    if name == "electra":
        sizes["embedding_size"] = 24
    classes = {"xlm-roberta": "XLMRoberta", "distilbert": "DistilBert"}
    config = getattr(hf, f"{classes.get(name, name.title())}Config")
    return config(vocab_size=60, max_position_embeddings=160, **sizes, **fields)


def disturb(model, seed, size):
    """Make every bias, shift, scale and norm something of its own, as training does; some scales 0, shifts huge."""
    generator = torch.Generator().manual_seed(seed)

    def draw(like, mean, spread):
        return mean + spread * torch.randn(like.shape, generator=generator)

    for module in model.modules():
        if isinstance(module, PackedLinear):
            module.weight_scale.mul_(draw(module.weight_scale, 1, 0.3).abs())
            module.weight_scale[5::11] = 0
            if isinstance(module.input_binarizer, Elastic) and module.input_binarizer.signed:
                module.input_binarizer.scale.fill_(0.8)  # calibrate() found nothing where all probabilities were 0
        elif isinstance(module, RPReLU):
            for name, mean in (("shift_in", 0), ("slope", 0.1), ("shift_out", 0)):
                parameter = getattr(module, name)
                parameter.copy_(draw(parameter, mean, 0.3))
        elif isinstance(module, nn.LayerNorm):
            module.weight.copy_(draw(module.weight, 1, 0.2))
        elif isinstance(module, ElasticAttention):
            for name in ("query", "key"):
                getattr(module, name).scale.fill_(1.0)  # scores of about 1
            module.probabilities.scale.fill_(1.8 / size)  # and probabilities around the threshold
        if getattr(module, "bias", None) is not None:
            module.bias.copy_(draw(module.bias, 0, 0.1))
        if getattr(module, "shift", None) is not None:
            module.shift.copy_(draw(module.shift, 0, 0.3))
            module.shift[::13] = 1e6
            module.shift[5::13] = -1e6


@torch.no_grad()
def packed(name="bert", method="bit", seed=0, disturbed=True, kind="Model", size=9, **sizes):
    torch.manual_seed(seed)
    config = config_of(name, **sizes)
    model = getattr(hf, f"AutoModel{kind.removeprefix('Model')}").from_config(config).eval()
    binarize(model, copy.deepcopy(METHODS[method]))
    ids = torch.randint(5, 60, (4, 9), generator=torch.Generator().manual_seed(seed))
    calibrate(model, {"input_ids": ids})
    pack(model)
    if disturbed:
        disturb(model, seed, size)
    return model


def padding(lengths, size, left=False):
    """Which positions count [B, S]."""
    ends = torch.tensor(lengths)[:, None]
    index = torch.arange(size)
    return index >= size - ends if left else index < ends


def score_mask(counts):
    """What transformers adds to scores, [B, 1, S, S]."""
    size = counts.shape[1]
    return torch.zeros(len(counts), 1, size, size).masked_fill(~counts[:, None, None, :], LOWEST)


def states(batch, size, model, seed=0):
    width = encoder_of(model).layer[0].get_submodule(layout(model).query).in_features
    return torch.randn(batch, size, width, generator=torch.Generator().manual_seed(seed))


def layout(model):
    return ENCODERS[model.config.model_type]


@torch.no_grad()
def fused(model, hidden, mask=None):
    """Last hidden states by the fused encoder, for sure."""
    with Recorded() as ops:
        result = encoder_of(model)(hidden, mask)
    assert ops.names == ["rebnn::encoder"]
    return result.last_hidden_state


def one_by_one(model, *inputs):
    """Last hidden states by the layers."""
    assert fuse(model, False) is None and not is_fused(model)
    try:
        with torch.no_grad(), Recorded() as ops:
            result = encoder_of(model)(*inputs)
    finally:
        assert fuse(model) is None
    assert "rebnn::encoder" not in ops.names
    return result.last_hidden_state


def by_reference(model, *inputs):
    with torch.no_grad(), kernels.use_backend("reference"), Recorded() as ops:
        result = encoder_of(model)(*inputs)
    assert ops.names == []
    return result.last_hidden_state


def nearest_threshold(model, hidden, counts):
    """How near any float comes to the threshold where its bit changes, at positions that count.

    Only there two ways to round can give different bits. Products that are exactly on it are so in every way.
    """
    found, handles = [torch.tensor(float("inf"))], []

    def look(module, inputs):
        (x,) = inputs
        value = x if getattr(module, "shift", None) is None else x + module.shift
        if isinstance(module, Elastic) and not module.signed:
            value = value / module.positive_scale() - 0.5
        value = (value.transpose(1, 2) if value.ndim == 4 else value)[counts]
        found.append(value[value != 0].abs().min() if (value != 0).any() else found[0])

    for module in encoder_of(model).modules():
        if isinstance(module, PackedLinear):
            handles.append(module.input_binarizer.register_forward_pre_hook(look))
        elif hasattr(module, "binary_attention"):
            handles += [m.register_forward_pre_hook(look) for m in module.binary_attention.children()]
    by_reference(model, hidden, score_mask(counts))
    for handle in handles:
        handle.remove()
    return min(found).item()


ROUNDING = 4e-6
"""More than floats of the size of LayerNorm's results differ by between two ways to add."""


def clear_case(counts, **how):
    """A model and hidden states of which nothing is within rounding of a threshold: all bits must be equal."""
    for seed in range(30):
        model = packed(seed=seed, size=counts.shape[1], **how)
        hidden = states(*counts.shape, model, seed)
        if nearest_threshold(model, hidden, counts) > ROUNDING:
            return model, hidden
    raise AssertionError("floats near thresholds in 30 models in a row: that is not chance")


def compare(model, hidden, counts):
    mask = score_mask(counts)
    result = fused(model, hidden, mask)
    assert result[~counts].eq(0).all() and result[counts].std() > 0.1
    torch.testing.assert_close(result[counts], one_by_one(model, hidden, mask)[counts], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(result[counts], by_reference(model, hidden, mask)[counts], rtol=1e-5, atol=1e-5)
    if counts[0].sum() > 4 and result.shape[2] > 16:
        fewer = counts.clone()
        fewer[0, 0] = False
        other = by_reference(model, hidden, score_mask(fewer))[0, 1:]
        assert (result[0, 1:] - other)[counts[0, 1:]].abs().max() > 0.05, "tokens attend to one another"


# The same answers


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ENCODERS)
def test_fused_equals_layers_and_reference(name, method):
    counts = padding([9, 4, 1], 9)
    compare(*clear_case(counts, name=name, method=method), counts)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "head, heads, inner", [(16, 1, 1), (16, 5, 33), (64, 2, 128), (80, 1, 63), (80, 2, 65), (240, 1, 50)]
)
def test_sizes_of_heads_and_blocks(head, heads, inner, method):
    counts = padding([7, 5], 7)
    compare(*clear_case(counts, method=method, head=head, heads=heads, inner=inner), counts)


@pytest.mark.parametrize("method", ["bit", "reactnet"])
@pytest.mark.parametrize("size", [1, 63, 64, 65, 130])
def test_lengths(size, method):
    counts = padding([size, max(size - 2, 1)], size)
    compare(*clear_case(counts, method=method, layers=1), counts)


@pytest.mark.parametrize("method", ["bit", "bibert"])
def test_padding_is_left_out(method):
    """Right, left, in holes, whole sequences, everything: the rest is as if the padding was not there."""
    holes = torch.ones(3, 9, dtype=torch.bool)
    holes[0, 3] = holes[1, ::2] = False
    model = packed(method=method)
    hidden = states(3, 9, model)
    for counts in (
        *(padding(n, 9, left) for n, left in itertools.product(LENGTHS, (False, True))),
        holes,
        holes & False,
    ):
        found = fused(model, hidden, score_mask(counts))
        for row, kept in enumerate(counts):
            assert found[row, ~kept].eq(0).all()
            if kept.any():
                assert torch.equal(found[row, kept], fused(model, hidden[row, kept][None])[0])
        assert torch.equal(found, fused(model, hidden, score_mask(counts)[:, :, :1])), "one row says it all"


def test_values_at_padded_positions_do_not_matter():
    model, counts = packed(), padding([9, 4], 9)
    hidden = states(2, 9, model)
    expected = fused(model, hidden, score_mask(counts))
    hidden[~counts] = float("nan")
    assert torch.equal(fused(model, hidden, score_mask(counts)), expected)


def test_one_mask_for_all_sequences():
    model = packed()
    hidden = states(3, 9, model)
    counts = padding([5], 9)
    assert torch.equal(fused(model, hidden, score_mask(counts)), fused(model, hidden, score_mask(counts.expand(3, 9))))


@pytest.mark.parametrize("isa", ISAS)
def test_threads_and_instruction_sets_give_equal_results(isa, monkeypatch):
    model, counts = packed(method="bit", inner=65), padding([33, 20, 1], 33)
    hidden, mask = states(3, 33, model), score_mask(counts)
    expected = fused(model, hidden, mask)
    monkeypatch.setenv(cpu.ISA_ENVIRONMENT, isa)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 11):
            torch.set_num_threads(threads)
            assert torch.equal(fused(model, hidden, mask), expected)
    finally:
        torch.set_num_threads(before)


def test_calls_from_several_python_threads():
    """Also the first one, which makes the image."""
    counts = padding([9, 4], 9)
    (model, hidden), mask = clear_case(counts), score_mask(counts)
    expected = by_reference(model, hidden, mask)[counts]
    start = threading.Barrier(4)

    def work(_):
        start.wait()
        with torch.no_grad():
            return [encoder_of(model)(hidden, mask).last_hidden_state[counts] for _ in range(5)]

    with ThreadPoolExecutor(4) as pool:
        for result in itertools.chain(*pool.map(work, range(4))):
            torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)


def test_no_sequences_and_no_tokens():
    model = packed()
    for shape in ((0, 5), (2, 0)):
        assert fused(model, states(*shape, model)).shape == (*shape, 96)


def test_half_precision_is_computed_in_float32():
    """The layers round to bfloat16 in between, the fused encoder only at its end."""
    model = packed(method="bibert")
    with torch.no_grad():
        halved = copy.deepcopy(model).bfloat16()
        wide = copy.deepcopy(halved).float()
    hidden = states(2, 9, model).bfloat16()
    found = fused(halved, hidden)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, fused(wide, hidden.float()).bfloat16())


def test_inputs_stay_as_they_are():
    model = packed()
    hidden = states(2, 9, model)
    before = hidden.clone()
    fused(model, hidden)
    assert torch.equal(hidden, before)
    strided = states(9, 2, model).transpose(0, 1)
    assert torch.equal(fused(model, strided), fused(model, strided.contiguous()))


# The whole model


BATCH = {
    "input_ids": torch.randint(5, 60, (3, 9), generator=torch.Generator().manual_seed(1)),
    "attention_mask": padding([9, 4, 6], 9).long(),
}


def ops_and_output(model, **inputs):
    with Recorded() as ops:
        output = model(**inputs)
    return ops.names, output


@pytest.mark.parametrize("name", ENCODERS)
def test_whole_model_answers_as_without(name):
    model = packed(name, kind="ModelForSequenceClassification", disturbed=False)
    assert is_fused(model)
    with torch.no_grad():
        names, output = ops_and_output(model, **BATCH)
        assert names.count("rebnn::encoder") == 1
        _, alone = ops_and_output(model, input_ids=BATCH["input_ids"][1:2, :4])
        fuse(model, False)
        names, expected = ops_and_output(model, **BATCH)
    assert "rebnn::encoder" not in names and "rebnn::linear" in names
    torch.testing.assert_close(output.logits, expected.logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(output.logits[1:2], alone.logits, rtol=1e-5, atol=1e-5)


def layered(model, **inputs):
    """Asserts that a call goes through the layers, and gives its output."""
    names, output = ops_and_output(model, **inputs)
    assert "rebnn::encoder" not in names
    return output


def is_served(model, **inputs):
    with torch.no_grad():
        return "rebnn::encoder" in ops_and_output(model, **(inputs or BATCH))[0]


@pytest.mark.parametrize("name", ["bert", "distilbert", "electra"])
def test_hidden_states_and_attentions_come_from_the_layers(name):
    model = packed(name, disturbed=False)
    with torch.no_grad():
        last = model(**BATCH).last_hidden_state
        output = layered(model, **BATCH, output_hidden_states=True, output_attentions=True)
        assert is_served(model), "and the next call is fused again"
    assert len(output.hidden_states) == 3 and len(output.attentions) == 2
    for weights in output.attentions:
        assert weights.shape == (3, 3, 9, 9) and weights[1, ..., 4:].eq(0).all() and weights[1, ..., :4].ne(0).any()
    counts = BATCH["attention_mask"].bool()
    torch.testing.assert_close(output.hidden_states[-1][counts], last[counts], rtol=1e-5, atol=1e-5)
    assert not torch.equal(output.hidden_states[0], output.hidden_states[1])
    with torch.no_grad():
        assert len(layered(model, **BATCH, output_hidden_states=True).hidden_states) == 3
        assert len(layered(model, **BATCH, output_attentions=True).attentions) == 2
        model.config.output_hidden_states = True
        assert len(layered(model, **BATCH).hidden_states) == 3


class Hook:
    """A callable without a name."""

    def __init__(self):
        self.calls = 0

    def __call__(self, *arguments):
        self.calls += 1


HOOKS = {
    "forward": lambda layer, hook: layer.register_forward_hook(hook),
    "partial": lambda layer, hook: layer.register_forward_hook(functools.partial(hook)),
    "before": lambda layer, hook: layer.register_forward_pre_hook(hook),
    "with keywords": lambda layer, hook: layer.register_forward_pre_hook(hook, with_kwargs=True),
    "global": lambda layer, hook: nn.modules.module.register_module_forward_hook(hook),
    "before, global": lambda layer, hook: nn.modules.module.register_module_forward_pre_hook(hook),
}


@pytest.mark.parametrize("kind", HOOKS)
@pytest.mark.parametrize("place", ["layer.1", "layer.0.attention.self", "layer.0.attention.self.query"])
def test_hooks_of_users_are_called(place, kind):
    model = packed(disturbed=False)
    assert is_served(model), "before the first hook"
    hook = Hook()
    handle = HOOKS[kind](encoder_of(model).get_submodule(place), hook)
    try:
        with torch.no_grad():
            layered(model, **BATCH)
    finally:
        handle.remove()
    assert hook.calls >= 1
    assert is_served(model), "and behind the last one"


def test_a_hook_on_the_whole_encoder_sees_what_it_gives():
    model, seen = packed(disturbed=False), []
    handle = encoder_of(model).register_forward_hook(
        lambda module, inputs, output: seen.append(output.last_hidden_state)
    )
    with torch.no_grad():
        assert is_served(model)
        assert torch.equal(model(**BATCH).last_hidden_state, seen[-1])
    handle.remove()


def test_training_goes_through_the_layers():
    model = packed(disturbed=False).train()
    torch.manual_seed(0)
    one, two = (layered(model, **BATCH).last_hidden_state for _ in range(2))
    assert not torch.equal(one, two), "dropout"


def test_dropout_alone_in_training_mode_goes_through_the_layers():
    """Monte-Carlo dropout: the model in eval mode, its dropout not."""
    model = packed(disturbed=False)
    for module in encoder_of(model).modules():
        if isinstance(module, nn.Dropout):
            module.train()
    with torch.no_grad():
        one, two = (layered(model, **BATCH).last_hidden_state for _ in range(2))
    assert not torch.equal(one, two)
    model.eval()
    assert is_served(model)


def test_gradients_go_through_the_layers():
    model = packed(disturbed=False)
    layered(model, **BATCH).last_hidden_state.sum().backward()
    assert model.embeddings.LayerNorm.weight.grad is not None


def test_gradients_of_the_encoder_alone():
    """Everything in front of it frozen, so that its inputs need no gradient."""
    model = packed(disturbed=False).requires_grad_(False)
    assert "rebnn::encoder" in ops_and_output(model, **BATCH)[0], "nothing to train"
    bias = encoder_of(model).layer[0].output.dense.bias.requires_grad_(True)
    layered(model, **BATCH).last_hidden_state.square().sum().backward()
    assert bias.grad.abs().sum() > 0
    with torch.no_grad():
        assert is_served(model)


def test_gradients_are_those_of_the_reference():
    model = packed(disturbed=False)
    results = []
    for backend in ("cpu", "reference"):
        model.zero_grad()
        with kernels.use_backend(backend):
            model(**BATCH).last_hidden_state.square().sum().backward()
        results.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)
    assert len(results[0]) > 40


def masks():
    causal = torch.full((9, 9), LOWEST).triu(1).expand(3, 1, 9, 9)
    soft, raised, several = (score_mask(padding([9, 4, 6], 9)) for _ in range(3))
    soft[soft < 0] = -0.7
    raised[0, ..., 2] = 1.5
    return {"causal": causal, "soft": soft, "raised": raised, "one for each head": several.expand(-1, 3, -1, -1)}


@pytest.mark.parametrize("method", ["bit", "bibert"])
@pytest.mark.parametrize("kind", masks())
def test_masks_that_are_not_padding_go_through_the_layers(kind, method):
    model = packed(method=method)
    hidden, mask = states(3, 9, model), masks()[kind]
    with torch.no_grad(), Recorded() as ops:
        found = encoder_of(model)(hidden, mask).last_hidden_state
    assert "rebnn::encoder" not in ops.names
    assert nearest_threshold(model, hidden, torch.ones(3, 9, dtype=torch.bool)) > 1e-7
    torch.testing.assert_close(found, by_reference(model, hidden, mask), rtol=1e-5, atol=1e-5)
    assert (found - one_by_one(model, hidden)).abs().max() > 0.1, "the mask makes a difference"


def test_masks_as_users_pass_them():
    model = packed(disturbed=False)
    counts = BATCH["attention_mask"].bool()
    ids = BATCH["input_ids"]
    with torch.no_grad():
        expected = model(**BATCH).last_hidden_state[counts]
        for mask in (counts, counts.float(), counts[:, None, None].expand(-1, 1, 9, -1)):
            torch.testing.assert_close(model(ids, attention_mask=mask).last_hidden_state[counts], expected)
        causal = torch.ones(9, 9).tril().bool().expand(3, 1, 9, 9)
        found = layered(model, input_ids=ids, attention_mask=causal).last_hidden_state
        with kernels.use_backend("reference"):
            torch.testing.assert_close(model(ids, attention_mask=causal).last_hidden_state, found, rtol=1e-5, atol=1e-5)


def test_what_the_engine_does_not_serve_goes_through_the_layers():
    model = packed(disturbed=False)
    with torch.no_grad():
        expected = model(**BATCH).last_hidden_state
        counts = BATCH["attention_mask"].bool()
        with torch.autocast("cpu", torch.bfloat16):
            layered(model, **BATCH)
        with kernels.use_backend("reference"):
            found = layered(model, **BATCH).last_hidden_state
        torch.testing.assert_close(found[counts], expected[counts], rtol=1e-5, atol=1e-5)
        found = layered(copy.deepcopy(model).double(), **BATCH).last_hidden_state
        torch.testing.assert_close(found[counts].float(), expected[counts], rtol=1e-4, atol=1e-4)


def test_sequences_beyond_the_limits_of_the_context_go_through_the_layers():
    model = packed()
    hidden = states(1, 161, model)
    with torch.no_grad(), Recorded() as ops:
        encoder_of(model)(hidden)
    assert "rebnn::encoder" not in ops.names
    fused(model, hidden[:, :160])


def test_inference_mode():
    with torch.inference_mode():
        model = packed(disturbed=False)
        assert is_served(model)
    model = packed(disturbed=False)
    with torch.inference_mode():
        found = model(**BATCH).last_hidden_state
    with torch.no_grad():
        assert torch.equal(model(**BATCH).last_hidden_state, found)


# Changes are noticed


def tensors_of(model):
    """One tensor of every kind in a layer, by name."""
    block = encoder_of(model).layer[-1]
    named = dict(itertools.chain(block.named_parameters(), block.named_buffers()))
    kinds = {}
    for name, tensor in named.items():
        kinds.setdefault(name.replace("key", "query").replace("value", "query"), (name, tensor))
    return dict(kinds.values())


def change(name, tensor):
    if tensor.dtype == torch.uint8:
        tensor[:, 0].bitwise_not_()
        return
    tensor.mul_(-1.7).add_(0.3) if "scale" not in name else tensor.mul_(1.9)


@pytest.mark.parametrize("method", ["bit", "reactnet"])
def test_a_tensor_changed_in_place_is_noticed(method):
    """Also one of a copy of a model that ran, whose tensors count their changes anew."""
    base, counts = packed(method=method, layers=1), torch.ones(4, 9, dtype=torch.bool)
    hidden = states(4, 9, base)
    before = fused(base, hidden)
    names = tensors_of(base)
    assert len(names) >= (26 if method == "bit" else 23)
    for name in names:
        model, last = copy.deepcopy(base), before
        for _ in range(2):
            with torch.no_grad():
                change(name, tensors_of(model)[name])
            found = fused(model, hidden)
            assert not torch.equal(found, last), name
            if nearest_threshold(model, hidden, counts) > ROUNDING:
                torch.testing.assert_close(found, by_reference(model, hidden), rtol=1e-5, atol=1e-5, msg=name)
            last = found
    assert torch.equal(fused(base, hidden), before)


@pytest.mark.parametrize("assign", [False, True])
def test_a_loaded_state_is_noticed(assign):
    model, other = packed(seed=0), packed(seed=3)
    hidden = states(2, 9, model)
    fused(model, hidden)
    again = copy.deepcopy(model)
    for subject in (model, again):
        subject.load_state_dict(other.state_dict(), assign=assign)
        assert torch.equal(fused(subject, hidden), fused(other, hidden))


def test_tensors_put_in_place_of_others_are_noticed():
    model, other = packed(seed=0), packed(seed=3)
    hidden = states(2, 9, model)
    fused(model, hidden)
    norm, theirs = (encoder_of(m).layer[1].output.LayerNorm for m in (model, other))
    norm.bias = nn.Parameter(theirs.bias.detach() + 3)
    torch.testing.assert_close(fused(model, hidden), one_by_one(model, hidden), rtol=1e-5, atol=1e-5)
    norm.weight.data = theirs.weight.detach() * 2
    torch.testing.assert_close(fused(model, hidden), one_by_one(model, hidden), rtol=1e-5, atol=1e-5)


class Wrapped(nn.Module):
    """What adapters do: another module around a layer."""

    def __init__(self, base):
        super().__init__()
        self.base_layer, self.in_features, self.out_features = base, base.in_features, base.out_features
        self.adapter = nn.Linear(base.in_features, base.out_features)

    def forward(self, x):
        return self.base_layer(x) + self.adapter(x)


def test_a_replaced_module_is_noticed():
    model = packed()
    hidden = states(2, 9, model)
    before = fused(model, hidden)
    block = encoder_of(model).layer[1]
    for parent, name, module in (
        (block.attention.self, "query", Wrapped(block.attention.self.query)),
        (block.output, "LayerNorm", nn.Identity()),
        (block.intermediate, "intermediate_act_fn", nn.Hardswish().eval()),
        (block.output.dense, "input_binarizer", None),
    ):
        original = getattr(parent, name)
        setattr(parent, name, module)
        with torch.no_grad(), Recorded() as ops:
            found = encoder_of(model)(hidden).last_hidden_state
        assert ("rebnn::encoder" in ops.names) == (name == "intermediate_act_fn")
        torch.testing.assert_close(found, by_reference(model, hidden), rtol=1e-4, atol=1e-4)
        assert not torch.equal(found, before)
        setattr(parent, name, original)
        assert torch.equal(fused(model, hidden), before)
    encoder_of(model).layer = encoder_of(model).layer[:1]
    torch.testing.assert_close(fused(model, hidden), one_by_one(model, hidden), rtol=1e-5, atol=1e-5)


class Wave(nn.Module):
    """An activation function whose bits change many times."""

    def forward(self, x):
        return (40 * x).sin()


def test_a_function_whose_bits_change_often_goes_through_the_layers():
    model = packed()
    for block in encoder_of(model).layer:
        block.intermediate.intermediate_act_fn = Wave().eval()
    hidden = states(2, 9, model)
    with torch.no_grad(), Recorded() as ops:
        found = encoder_of(model)(hidden).last_hidden_state
    assert "rebnn::encoder" not in ops.names
    torch.testing.assert_close(found, by_reference(model, hidden), rtol=1e-4, atol=1e-4)


# Copies and files


def test_copies_are_fused_and_of_their_own():
    model = packed()
    hidden = states(2, 9, model)
    before = fused(model, hidden)
    again = copy.deepcopy(model)
    assert is_fused(again) and torch.equal(fused(again, hidden), before)
    with torch.no_grad():
        for parameter in again.parameters():
            parameter.mul_(-1.1)
    assert not torch.equal(fused(again, hidden), before)
    assert torch.equal(fused(model, hidden), before)
    assert encoder_of(again).__dict__["forward"].encoder is encoder_of(again)


@pytest.mark.parametrize("changes", [1, 2])
def test_a_copy_that_was_changed_as_often_as_its_original(tmp_path, changes):
    """Versions of its tensors say nothing: they count from 0 again."""
    packed().save_pretrained(tmp_path)
    model = copy.deepcopy(hf.AutoModel.from_pretrained(tmp_path))
    hidden, place = states(2, 9, model), "layer.1.output.LayerNorm.bias"

    def changed(subject):
        with torch.no_grad():
            for _ in range(changes):
                encoder_of(subject).get_parameter(place).add_(1)
        return fused(subject, hidden)

    before = changed(model)
    assert (changed(copy.deepcopy(model)) - before).mean().item() == pytest.approx(changes, abs=0.01)


def test_pickles_are_fused_and_hold_no_image():
    model = packed()
    hidden = states(2, 9, model)
    fresh = len(pickle.dumps(model))
    before = fused(model, hidden)
    blob = pickle.dumps(model)
    assert len(blob) < fresh * 1.01
    assert torch.equal(fused(pickle.loads(blob), hidden), before)


def test_saved_models_are_fused_when_loaded(tmp_path):
    model = packed(kind="ModelForSequenceClassification")
    with torch.no_grad():
        expected = model(**BATCH).logits
        keys = set(model.state_dict())
        model.save_pretrained(tmp_path)
        loaded = hf.AutoModelForSequenceClassification.from_pretrained(tmp_path)
        assert is_fused(loaded) and set(loaded.state_dict()) == keys
        names, output = ops_and_output(loaded, **BATCH)
    assert names.count("rebnn::encoder") == 1 and torch.equal(output.logits, expected)


def resident(path):
    """Bytes of a mapped file that are in memory."""
    pages, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if line.split()[0].endswith(":"):
            pages += int(line.split()[1]) * 1024 if inside and line.startswith("Rss:") else 0
        else:
            inside = line.endswith(str(path))
    return pages


def write_out(file):
    """Pages that are not on the disk yet stay."""
    with open(file, "rb") as opened:
        os.fsync(opened.fileno())


def can_put_aside(folder):
    """Whether this kernel lets go of pages of files in a folder when it is asked to."""
    file, size = folder / "blob", 1 << 20
    file.write_bytes(b"x" * size)
    write_out(file)
    blob = torch.from_file(str(file), size=size, dtype=torch.uint8)
    blob.sum()
    ctypes.CDLL(None).madvise(ctypes.c_void_p(blob.data_ptr()), ctypes.c_size_t(size), 21)
    return resident(file) == 0


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux is asked for this")
def test_bits_that_are_in_the_image_leave_the_memory_and_come_back(tmp_path):
    if not can_put_aside(tmp_path):
        pytest.skip("this kernel or file system keeps mapped pages")
    packed(head=64, heads=4, inner=4096, layers=4).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    write_out(file)
    model = hf.BertModel.from_pretrained(tmp_path)
    bits = [module.weight for module in model.encoder.modules() if isinstance(module, PackedLinear)]
    before = [tensor.clone() for tensor in bits]
    read = resident(file)
    with torch.inference_mode():
        model(input_ids=torch.ones(1, 4, dtype=torch.long))
    size = sum(tensor.nbytes for tensor in bits)
    assert read - resident(file) > 0.7 * size  # but for pages that are kept in groups with others
    assert all(torch.equal(now, then) for now, then in zip(bits, before, strict=True))


def test_pipeline(tmp_path):
    model = packed(kind="ModelForSequenceClassification")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    hf.BertTokenizer(vocab=str(tmp_path / "vocab.txt")).save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    texts = ["a b c d e f g", "x", "q r s"]
    classify = hf.pipeline("text-classification", model=str(tmp_path), device="cpu")
    assert is_fused(classify.model)
    with Recorded() as ops:
        together = classify(texts, batch_size=3, top_k=None)
    assert ops.names.count("rebnn::encoder") == 1
    fuse(classify.model, False)
    apart = [classify(text, top_k=None) for text in texts]
    for ours, theirs in zip(together, apart, strict=True):
        scores = [{entry["label"]: entry["score"] for entry in answer} for answer in (ours, theirs)]
        assert scores[0] == pytest.approx(scores[1], abs=1e-5)
    assert together[0][0]["score"] != together[1][0]["score"]


def test_the_golden_checkpoint_is_not_fused():
    """Its heads of 6 features are too small; it works as before."""
    folder = Path(__file__).parent / "data" / "golden_v2"
    model = hf.AutoModelForSequenceClassification.from_pretrained(folder)
    assert not is_fused(model) and fuse(model) == "heads of 6 features; the engine needs a multiple of 16 up to 240."


# What can be fused


def refused(config=None, name="bert", **sizes):
    torch.manual_seed(0)
    model = hf.AutoModel.from_config(config_of(name, **sizes)).eval()
    if config is not None:
        binarize(model, config)
        calibrate(model, BATCH)
        pack(model)
    reason = fuse(model)
    assert not is_fused(model)
    with torch.no_grad():
        layered(model, **BATCH)
    return reason


def test_reasons():
    assert refused() == "query of layer 0 is a BertSdpaSelfAttention, not a packed layer." or "Linear" in refused()
    assert refused(ReBNNConfig()) == "the inputs of query of layer 0 are not 1-bit."
    assert "inputs of query of layer 0 are not 1-bit" in refused(ReBNNConfig.preset("rebnn-bit-w1a2"))
    assert "inputs of query of layer 0 are not 1-bit" in refused(ReBNNConfig.preset("rebnn-bit-w1a8"))
    assert "attention of layer 0 is not 1-bit" in refused(ReBNNConfig(activation="sign"))
    assert "heads of 8 features" in refused(METHODS["bit"], head=8)
    assert "heads of 24 features" in refused(METHODS["bit"], head=24)
    assert "heads of 256 features" in refused(METHODS["bit"], head=256, heads=1)


def test_reasons_of_models_and_layers():
    torch.manual_seed(0)
    sizes = dict(vocab_size=60, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=36)
    model = hf.MPNetModel(hf.MPNetConfig(**sizes)).eval()
    binarize(model, ReBNNConfig(activation="sign"))
    assert "'mpnet' is not among bert, " in fuse(pack(model)) and not is_fused(model)
    decoder = hf.BertLMHeadModel(hf.BertConfig(**sizes, is_decoder=True)).eval()
    binarize(decoder, METHODS["bibert"])
    assert fuse(pack(decoder)) == "it is a decoder, or has cross-attention."
    latent = hf.BertModel(config_of("bert")).eval()
    binarize(latent, METHODS["bibert"])
    assert "query of layer 0 is a BinaryLinear, not a packed layer" in fuse(latent)
    some = hf.BertModel(config_of("bert")).eval()
    binarize(some, ReBNNConfig.preset("rebnn-bibert-w1a1", modules_to_not_convert=["layer.1.output"]))
    assert "layer 1 is a Linear, not a packed layer" in fuse(pack(some))
    wide = packed()
    with torch.no_grad():
        encoder_of(wide).layer[1].attention.self.binary_attention.query.scale.fill_(100)
    assert "attention of layer 1 is not 1-bit, or its scores too wide" in fuse(wide) and not is_fused(wide)
    normless = packed()
    encoder_of(normless).layer[0].output.LayerNorm = nn.LayerNorm(96, elementwise_affine=False)
    assert "norm of layer 0 is not a plain LayerNorm" in fuse(normless)
    assert fuse(packed()) is None


def test_scales_that_grow_too_wide_later_go_through_the_layers():
    model = packed()
    hidden = states(2, 9, model)
    fused(model, hidden)
    with torch.no_grad(), Recorded() as ops:
        encoder_of(model).layer[1].attention.self.binary_attention.query.scale.fill_(100)
        found = encoder_of(model)(hidden).last_hidden_state
    assert "rebnn::encoder" not in ops.names
    torch.testing.assert_close(found, by_reference(model, hidden), rtol=1e-5, atol=1e-5)


# Limits


def bits_by_limits(few, many, mismatches):
    return (mismatches[:, None] <= few) | (mismatches[:, None] >= many)


FUNCTIONS = {
    "identity": lambda y: y >= 0,
    "relu": lambda y: y.relu() >= 0.4,
    "gelu is not negative": lambda y: nn.functional.gelu(y) - 0.05 >= -0.1,
    "gelu": lambda y: nn.functional.gelu(y) >= 0,
    "negative": lambda y: -y >= 0.1,
    "hill": lambda y: y.abs() < 0.5,
    "valley": lambda y: y.abs() > 0.5,
    "always": lambda y: y == y,
    "never": lambda y: y != y,
}


def linear_of(inputs, outputs, seed=0):
    torch.manual_seed(seed)
    layer = rebnn_hf.BinaryLinear(inputs, outputs)
    nn.init.normal_(layer.bias, std=0.3)
    layer.input_binarizer = rebnn_hf.binarizers.ClippedSign()
    layer = layer.pack()
    layer.weight_scale.uniform_(0, 0.3)
    layer.weight_scale[::5] = 0
    return layer


@pytest.mark.parametrize("function", FUNCTIONS)
def test_limits_by_brute_force(function):
    is_set = FUNCTIONS[function]
    for inputs, outputs in ((1, 1), (2, 3), (31, 16), (64, 17), (77, 40)):
        linear = linear_of(inputs, outputs, inputs)
        mismatches = torch.arange(inputs + 1, dtype=torch.int32)
        values = (inputs - 2 * mismatches)[:, None].float() * linear.weight_scale + linear.bias
        expected = is_set(values)
        changes = (expected[1:] != expected[:-1]).sum(0)
        inside = ~expected[0] & ~expected[-1] & (changes == 2)
        if inside.any():
            with pytest.raises(NotFusableError, match="more than twice"):
                _limits(linear, is_set)
            continue
        few, many = _limits(linear, is_set)
        assert few.dtype == many.dtype == torch.int32 and len(few) == len(many) == -(-outputs // 16) * 16
        found = bits_by_limits(few, many, mismatches)
        assert torch.equal(found[:, :outputs], expected)
        assert not found[:, outputs:].any(), "bits beyond the outputs are never set"


@pytest.mark.parametrize("method", METHODS)
def test_limits_say_what_the_layers_say(method):
    """All of a layer's integers through its own modules."""
    model = packed(method=method)
    parts = layout(model).of(encoder_of(model).layer[0])

    def is_set(y):
        return parts.outer.input_binarizer(parts.activation(y))[0] > 0

    few, many = _limits(parts.inner, is_set)
    x = torch.randn(50, 96)
    with torch.no_grad():
        codes = parts.inner.input_binarizer(x)[0]
        expected = is_set(parts.inner(x))
        ones = rebnn_hf.packing.unpack_signs(parts.inner.weight, 96, torch.float32)
    mismatches = ((96 - codes @ ones.T) / 2).int()
    found = (mismatches <= few[:100]) | (mismatches >= many[:100])
    assert torch.equal(found, expected) and 0.05 < found.float().mean() < 0.95
    assert engine_codes(parts.outer.input_binarizer).kind == ("levels" if method in ("bit", "bit-gelu") else "sign")


def test_the_smallest_probability_that_counts():
    attention = ElasticAttention(rebnn_hf.ActivationRule("elastic", 1))
    generator = torch.Generator().manual_seed(0)
    scales = [1e-5, 0.1, 1 / 3, 0.5, 1.0, 1.9, 2.0, 7.0, *(2 * torch.rand(300, generator=generator)).tolist()]
    for scale in scales:
        with torch.no_grad():
            attention.probabilities.scale.fill_(scale)
        attention.probabilities.check_calibration()
        threshold = attention.threshold()
        around = (threshold.view(torch.int32) + torch.arange(-40, 41, dtype=torch.int32)).view(torch.float32)
        assert torch.equal(attention.probabilities(around)[0] > 0, around >= threshold), scale


# torch


def recording(graphs):
    from torch._dynamo.backends.debugging import aot_eager

    def backend(graph, inputs):
        graphs.append(graph.code)
        return aot_eager(graph, inputs)

    return backend


@pytest.mark.parametrize("is_one", [True, False])
def test_compiled_model(is_one):
    """One call where it ran before; the layers, in one graph, where it never did."""
    model = packed(kind="ModelForSequenceClassification", layers=1)
    torch.compiler.reset()
    with torch.no_grad():
        expected = (model if is_one else copy.deepcopy(model))(**BATCH).logits
        found = torch.compile(model, backend=recording(graphs := []), fullgraph=True)(**BATCH).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert [("ops.rebnn.encoder" in graph, "ops.rebnn.linear" in graph) for graph in graphs] == [(is_one, not is_one)]


@pytest.mark.parametrize("is_one", [True, False])
def test_exported_model(is_one):
    model = packed(kind="ModelForSequenceClassification", layers=1)
    fuse(model, is_one)
    with torch.no_grad():
        expected = model(**BATCH).logits
        program = torch.export.export(model, (), dict(BATCH))
        assert ("rebnn.encoder" in program.graph_module.code) == is_one
        torch.testing.assert_close(program.module()(**BATCH).logits, expected, rtol=1e-5, atol=1e-5)


def test_encoder_is_a_proper_operator():
    model = packed(layers=1)
    hidden = states(2, 5, model)
    fused(model, hidden)
    image = encoder_of(model).__dict__["forward"].image()
    for x in (hidden, hidden.bfloat16()):
        for mask in (None, score_mask(padding([5, 2], 5))):
            torch.library.opcheck(torch.ops.rebnn.encoder.default, (x, mask, image))


# Images that are not


def image_of(model):
    with torch.no_grad():
        encoder_of(model)(states(1, 2, model))
    return encoder_of(model).__dict__["forward"].image()


def test_bad_arguments_of_the_encoder_are_errors():
    model = packed(layers=1)
    image, hidden, mask = image_of(model), states(2, 5, model), torch.ones(2, 5, dtype=torch.bool)
    for arguments in (
        (hidden.double(), mask, image),
        (hidden[0], mask, image),
        (hidden[..., :80].contiguous(), mask, image),
        (hidden[..., :80], mask, image),
        (hidden, mask[:, :4], image),
        (hidden, mask.float(), image),
        (hidden, mask, image.float()),
        (hidden, mask, image[:-61]),
        (hidden, mask, image[: len(image) // 2]),
        (hidden, mask, image[:130]),
        (hidden, mask, image[:20]),
        (hidden, mask, image[:0]),
        (hidden, mask, torch.zeros_like(image)),
        (hidden, mask, image[::2]),
    ):
        with pytest.raises((ValueError, IndexError)):
            cpu.encoder(*arguments)
    for other in (hidden[:, :4], hidden[:1]):
        with pytest.raises((ValueError, RuntimeError)):
            torch.ops.rebnn.encoder(other, score_mask(mask), image)
    with pytest.raises(ValueError, match="says more than which tokens are padding"):
        torch.ops.rebnn.encoder(
            hidden, torch.zeros(2, 1, 5, 5).masked_fill(torch.ones(5, 5).triu(1).bool(), -1e9), image
        )
    cpu.encoder(hidden, mask, image)


DAMAGED = """
import os, sys, types, random, torch
package = sys.modules["rebnn_hf"] = types.ModuleType("rebnn_hf")  # without transformers, for speed
package.__path__ = sys.argv[2:]
from rebnn_hf.kernels import cpu
random.seed(0)
image = torch.load(sys.argv[1])
hidden, mask = torch.randn(2, 9, 96), torch.rand(2, 9) < 0.8
header, words = 16, image.view(torch.int64)
refused = served = 0
expected = hidden.clone()
cpu.encoder(expected, mask, image)
def attempt(damaged):
    global refused, served
    try:
        cpu.encoder(hidden.clone(), mask, damaged)
        served += 1
    except (ValueError, MemoryError):
        refused += 1
values = [0, 1, -1, 3, 63, 64, 65, *(2**n for n in (20, 31, 32, 40, 60, 62)), 2**63 - 1, -(2**63)]
values += [len(image), len(image) - 64]
for place in range(header + 31):
    for value in values + [words[place].item() + step for step in (-64, -1, 1, 8, 64, 4096)]:
        damaged = image.clone()
        damaged.view(torch.int64)[place] = max(min(value, 2**63 - 1), -(2**63))
        attempt(damaged)
for place in range(3, 7):  # two sizes at once, that fit one another
    for value in (16, 32, 48, 2**34, 2**60):
        damaged = image.clone()
        damaged.view(torch.int64)[4], damaged.view(torch.int64)[5] = value, 96 // 16
        attempt(damaged)
for _ in range(200):
    damaged = image.clone()
    for _ in range(random.randint(1, 3)):
        damaged[random.randrange(400)] = random.randrange(256)
    attempt(damaged)
    attempt(image[: random.randrange(len(image))].clone())
    contents = image.clone()
    contents[400:] = torch.randint(256, (len(image) - 400,), dtype=torch.uint8)
    if _ % 20 == 0:
        attempt(contents)
moved = torch.empty(len(image) + 8, dtype=torch.uint8)[8:].copy_(image)
found = hidden.clone()
cpu.encoder(found, mask, moved)
assert torch.equal(found, expected)
print("survived", refused > 500, served > 10)
"""


def test_a_damaged_image_does_not_crash(tmp_path):
    torch.save(image_of(packed(layers=1)), tmp_path / "image.pt")
    command = [sys.executable, "-c", DAMAGED, str(tmp_path / "image.pt"), *rebnn_hf.__path__]
    result = subprocess.run(command, capture_output=True, text=True)
    assert (result.returncode, result.stdout.split()) == (0, ["survived", "True", "True"]), result.stderr
