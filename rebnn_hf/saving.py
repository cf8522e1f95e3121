"""Plain modules in one file: what `save_pretrained` and `from_pretrained` are for transformers models."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import TypeVar

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from .architecture import require_model
from .binarizers import Elastic
from .checkpoints import written_aside
from .config import ReBNNConfig, give_config
from .layers import PACKED_TYPES
from .patching import prepare_for_loading, saved_config
from .soundness import check_bits, check_calibrated, check_finite
from .targets import check_saved

CONFIG_KEY = "rebnn_config"
"""Where the header of the file holds the config, as JSON."""

Model = TypeVar("Model", bound=nn.Module)


def save_model(model: nn.Module, path: str | Path) -> None:
    """Write a latent or packed plain module into one safetensors file: its tensors, and its config in the header.

    The code that builds the module is not in it: `load_model` fills one that is built the same way. See
    `docs/format.md`. The file is there as a whole or not at all.

    Args:
        model: made by `binarize`, not of transformers (those have `save_pretrained`).
        path: of the file, `model.safetensors` for example; its folder is made.

    Raises:
        TypeError: a transformers model, a wrapper, or no model.
        ValueError: not binarized, or a tensor under two names.
        OSError: the file could not be written.

    Example:
        >>> network = rebnn_hf.pack(rebnn_hf.binarize(torchvision.models.resnet18()))
        >>> rebnn_hf.save_model(network, "packed/model.safetensors")
        >>> network = rebnn_hf.load_model(torchvision.models.resnet18(), "packed/model.safetensors")
    """
    _require_plain(model, "save_model", "model.save_pretrained(folder)")
    config = saved_config(model)
    if config is None:
        raise ValueError(
            "save_model() expects a model made by rebnn_hf.binarize(), got a float one; safetensors.torch.save_model() "
            "saves those."
        )
    _require_one_name(model)
    tensors = {name: tensor.detach().contiguous() for name, tensor in model.state_dict().items()}
    metadata = {"format": "pt", CONFIG_KEY: json.dumps(config.to_dict())}
    path = Path(path)
    with written_aside(path.parent) as draft:
        save_file(tensors, draft / path.name, metadata)


def load_model(model: Model, path: str | Path) -> Model:
    """Turn a float module into the 1-bit one that `save_model` wrote, in place.

    The result has the very tensors of the file, their types included, and the mode (training or eval) of the module. An
    optimizer is built afterwards.

    Args:
        model: float, built like the one that was saved, with any values; it may be on the meta device. A network of
            `rebnn_hf.vision`, whose layers are latent from the start, serves too.
        path: of the file.

    Returns:
        The same module, on its device (from the meta device: on the CPU).

    Raises:
        TypeError: a transformers model, a wrapper, or no model.
        ValueError: binarized already, built otherwise than the one that was saved, or a damaged file. The module is as
            it was.
        OSError: there is no such file.
    """
    _require_plain(model, "load_model", "AutoModel....from_pretrained(folder)")
    if saved_config(model) is not None:
        raise ValueError("load_model() expects the float module, built anew, and this one is binarized already.")
    config, tensors = _read(Path(path))
    check_saved(model, config)
    _require_values_of_unsaved(model)
    rehearsal = _without_values(model)
    prepare_for_loading(rehearsal, config)
    _check_tensors(rehearsal, tensors)
    rehearsal.load_state_dict(tensors, assign=True)
    _check_loaded(rehearsal, config)

    prepare_for_loading(model, config)
    places = {name: tensor.device for name, tensor in model.state_dict().items() if not tensor.is_meta}
    model.load_state_dict({name: t.to(places.get(name, "cpu")) for name, t in tensors.items()}, assign=True)
    give_config(model, config)
    return model


def _require_plain(model: object, function: str, instead: str) -> None:
    require_model(model, function)
    if isinstance(model, PreTrainedModel):
        raise TypeError(f"{function}() is for plain modules; a transformers model has {instead}.")


def _require_one_name(model: nn.Module) -> None:
    names: dict[int, str] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if names.setdefault(id(tensor), name) != name:
            raise ValueError(
                f"{name} and {names[id(tensor)]} are one tensor, which a file of tensors cannot say; give each module "
                "its own."
            )


def _require_values_of_unsaved(model: nn.Module) -> None:
    saved = model.state_dict().keys()
    empty = [name for name, buffer in model.named_buffers() if buffer.is_meta and name not in saved]
    if empty:
        raise ValueError(
            f"{empty[0]} is on the meta device and in no file: it is computed when {type(model).__name__} is built; "
            "build that on the CPU."
        )


def _read(path: Path) -> tuple[ReBNNConfig, dict[str, Tensor]]:
    try:
        with safe_open(path, "pt") as file:
            text = (file.metadata() or {}).get(CONFIG_KEY)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is no whole safetensors file: {error}") from error
    if text is None:
        raise ValueError(f"{path} has no {CONFIG_KEY} in its header: rebnn_hf.save_model() did not write it.")
    try:
        fields = json.loads(text)
    except ValueError as error:
        raise ValueError(f"the {CONFIG_KEY} of {path} is not JSON ({error}); it was damaged.") from error
    if not isinstance(fields, dict):
        raise ValueError(f"the {CONFIG_KEY} of {path} is a {type(fields).__name__}, not an object; it was damaged.")
    return ReBNNConfig.from_dict(fields), tensors


def _without_values(model: nn.Module) -> nn.Module:
    """A copy on the meta device, made without copying values."""
    memo: dict[int, object] = {}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)
    for buffer in model.buffers():
        memo[id(buffer)] = buffer.to("meta")
    return copy.deepcopy(model, memo)


def _check_tensors(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """The names, shapes and kinds of what a module takes."""
    own = model.state_dict()
    missing, unexpected = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    if missing or unexpected:
        raise ValueError(
            f"the file does not fit this {type(model).__name__}: {len(missing)} tensors are missing "
            f"({_some(missing)}), {len(unexpected)} are unexpected ({_some(unexpected)}); build it as the one that was "
            "saved."
        )
    for name, tensor in tensors.items():
        if tensor.shape != own[name].shape:
            raise ValueError(
                f"{name} is {tuple(tensor.shape)} in the file and {tuple(own[name].shape)} in this "
                f"{type(model).__name__}; build it as the one that was saved."
            )
        same = tensor.is_floating_point() if own[name].is_floating_point() else tensor.dtype == own[name].dtype
        if not same:
            raise ValueError(f"{name} is {tensor.dtype} in the file, in place of {own[name].dtype}; it was damaged.")


def _check_loaded(model: nn.Module, config: ReBNNConfig) -> None:
    for name, module in model.named_modules():
        if isinstance(module, PACKED_TYPES):
            check_bits(name, module)
        check_finite(name, module)
        if isinstance(module, Elastic):
            check_calibrated(name, module, config)


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "") if names else "none"
