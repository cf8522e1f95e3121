"""Distillation losses: worked numbers, padding, gradients, degenerate inputs, precision, errors."""

import math

import pytest
import torch
from torch.nn import functional as F

from rebnn_hf.distillation import (
    binary_kl_divergence,
    binary_soft_cross_entropy,
    direction_loss,
    hidden_loss,
    hidden_mse,
    hidden_relative_mse,
    kl_divergence,
    logits_mse,
    relation_loss,
    soft_cross_entropy,
    uniform_layer_map,
)

B, S, D, HEADS = 3, 5, 8, 2


def relation_loss_2(student, teacher, mask=None):
    return relation_loss(student, teacher, HEADS, mask)


CLASS_LOSSES = [soft_cross_entropy, kl_divergence]
LABEL_LOSSES = [binary_soft_cross_entropy, binary_kl_divergence]
HIDDEN_LOSSES = [hidden_mse, hidden_relative_mse, direction_loss]
STATE_LOSSES = [*HIDDEN_LOSSES, relation_loss_2]
KINDS = {"mse": hidden_mse, "relative_mse": hidden_relative_mse, "direction": direction_loss}


def states(seed, *shape, dtype=torch.float64):
    return torch.randn(*(shape or (B, S, D)), generator=torch.Generator().manual_seed(seed), dtype=dtype)


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


def assert_equal(actual, expected, tolerance=1e-12):
    torch.testing.assert_close(actual, torch.as_tensor(expected, dtype=actual.dtype), rtol=tolerance, atol=tolerance)


def numerical_gradient(loss, student, *args, step=1e-6):
    gradient = torch.zeros_like(student)
    for i in range(student.numel()):
        shift = torch.zeros_like(student)
        shift.view(-1)[i] = step
        gradient.view(-1)[i] = (loss(student + shift, *args) - loss(student - shift, *args)) / (2 * step)
    return gradient


# Feature maps


@pytest.mark.parametrize("loss", HIDDEN_LOSSES)
def test_positions_of_feature_maps_are_tokens(loss):
    student, teacher = states(1, B, D, 2, 3), states(2, B, D, 2, 3)
    tokens = [torch.stack([m[:, :, y, x] for y in range(2) for x in range(3)], 1) for m in (student, teacher)]
    assert_equal(loss(student, teacher), loss(*tokens))
    student.requires_grad_(True)
    (found,) = torch.autograd.grad(loss(student, teacher), student)
    assert_equal(found, numerical_gradient(loss, student.detach(), teacher), tolerance=1e-6)


@pytest.mark.parametrize("shape", [(B, D, 3, 2), (B, D + 1, 2, 3), (B, D, 4, 6)])
@pytest.mark.parametrize("loss", HIDDEN_LOSSES)
def test_feature_maps_of_other_shapes_are_refused(loss, shape):
    with pytest.raises(ValueError, match=r"feature maps \[3, 8, 2, 3\].*hidden_weight=0"):
        loss(states(1, B, D, 2, 3), states(2, *shape))


# Logits


def test_soft_cross_entropy_of_bibert_and_bit_averages_over_classes():
    student, teacher = tensor([[2.0, 0.0]]), tensor([[0.0, 0.0]])
    loss = soft_cross_entropy(student, teacher, reduction="batch_class")
    assert_equal(loss, 0.563464, 1e-6)
    assert_equal(loss + 0.5 * F.cross_entropy(student, torch.tensor([0])), 0.626928, 1e-6)
    assert_equal(soft_cross_entropy(student, teacher), 1.126928, 1e-6)


def test_distributional_loss_of_reactnet_is_kl_plus_entropy():
    student, teacher = tensor([[0.0, 0.0, 0.0]] * 2), tensor([[1.0, 0.0, -1.0]] * 2)
    assert_equal(soft_cross_entropy(student, teacher), math.log(3))
    assert_equal(kl_divergence(student, teacher), 0.2662167, 1e-7)


def test_kl_matches_definition_at_a_temperature():
    student, teacher, T = states(0, 4, 3), states(1, 4, 3), 2.5
    p, q = (teacher / T).softmax(-1), (student / T).softmax(-1)
    assert_equal(kl_divergence(student, teacher, T), T**2 * (p * (p / q).log()).sum() / 4)


def test_class_losses_share_the_gradient_and_keep_its_size_at_any_temperature():
    teacher = states(1, 4, 3)
    for T in (1.0, 3.0):
        student = states(0, 4, 3).requires_grad_()
        expected = T * ((student / T).softmax(-1) - (teacher / T).softmax(-1)).detach() / 4
        for loss in CLASS_LOSSES:
            (gradient,) = torch.autograd.grad(loss(student, teacher, T), student)
            assert_equal(gradient, expected)


def test_class_losses_average_over_every_leading_index():
    student, teacher = states(0, 2, 3, 4), states(1, 2, 3, 4)
    for loss in CLASS_LOSSES:
        assert_equal(loss(student, teacher), loss(student.flatten(0, 1), teacher.flatten(0, 1)))


@pytest.mark.parametrize("shape", [(4, 3), (4, 1), (2, 2, 3)])
def test_losses_of_labels_are_those_of_binary_cross_entropy(shape):
    """Each label by itself: torch's loss on soft targets, summed over labels and averaged over samples."""
    student, teacher = states(0, *shape).requires_grad_(), states(1, *shape)
    samples = student.numel() // shape[-1]
    for T in (1.0, 2.5):
        p, q = (teacher / T).sigmoid(), (student / T).sigmoid().detach()
        expected = T**2 * F.binary_cross_entropy_with_logits(student / T, p, reduction="sum") / samples
        entropy = -(T**2) * (p * p.log() + (1 - p) * (1 - p).log()).sum() / samples
        assert_equal(binary_soft_cross_entropy(student, teacher, T), expected.detach())
        assert_equal(binary_soft_cross_entropy(student, teacher, T, "batch_class"), expected.detach() / shape[-1])
        assert_equal(binary_kl_divergence(student, teacher, T), expected.detach() - entropy)
        for loss in LABEL_LOSSES:
            (gradient,) = torch.autograd.grad(loss(student, teacher, T), student)
            assert_equal(gradient, T * (q - p) / samples)


def test_logits_mse_is_the_mean_over_elements():
    for shape in ((2, 1), (1, 2), (2,)):
        student = tensor([1.0, 3.0]).reshape(shape).requires_grad_()
        loss = logits_mse(student, tensor([0.0, 1.0]).reshape(shape))
        assert_equal(loss, 2.5)
        assert_equal(torch.autograd.grad(loss, student)[0].flatten(), tensor([1.0, 2.0]))


def test_equal_logits_have_no_divergence():
    student = states(0, 4, 3).requires_grad_()
    for loss in (kl_divergence, binary_kl_divergence, logits_mse):
        value = loss(student, student.detach())
        assert value.item() == 0
        assert_equal(torch.autograd.grad(value, student)[0], torch.zeros(4, 3))


def test_extreme_logits_stay_finite():
    student = torch.tensor([[1e4, -1e4, 0.0]], requires_grad=True)
    for loss in CLASS_LOSSES + LABEL_LOSSES:
        value = loss(student, torch.tensor([[-1e4, 1e4, torch.finfo(torch.float32).min]]))
        assert value.isfinite()
        assert torch.autograd.grad(value, student)[0].isfinite().all()


# Hidden states and relations


def test_relation_loss_worked_number():
    student, teacher = tensor([[[1.0, 0.0], [0.0, 1.0]]]), tensor([[[1.0, 0.0], [1.0, 0.0]]])
    for scale in (1.0, 3.0, 1e-4):
        assert_equal(relation_loss(scale * student, teacher, heads=1), math.sqrt(2 - math.sqrt(2)))


def test_relation_loss_has_one_norm_over_batch_and_heads():
    student, teacher = states(0), states(1)

    def relations(x):
        d = D // HEADS
        per_head = [[x[b, :, h * d : (h + 1) * d] for h in range(HEADS)] for b in range(B)]
        R = torch.stack([torch.stack([f @ f.T / d**0.5 for f in row]) for row in per_head])
        assert R.shape == (B, HEADS, S, S)
        return R / R.square().sum().sqrt()

    expected = (relations(student) - relations(teacher)).square().sum().sqrt()
    assert_equal(relation_loss(student, teacher, HEADS), expected)


def test_relation_loss_compares_different_widths():
    teacher = states(1)
    # Zero features inside each head change the width and no relation.
    student = torch.cat([teacher.unflatten(-1, (HEADS, -1)), torch.zeros(B, S, HEADS, 3)], dim=-1).flatten(2)
    assert student.shape[-1] != teacher.shape[-1]
    assert_equal(relation_loss(student.double(), teacher, HEADS), 0.0)
    assert relation_loss(states(2, B, S, 12), teacher, HEADS) > 0.1


def test_direction_loss_is_root_two_minus_two_cosines():
    student, teacher = states(0), states(1)
    cosine = F.cosine_similarity(student.flatten(), teacher.flatten(), dim=0)
    assert_equal(direction_loss(student, teacher), (2 - 2 * cosine).sqrt())
    assert_equal(direction_loss(7 * student, 0.1 * teacher), (2 - 2 * cosine).sqrt())
    assert_equal(direction_loss(-teacher, teacher), 2.0)


def test_mse_kinds_worked_numbers():
    student, teacher = tensor([[[1.0, 2.0], [5.0, 5.0]]]), tensor([[[0.0, 4.0], [1.0, 0.0]]])
    assert_equal(hidden_mse(student, teacher), (1 + 4 + 16 + 25) / 4)
    assert_equal(hidden_relative_mse(student, teacher), 46 / 17)
    mask = torch.tensor([[1, 0]])
    assert_equal(hidden_mse(student, teacher, mask), 5 / 2)
    assert_equal(hidden_relative_mse(student, teacher, mask), 5 / 16)
    assert_equal(hidden_relative_mse(torch.zeros_like(teacher), teacher), 1.0)


@pytest.mark.parametrize("loss", STATE_LOSSES)
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float32])
def test_padding_changes_nothing(loss, dtype):
    student, teacher = states(0).requires_grad_(), states(1)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 0, 0, 0]])
    value = loss(student, teacher, mask.to(dtype))
    (gradient,) = torch.autograd.grad(value, student)
    assert (gradient[mask == 0] == 0).all() and gradient.any()

    def pad(x, fill):
        return torch.cat([torch.full((B, 1, D), fill), x.detach(), torch.full((B, 4, D), fill)], dim=1).double()

    padded_mask = torch.cat([torch.zeros(B, 1), mask, torch.zeros(B, 4)], dim=1).to(dtype)
    for fill in (3.0, float("nan")):
        padded = pad(student, fill).requires_grad_()
        assert_equal(loss(padded, pad(teacher, -fill), padded_mask), value.detach())
        (padded_gradient,) = torch.autograd.grad(loss(padded, pad(teacher, fill), padded_mask), padded)
        assert_equal(padded_gradient, F.pad(gradient, (0, 0, 1, 4)))
    assert abs(loss(pad(student, 3.0), pad(teacher, -3.0)) - value) > 1e-3


@pytest.mark.parametrize("loss", STATE_LOSSES)
def test_masked_loss_is_that_of_the_tokens_alone(loss):
    student, teacher = states(0), states(1)
    mask = torch.tensor([[1, 1, 1, 0, 0]] * B)
    assert_equal(loss(student, teacher, mask), loss(student[:, :3], teacher[:, :3]))
    assert_equal(loss(student, teacher, torch.ones(B, S)), loss(student, teacher))


@pytest.mark.parametrize("loss", STATE_LOSSES)
def test_gradient_matches_finite_differences(loss):
    student, teacher = states(0).requires_grad_(), states(1)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 0, 0, 0]])
    (gradient,) = torch.autograd.grad(loss(student, teacher, mask), student)
    expected = numerical_gradient(loss, student.detach(), teacher, mask)
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("loss", STATE_LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_states_cost_nothing(loss, dtype):
    student = states(0, dtype=dtype).requires_grad_()
    value = loss(student, student.detach().clone())
    assert value.item() == 0
    assert_equal(torch.autograd.grad(value, student)[0], torch.zeros(B, S, D))


@pytest.mark.parametrize("loss", STATE_LOSSES)
@pytest.mark.parametrize("zero", ["student", "teacher", "both", "mask"])
def test_zero_states_are_finite(loss, zero):
    student = states(0, dtype=torch.float32) * (zero not in ("student", "both"))
    teacher = states(1, dtype=torch.float32) * (zero not in ("teacher", "both"))
    mask = torch.zeros(B, S) if zero == "mask" else None
    value = loss(student.requires_grad_(), teacher, mask)
    (gradient,) = torch.autograd.grad(value, student)
    assert value.isfinite() and gradient.isfinite().all()
    # The square of the gradient enters optimizers and clipping.
    assert gradient.square().sum().isfinite()
    if zero in ("both", "mask"):
        assert value.item() == 0


def test_a_state_without_direction_gets_no_gradient():
    student = torch.zeros(B, S, D, requires_grad=True)
    value = direction_loss(student, states(1, dtype=torch.float32))
    assert_equal(value.detach(), 1.0, 1e-6)
    assert not torch.autograd.grad(value, student)[0].any()


@pytest.mark.parametrize(
    "teacher", [states(1), 1e-3 * states(1), states(0) + 1e-3 * states(1), torch.zeros(B, S, D).double()]
)
def test_gradient_of_a_distance_of_directions_is_that_of_autograd(teacher):
    gradients = []
    for distance in (
        direction_loss,
        lambda s, t: (s / s.norm() - t / t.norm().clamp_min(1e-12)).norm(),
    ):
        student = states(0).requires_grad_()
        (3 * distance(student, teacher)).backward()
        gradients.append(student.grad)
    torch.testing.assert_close(*gradients)


def test_directions_near_each_other_keep_their_digits():
    teacher = states(1)
    noise = states(2)
    noise -= (noise * teacher).sum() / teacher.square().sum() * teacher
    expected = 1e-10 * noise.norm() / teacher.norm()
    assert_equal(direction_loss(teacher + 1e-10 * noise, teacher) / expected, 1.0, 1e-4)


# Layers


@pytest.mark.parametrize("kind", KINDS)
def test_hidden_loss_sums_over_layers(kind):
    students, teachers = [states(i) for i in range(4)], [states(10 + i) for i in range(4)]
    mask = torch.tensor([[1, 1, 1, 0, 0]] * B)
    expected = sum(KINDS[kind](s, t, mask) for s, t in zip(students, teachers, strict=True))
    assert_equal(hidden_loss(kind, students, tuple(teachers), mask), expected)


def test_deeper_teacher_is_read_uniformly():
    assert uniform_layer_map(12, 12) == list(range(13))
    assert uniform_layer_map(3, 12) == [0, 4, 8, 12]
    assert uniform_layer_map(1, 6) == [0, 6]
    students, teachers = [states(i) for i in range(3)], [states(10 + i) for i in range(7)]
    expected = sum(hidden_mse(s, teachers[i]) for s, i in zip(students, (0, 3, 6), strict=True))
    assert_equal(hidden_loss("mse", students, teachers), expected)


# Precision


@pytest.mark.parametrize("loss", [*CLASS_LOSSES, logits_mse, *STATE_LOSSES])
def test_precision(loss):
    student, teacher = states(0), states(1)
    assert loss(student, teacher).dtype == torch.float64
    for half in (torch.bfloat16, torch.float16):
        wide = loss(student.to(half).float(), teacher.to(half).float())
        assert wide.dtype == torch.float32
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(loss(student.to(half), teacher.to(half)), wide)
            assert torch.equal(loss(student.to(half), teacher.to(half).float()), wide)
            assert torch.equal(loss(student.to(half).float(), teacher.to(half).float()), wide)


def test_half_precision_gradient_arrives_in_its_dtype():
    student = states(0).bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss = relation_loss(student, states(1).bfloat16(), HEADS)
    loss.backward()
    assert student.grad.dtype == torch.bfloat16 and student.grad.any()


def test_direction_of_large_tensors_in_float32():
    # 2·10⁷ elements, more than 2²⁴: a running float32 sum of squares stops being exact.
    student = torch.rand(20, 1024, 1024, generator=torch.Generator().manual_seed(0))
    teacher = student.flip(0)
    expected = direction_loss(student.double(), teacher.double())
    assert_equal(direction_loss(student, teacher), expected.item(), 1e-5)


@pytest.mark.parametrize("loss", [*CLASS_LOSSES, logits_mse, *STATE_LOSSES])
def test_the_teacher_is_a_constant(loss):
    student, teacher = states(0).requires_grad_(), states(1).requires_grad_()
    loss(student, teacher).backward()
    assert student.grad.any() and teacher.grad is None


# Errors


@pytest.mark.parametrize("loss", CLASS_LOSSES)
@pytest.mark.parametrize("shape", [(4, 1), (4,)])
def test_single_logit_is_refused(loss, shape):
    with pytest.raises(ValueError, match="use logits_mse"):
        loss(states(0, *shape), states(1, *shape))


@pytest.mark.parametrize("loss", [*CLASS_LOSSES, logits_mse])
@pytest.mark.parametrize("student, teacher", [((4, 3), (4, 2)), ((4, 1), (4,)), ((0, 3), (0, 3))])
def test_logit_shapes_that_do_not_fit(loss, student, teacher):
    with pytest.raises(ValueError, match="expected one shape that is not empty; use a teacher") as error:
        loss(states(0, *student), states(1, *teacher))
    assert str(list(student)) in str(error.value) and str(list(teacher)) in str(error.value)


@pytest.mark.parametrize("loss", CLASS_LOSSES)
@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
def test_temperature_must_be_positive(loss, temperature):
    with pytest.raises(ValueError, match="expected a number above 0"):
        loss(states(0, 4, 3), states(1, 4, 3), temperature)


def test_unknown_names_are_listed():
    with pytest.raises(ValueError, match="'mean', expected 'batch' or 'batch_class'"):
        soft_cross_entropy(states(0, 4, 3), states(1, 4, 3), reduction="mean")
    with pytest.raises(ValueError, match=r"'cosine', expected one of .*direction.*mse.*relative_mse"):
        hidden_loss("cosine", [states(0)] * 2, [states(1)] * 2)


@pytest.mark.parametrize("loss", STATE_LOSSES)
@pytest.mark.parametrize("student, teacher", [((B, S, D), (B, 4, D)), ((B, D), (B, D)), ((0, S, D), (0, S, D))])
def test_tokens_that_do_not_fit(loss, student, teacher):
    with pytest.raises(ValueError, match="give both models the same tokens") as error:
        loss(states(0, *student), states(1, *teacher))
    assert str(list(student)) in str(error.value) and str(list(teacher)) in str(error.value)


@pytest.mark.parametrize("loss", HIDDEN_LOSSES)
def test_hidden_widths_must_agree(loss):
    with pytest.raises(ValueError, match=r"student of width 8 and a teacher of width 12.*use relation_loss"):
        loss(states(0), states(1, B, S, 12))


@pytest.mark.parametrize("loss", STATE_LOSSES)
@pytest.mark.parametrize("shape", [(B, 1, 1, S), (B, S - 1), (S,)])
def test_mask_must_be_tokens(loss, shape):
    with pytest.raises(ValueError, match="pass the tokenizer's attention_mask"):
        loss(states(0), states(1), torch.ones(shape))


@pytest.mark.parametrize("heads", [0, -2, 3])
def test_heads_must_divide_both_widths(heads):
    with pytest.raises(ValueError, match=f"Got heads={heads} for a student of width 8"):
        relation_loss(states(0), states(1), heads)
    with pytest.raises(ValueError, match="Got heads=4 for a teacher of width 6"):
        relation_loss(states(0), states(1, B, S, 6), 4)


@pytest.mark.parametrize("student, teacher", [(4, 6), (6, 3), (0, 0), (0, 6), (-1, -1), (3, 0)])
def test_depths_that_do_not_fit(student, teacher):
    with pytest.raises(ValueError, match=f"Got {student} student and {teacher} teacher layers"):
        uniform_layer_map(student, teacher)
    with pytest.raises(ValueError, match="choose another teacher"):
        hidden_loss("mse", [states(0)] * (student + 1), [states(1)] * (teacher + 1))
