"""The equations of the models, written out in plain torch, and random values for their parameters."""

import torch
import torch.nn.functional as F


@torch.no_grad()
def randomize(module, seed=0):
    """Values that show every term of the equations: weights on both sides of the window, shifts, statistics."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in module.state_dict().items():
        if not tensor.is_floating_point():
            continue
        tensor.copy_(torch.randn(tensor.shape, generator=generator, dtype=torch.float64))
        if "running_var" in name:
            tensor.abs_().add_(0.5)
        elif tensor.ndim == 4:
            tensor.mul_(0.6)
    return module.eval()


def sign(x):
    return torch.where(x >= 0, 1.0, -1.0).to(x.dtype)


def by_channel(v):
    return v[:, None, None]


def convolve(x, weight, stride=1):
    """Zero padding, then every window times every filter."""
    out_chs, _, side, _ = weight.shape
    windows = F.unfold(x, side, padding=side // 2, stride=stride)
    height, width = ((size + stride - 1) // stride for size in x.shape[-2:])
    return (weight.flatten(1) @ windows).view(len(x), out_chs, height, width)


def normalize(x, mean, var, weight, bias, eps=1e-5):
    return by_channel(weight) * (x - by_channel(mean)) / by_channel(var + eps).sqrt() + by_channel(bias)


def norm(x, layer):
    return normalize(x, layer.running_mean, layer.running_var, layer.weight, layer.bias)


def halve(x):
    """Means of 2x2 pixels, of fewer at odd borders."""
    rows = [
        torch.stack([x[..., i : i + 2, j : j + 2].mean((-2, -1)) for j in range(0, x.shape[-1], 2)], -1)
        for i in range(0, x.shape[-2], 2)
    ]
    return torch.stack(rows, -2)


def rprelu(x, shift_in, slope, shift_out):
    z = x + by_channel(shift_in)
    return torch.clamp(z, min=0) + by_channel(slope) * torch.clamp(z, max=0) + by_channel(shift_out)


def weight_of(conv, kind):
    """Weights in use: float, alpha of the row times signs, or mean|W| of the row times signs."""
    weight = conv.weight
    if kind == "float":
        return weight
    alpha = conv.weight_scale.abs() if kind == "learned" else weight.abs().mean((1, 2, 3))
    return alpha[:, None, None, None] * sign(weight)


def unit(layer, x, kind, shortcut, stride=1):
    """RPReLU(BN(conv(sign(x + shift))) + shortcut(x)), with the shortcut written out by the caller."""
    codes = sign(x + by_channel(layer.conv.input_binarizer.shift))
    y = norm(convolve(codes, weight_of(layer.conv, kind), stride), layer.norm) + shortcut(x)
    return rprelu(y, layer.act.shift_in, layer.act.slope, layer.act.shift_out)


def downsampled(layer):
    """The shortcut of a ResNet stage: average, then a float 1x1 convolution, then BatchNorm."""
    _, conv, bn = layer.shortcut
    return lambda x: norm(torch.einsum("oc,nchw->nohw", conv.weight[..., 0, 0], halve(x)), bn)


def resnet(model, x, kind):
    """Logits of a ResNet with the CIFAR stem."""
    x = norm(convolve(x, model.stem.conv.weight), model.stem.bn)
    for i, stage in enumerate(model.stages):
        for j, layer in enumerate(stage):
            halves = i > 0 and j == 0
            x = unit(layer, x, kind, downsampled(layer) if halves else lambda y: y, 2 if halves else 1)
    return x.mean((-2, -1)) @ model.head.fc.weight.T + model.head.fc.bias
