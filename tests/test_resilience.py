"""The balance rule in optimizer steps: trajectories, equality with the explicit loss, accumulation, AMP, clipping."""

import itertools

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel, set_seed

import rebnn_hf
from rebnn_hf import kernels
from rebnn_hf.convolutions import BinaryConv2d
from rebnn_hf.functional import BalanceRule, WeightRule, center, reconstruction_loss, sign
from rebnn_hf.kernels import cpu
from rebnn_hf.layers import BinaryEmbedding, BinaryLinear
from rebnn_hf.resilience import attach, overall

DOUBLE = torch.float64
needs_library = pytest.mark.skipif(not cpu.available(), reason=cpu.why_not() or "it is there")


def layer(rows=4, width=6, rule=None, seed=0):
    torch.manual_seed(seed)
    latent = BinaryLinear.from_float(nn.Linear(width, rows, bias=False, dtype=DOUBLE), rule or WeightRule())
    with torch.no_grad():
        latent.weight.mul_(0.05)  # small enough that steps flip signs
        latent.reset_scale()
    return latent


def loss_of(latent, x):
    return latent(x).square().mean() + latent(x).sum()


def error_of(latent, x):
    """Mean squared error against a fixed function of the input, so that its gradient changes sign along the way."""
    return (latent(x) - x[:, :4].cos()).square().mean()


def step(optimizer, loss):
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def test_worked_trajectory():
    """Oracle A4: SGD, eta = .1 on W and alpha, from W=[.02,-.5], alpha=.3, gamma=0."""
    latent = BinaryLinear(2, 1, bias=False, dtype=DOUBLE)
    with torch.no_grad():
        latent.weight.copy_(torch.tensor([[0.02, -0.5]], dtype=DOUBLE))
        latent.weight_scale.fill_(0.3)
    optimizer = torch.optim.SGD(latent.parameters(), lr=0.1)
    attach(optimizer, latent)
    expected = [
        ([1, 0.2], [-0.01, -0.506], 0.22, 0.5),
        ([-1.5, 0.1], [0.0125, -0.4939], 0.0838, 0.75),
        ([0.5, -0.3], [0.0136575, -0.4606285], 0.02921, 0.0),
    ]
    for upstream, weight, alpha, gamma in expected:
        step(optimizer, latent(torch.tensor([upstream], dtype=DOUBLE)).sum())  # dL/dW_hat = the input
        torch.testing.assert_close(latent.weight.detach(), torch.tensor([weight], dtype=DOUBLE))
        assert latent.weight_scale.item() == pytest.approx(alpha, abs=1e-12)
        assert latent.balance.item() == pytest.approx(gamma, abs=1e-12)


def test_flips_are_not_the_released_code_s():
    """W=[.02,-.01,.5], G=[.05,-.003,.1], eta=.1: no sign changes. The released code, which takes the weights before the
    step for those after it minus their gradient, finds a third (oracle A7)."""
    latent = BinaryLinear(3, 1, bias=False, dtype=DOUBLE)
    grad = torch.tensor([[0.05, -0.003, 0.1]], dtype=DOUBLE)
    with torch.no_grad():
        latent.weight.copy_(torch.tensor([[0.02, -0.01, 0.5]], dtype=DOUBLE))
        latent.weight_scale.fill_(1.0)
    optimizer = torch.optim.SGD([latent.weight], lr=0.1)
    resilience = attach(optimizer, latent)
    step(optimizer, latent(grad).sum())  # dL/dW = alpha G = the input
    torch.testing.assert_close(latent.weight.detach(), torch.tensor([[0.015, -0.0097, 0.49]], dtype=DOUBLE))
    assert resilience.statistics()[""]["flip_ratio"] == latent.balance.item() == 0
    released = sign(latent.weight - grad) != sign(latent.weight)
    assert released.double().mean().item() == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    "rule",
    [
        WeightRule(),
        WeightRule(center="row"),
        WeightRule(center="tensor", granularity="tensor"),
        WeightRule(scale="mean_abs"),
    ],
    ids=["row", "centered", "tensor", "closed-form"],
)
@pytest.mark.parametrize("optimizer_class", [torch.optim.SGD, torch.optim.AdamW])
def test_hooks_equal_the_explicit_loss_term(rule, optimizer_class):
    """With a fixed gamma the hook path and an autograd loss term take the same steps (oracle A9)."""
    x = torch.randn(8, 6, dtype=DOUBLE, generator=torch.Generator().manual_seed(5))
    gamma = 0.3
    hooked, explicit = layer(rule=rule), layer(rule=rule)
    optimizer = optimizer_class(hooked.parameters(), lr=0.01)
    attach(optimizer, hooked, BalanceRule("const", value=gamma))
    reference = optimizer_class(explicit.parameters(), lr=0.01)
    for _ in range(5):
        step(optimizer, loss_of(hooked, x))
        centered = (
            explicit.weight
            - {
                "none": 0.0,
                "row": explicit.weight.mean(-1, keepdim=True),
                "tensor": explicit.weight.mean(),
            }[rule.center]
        )
        alpha = explicit.weight_scale.abs() if rule.scale == "learned" else explicit.scale()
        term = reconstruction_loss(centered, sign(centered), alpha, torch.full((4,), gamma, dtype=DOUBLE))
        step(reference, loss_of(explicit, x) + term)
        for mine, theirs in zip(hooked.parameters(), explicit.parameters(), strict=True):
            torch.testing.assert_close(mine, theirs)


WEIGHT_RULES = {
    "row": WeightRule(),
    "tensor": WeightRule(granularity="tensor"),
    "closed-form": WeightRule(scale="mean_abs"),
    "closed-form-tensor": WeightRule(scale="mean_abs", granularity="tensor"),
    "centered-row": WeightRule(center="row"),
    "centered-tensor": WeightRule(center="tensor", granularity="tensor"),
    "centered-tensor-as-bit": WeightRule(center="tensor", center_gradient=False),
}


@pytest.mark.parametrize("held", [[], [8], [0, 3, 4, 7], [0, 1, 2, 4, 8], list(range(9))], ids=len)
@pytest.mark.parametrize("kind", [BinaryLinear, BinaryEmbedding])
@pytest.mark.parametrize("rule", WEIGHT_RULES.values(), ids=WEIGHT_RULES)
def test_reconstruction_of_few_rows_is_the_gradient_of_the_whole_loss(rule, kind, held):
    """Whichever rows are held, autograd of L_R over the tensor agrees."""
    torch.manual_seed(0)
    latent = kind(*((9, 6) if kind is BinaryEmbedding else (6, 9)), rule=rule, dtype=DOUBLE)
    with torch.no_grad():
        latent.weight.copy_(torch.randn(9, 6))
        latent.reset_scale()
        latent.balance[held] = 0.1 + torch.rand(len(held), dtype=DOUBLE)
        if latent.weight_scale is not None:
            latent.weight_scale[0].neg_()  # the layer uses |a|
    parameters = [p for p in (latent.weight, latent.weight_scale) if p is not None]
    task = [torch.randn_like(p) for p in parameters]
    centered = center(latent.weight, rule)
    alpha = latent.scale() if latent.weight_scale is None else latent.weight_scale.abs()
    loss = reconstruction_loss(centered, sign(centered), alpha, latent.balance)
    expected = torch.autograd.grad(loss, parameters)
    optimizer = torch.optim.SGD(parameters, lr=0.0)
    attach(optimizer, latent)
    for parameter, grad in zip(parameters, task, strict=True):
        parameter.grad = grad.clone()
    optimizer.step()
    for parameter, grad, term in zip(parameters, task, expected, strict=True):
        torch.testing.assert_close(parameter.grad, grad + term)


@needs_library
@pytest.mark.parametrize("balance_rule", ["flip_maxgrad", "maxgrad", "const", "none"])
@pytest.mark.parametrize("rule", WEIGHT_RULES.values(), ids=WEIGHT_RULES)
def test_backends_take_the_same_steps(rule, balance_rule):
    """In float32, where C makes the passes, weights, scales, balance and statistics are those of torch."""
    x = torch.randn(8, 40, generator=torch.Generator().manual_seed(5))
    results = []
    for backend in ("reference", "cpu"):
        torch.manual_seed(0)
        latent = BinaryLinear(40, 9, rule=rule, dtype=torch.float32)
        optimizer = torch.optim.SGD(latent.parameters(), lr=2.0)
        with kernels.use_backend(backend):
            resilience = attach(optimizer, latent, BalanceRule(balance_rule, value=0.01))
            for back_or_forth in (1, -1, 1, -1, 1, -1):
                step(optimizer, back_or_forth * loss_of(latent, x))
        results.append(dict(latent.state_dict()) | resilience.statistics()[""])
    assert results[0]["flip_ratio"] > 0
    assert results[0]["flip_back_ratio"] > 0 or balance_rule == "maxgrad"  # which is there to forbid flips
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-6)


@needs_library
def test_gradients_in_another_memory_order_are_changed_too():
    """As convolutions of channels-last images leave them: a pass over rows must not end in a copy of the gradient."""
    results = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(0)
        latent = BinaryConv2d(3, 5, 3, bias=False)
        latent.balance.fill_(0.5)
        latent.weight.grad = torch.randn(5, 3, 3, 3).to(memory_format=memory_format)
        task = latent.weight.grad.clone()
        optimizer = torch.optim.SGD([latent.weight], lr=0.0)
        attach(optimizer, latent)
        optimizer.step()
        assert latent.weight.grad.stride() == task.stride()
        results.append(latent.weight.grad - task)
    pulled = 0.5 * (latent.weight - latent.scale().view(-1, 1, 1, 1) * sign(latent.weight)).detach()
    for result in results:
        torch.testing.assert_close(result, pulled)


def test_reconstruction_changes_the_steps():
    """The comparison above can fail: without the term the weights differ."""
    x = torch.randn(8, 6, dtype=DOUBLE, generator=torch.Generator().manual_seed(5))
    weights = []
    for rule in (BalanceRule("const", value=0.3), BalanceRule("none")):
        latent = layer()
        optimizer = torch.optim.SGD(latent.parameters(), lr=0.01)
        attach(optimizer, latent, rule)
        step(optimizer, loss_of(latent, x))
        weights.append(latent.weight.detach())
    assert (weights[0] - weights[1]).abs().max() > 1e-5


def test_none_is_plain_training_with_learned_scales():
    x = torch.randn(8, 6, dtype=DOUBLE, generator=torch.Generator().manual_seed(5))
    held, plain = layer(), layer()
    optimizer = torch.optim.AdamW(held.parameters(), lr=0.01)
    attach(optimizer, held, BalanceRule("none"))
    reference = torch.optim.AdamW(plain.parameters(), lr=0.01)
    for _ in range(4):
        step(optimizer, loss_of(held, x))
        step(reference, loss_of(plain, x))
    assert torch.equal(held.weight, plain.weight) and torch.equal(held.weight_scale, plain.weight_scale)


def test_maxgrad_forbids_flips_under_sgd():
    """Oracle A5, through the optimizer."""
    x = torch.randn(8, 6, dtype=DOUBLE, generator=torch.Generator().manual_seed(5))
    flips = {}
    for rule in ("maxgrad", "none"):
        latent = layer()
        optimizer = torch.optim.SGD([latent.weight], lr=0.02)
        latent.weight_scale.requires_grad_(False)
        resilience = attach(optimizer, latent, BalanceRule(rule))
        for _ in range(5):
            step(optimizer, loss_of(latent, x))
        flips[rule] = resilience.statistics()[""]["flip_ratio"]
    assert flips["maxgrad"] == 0 and flips["none"] > 0


def test_loss_scale_invariance():
    """L -> cL with eta -> eta/c: the same weights and signs, and gamma is c times larger (oracle A6)."""
    x = torch.randn(8, 6, dtype=DOUBLE, generator=torch.Generator().manual_seed(5))
    runs = []
    for factor in (1.0, 1024.0):
        latent = layer()
        optimizer = torch.optim.SGD(latent.parameters(), lr=0.05 / factor)
        attach(optimizer, latent)
        for _ in range(6):
            step(optimizer, factor * loss_of(latent, x))
        runs.append(latent)
    torch.testing.assert_close(runs[0].weight, runs[1].weight)
    assert runs[0].balance.max() > 0
    torch.testing.assert_close(runs[0].balance * 1024, runs[1].balance)


def test_micro_batches_equal_one_batch():
    """Four micro-batches of loss/4 give the weights, balance and m of the whole batch (oracle A8)."""
    x = torch.randn(8, 6, dtype=DOUBLE, generator=torch.Generator().manual_seed(5))
    whole, split = layer(), layer()
    optimizer = torch.optim.AdamW(whole.parameters(), lr=0.05)
    accumulated = torch.optim.AdamW(split.parameters(), lr=0.05)
    attach(optimizer, whole)
    attach(accumulated, split)
    largest = 0.0
    for _ in range(6):
        step(optimizer, error_of(whole, x))
        largest = max(largest, whole.balance.max().item())
        accumulated.zero_grad()
        for part in x.chunk(4):
            (error_of(split, part) / 4).backward()
        accumulated.step()
    torch.testing.assert_close(split.weight, whole.weight)
    torch.testing.assert_close(split.balance, whole.balance)
    assert largest > 0  # some rows flipped on the way


def test_largest_gradient_is_that_of_the_whole_batch():
    """m from W.grad / alpha equals max_j |dL/dW_hat| of the batch, not of its parts."""
    x = torch.randn(8, 6, dtype=DOUBLE, generator=torch.Generator().manual_seed(5))
    latent = layer()
    scale = latent.scale()
    binary = latent.binary_weight().requires_grad_()
    (x @ binary.T).square().mean().backward()
    optimizer = torch.optim.SGD(latent.parameters(), lr=0.0)
    attach(optimizer, latent, BalanceRule("maxgrad"))
    latent(x).square().mean().backward()
    optimizer.step()
    torch.testing.assert_close(latent.balance, binary.grad.abs().amax(-1))
    assert scale.min() > 0


def test_clipping_scales_the_balance_like_the_gradient():
    x = torch.randn(8, 6, dtype=DOUBLE, generator=torch.Generator().manual_seed(5))
    largest = []
    for clip in (None, 0.01):
        latent = layer()
        optimizer = torch.optim.SGD(latent.parameters(), lr=0.0)
        attach(optimizer, latent, BalanceRule("maxgrad"))
        loss_of(latent, x).backward()
        norm = nn.utils.clip_grad_norm_(latent.parameters(), clip or 1e9)
        optimizer.step()
        largest.append(latent.balance.clone())
    torch.testing.assert_close(largest[1], largest[0] * 0.01 / norm, rtol=1e-4, atol=0)


def test_a_step_skipped_by_the_scaler_leaves_everything():
    """Oracle A10: overflow, so the scaler skips the step; balance, signs and weights stay."""
    torch.manual_seed(0)
    latent = BinaryLinear(6, 4, dtype=torch.float32)
    optimizer = torch.optim.AdamW(latent.parameters(), lr=0.1)
    resilience = attach(optimizer, latent)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    x = torch.randn(8, 6)
    for _ in range(3):
        optimizer.zero_grad()
        scaler.scale(error_of(latent, x)).backward()
        scaler.step(optimizer)
        scaler.update()
    assert latent.balance.max() > 0
    before = {name: value.clone() for name, value in latent.state_dict().items()}
    steps = resilience._layers[""].window["steps"]
    optimizer.zero_grad()
    scaler.scale(error_of(latent, x) * float("inf")).backward()
    scaler.step(optimizer)
    scaler.update()
    assert all(torch.equal(value, before[name]) for name, value in latent.state_dict().items())
    assert resilience._layers[""].window["steps"] == steps == 3


def test_scaler_gives_the_unscaled_balance():
    balances = []
    for scale in (None, 1024.0):
        torch.manual_seed(0)
        latent = BinaryLinear(6, 4)
        optimizer = torch.optim.AdamW(latent.parameters(), lr=0.1)
        attach(optimizer, latent)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, enabled=scale is not None)
        x = torch.randn(8, 6)
        for _ in range(2):
            optimizer.zero_grad()
            scaler.scale(error_of(latent, x)).backward()
            scaler.step(optimizer)
            scaler.update()
        balances.append(latent.balance.clone())
    assert balances[0].max() > 0
    torch.testing.assert_close(balances[0], balances[1])


def test_decoupled_form_pulls_the_weight_after_the_step():
    """W <- W - strength * (eta_t / eta_0) * f * (W - alpha b), with the signs after the optimizer's step."""
    x = torch.randn(8, 6, dtype=DOUBLE, generator=torch.Generator().manual_seed(5))
    pulled, plain = layer(), layer()
    optimizer = torch.optim.AdamW(pulled.parameters(), lr=0.01)
    attach(optimizer, pulled, BalanceRule(form="decoupled", strength=0.5))
    reference = torch.optim.AdamW(plain.parameters(), lr=0.01)
    for group in optimizer.param_groups:  # as a scheduler does halfway through a linear decay
        group["initial_lr"] = 0.02
    before = plain.signs()
    step(optimizer, loss_of(pulled, x))
    step(reference, loss_of(plain, x))
    share = (plain.signs() != before).double().mean(-1)
    assert share.max() > 0
    torch.testing.assert_close(pulled.balance, share)
    target = plain.scale().unsqueeze(-1) * sign(plain.weight.detach())
    expected = plain.weight - 0.5 * 0.5 * share.unsqueeze(-1) * (plain.weight - target)
    torch.testing.assert_close(pulled.weight.detach(), expected.detach())
    assert torch.equal(pulled.signs(), plain.signs())


def test_the_decoupled_pull_stops_at_the_binary_weight():
    """However strong, it never passes alpha b."""
    x = torch.randn(8, 6, dtype=DOUBLE, generator=torch.Generator().manual_seed(5))
    pulled = layer()
    optimizer = torch.optim.AdamW(pulled.parameters(), lr=0.01)
    attach(optimizer, pulled, BalanceRule(form="decoupled", strength=1e6))
    step(optimizer, loss_of(pulled, x))
    held = pulled.balance > 0
    assert held.any()
    torch.testing.assert_close(pulled.weight.detach()[held], pulled.binary_weight()[held])


def test_attach_takes_the_rule_of_the_model():
    set_seed(0)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    model = BertModel(BertConfig(vocab_size=9, **sizes))
    rebnn_hf.binarize(model, rebnn_hf.ReBNNConfig(balance_form="decoupled", balance_strength=0.3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    wrapped = nn.ModuleDict({"module": model})
    assert attach(optimizer, wrapped).rule == BalanceRule(form="decoupled", strength=0.3)
    assert attach(torch.optim.SGD(model.parameters(), lr=0.1), model, BalanceRule("none")).rule.rule == "none"
    bare = layer()
    assert attach(torch.optim.SGD(bare.parameters(), lr=0.1), bare).rule == BalanceRule()


def test_statistics_count_flips_and_flips_back():
    latent = BinaryLinear(4, 1, bias=False, dtype=DOUBLE)
    optimizer = torch.optim.SGD([latent.weight], lr=1.0)
    resilience = attach(optimizer, latent, BalanceRule("none"))
    latent.weight_scale.requires_grad_(False).fill_(1.0)
    path = [[1.0, 1.0, 1.0, 0.05], [-1.0, 1.0, -1.0, 0.05], [1.0, 1.0, -1.0, 0.05], [1.0, -1.0, -1.0, 0.05]]
    with torch.no_grad():
        latent.weight.copy_(torch.tensor([path[0]]))
    for here, there in itertools.pairwise(path):
        latent.weight.grad = torch.tensor([here], dtype=DOUBLE) - torch.tensor([there], dtype=DOUBLE)
        optimizer.step()
    statistics = resilience.statistics()[""]
    assert statistics["flip_ratio"] == pytest.approx((2 + 1 + 1) / 12)
    assert statistics["flip_back_ratio"] == pytest.approx(1 / 12)  # the first weight only
    assert statistics["near_zero_share"] == pytest.approx(1 / 4)
    assert statistics["scale_to_mean_abs"] == pytest.approx(1 / (3.05 / 4))
    assert resilience.statistics() == {}  # a new window


def test_overall_weights_layers_by_size():
    small = {"weights": 1, "flip_ratio": 1.0, "balance_mean": 0.0, "balance_max": 2.0}
    large = {"weights": 3, "flip_ratio": 0.0, "balance_mean": 4.0, "balance_max": 1.0}
    assert overall({"a": small, "b": large}) == {"flip_ratio": 0.25, "balance_mean": 3.0, "balance_max": 2.0}


def test_embedding_rows_without_gradient_have_no_balance():
    torch.manual_seed(0)
    latent = BinaryEmbedding(6, 4, rule=WeightRule(), dtype=DOUBLE)
    optimizer = torch.optim.SGD(latent.parameters(), lr=1.0)
    attach(optimizer, latent)
    for sign_of_loss in (1, -1):
        step(optimizer, sign_of_loss * latent(torch.tensor([1, 2])).sum())
    assert latent.balance[[0, 3, 4, 5]].abs().sum() == 0 and latent.balance[[1, 2]].max() > 0


def test_balance_survives_in_the_training_checkpoint():
    """Stopping and going on from state dicts gives the same weights, bit for bit."""
    x = torch.randn(8, 6, dtype=DOUBLE, generator=torch.Generator().manual_seed(5))

    def fresh():
        latent = layer()
        optimizer = torch.optim.AdamW(latent.parameters(), lr=0.02)
        attach(optimizer, latent)
        return latent, optimizer

    whole, optimizer = fresh()
    for _ in range(8):
        step(optimizer, loss_of(whole, x))
    first, optimizer = fresh()
    for _ in range(4):
        step(optimizer, loss_of(first, x))
    assert first.balance.max() > 0
    second, resumed = fresh()
    second.load_state_dict(first.state_dict())
    resumed.load_state_dict(optimizer.state_dict())
    for _ in range(4):
        step(resumed, loss_of(second, x))
    assert torch.equal(second.weight, whole.weight) and torch.equal(second.balance, whole.balance)


def test_detach_and_attach_again():
    latent = layer()
    optimizer = torch.optim.SGD(latent.parameters(), lr=0.1)
    resilience = attach(optimizer, latent)
    with pytest.raises(ValueError, match="already attached"):
        attach(optimizer, latent)
    resilience.detach()
    latent(torch.ones(1, 6, dtype=DOUBLE)).sum().backward()
    optimizer.step()
    assert resilience.statistics() == {} and latent.balance.sum() == 0
    attach(optimizer, latent)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda m: attach(torch.optim.SGD(m.parameters(), lr=1), nn.Linear(2, 2)), "no trainable latent layer"),
        (lambda m: attach(torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=1), m), "does not hold 1 of 1 latent"),
        (lambda m: attach(torch.optim.SGD(m.parameters(), lr=1), nn.DataParallel(m)), "DistributedDataParallel"),
    ],
)
def test_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make(layer())


def test_closures_are_refused_before_anything_changed():
    latent = layer()
    optimizer = torch.optim.SGD(latent.parameters(), lr=1.0)
    rebnn_hf.attach(optimizer, latent)
    latent(torch.ones(1, 6, dtype=DOUBLE)).sum().backward()
    before = latent.weight.detach().clone()
    with pytest.raises(ValueError, match="closure"):
        optimizer.step(lambda: torch.tensor(0.0))
    assert torch.equal(latent.weight, before)


def test_frozen_layers_are_left_alone():
    model = nn.Sequential(layer(6, 6), layer(4, 6, seed=1))
    model[0].requires_grad_(False)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    assert attach(optimizer, model).layers == ["1"]
