"""The models inside transformers: classifier and backbone wrappers."""

import equations
import pytest
import torch

pytest.importorskip("timm", reason="needs the extra rebnn_hf[vision]")

from transformers import (
    AutoModelForImageClassification,
    TimmBackbone,
    TimmBackboneConfig,
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
)

import rebnn_hf.vision

X = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("name, args", [("rebnn_resnet18", {"stem": "cifar"}), ("reactnet_a", None)])
def test_classifier_round_trip(name, args, tmp_path):
    config = TimmWrapperConfig(architecture=name, num_labels=4, model_args=args)
    model = equations.randomize(TimmWrapperForImageClassification(config))
    expected = model(X)
    model.save_pretrained(tmp_path)
    for cls in (TimmWrapperForImageClassification, AutoModelForImageClassification):
        loaded, info = cls.from_pretrained(tmp_path, output_loading_info=True)
        assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        state, own = loaded.state_dict(), model.state_dict()
        assert state.keys() == own.keys() and all(torch.equal(state[key], own[key]) for key in own)
        assert torch.equal(loaded.eval()(X).logits, expected.logits)
    hidden = model(X, output_hidden_states=True)
    assert torch.equal(hidden.logits, expected.logits) and len(hidden.hidden_states) == 5
    assert torch.equal(hidden.hidden_states[-1], model.timm_model.forward_features(X))


@pytest.mark.parametrize("name, chs", [("rebnn_resnet18", [128, 512]), ("rebnn_reactnet_a", [256, 1024])])
def test_backbone(name, chs, tmp_path):
    config = TimmBackboneConfig(backbone=name, out_indices=[2, 4], use_pretrained_backbone=False)
    backbone = equations.randomize(TimmBackbone(config))
    maps = backbone(X).feature_maps
    assert backbone.channels == chs
    assert [tuple(m.shape) for m in maps] == [(2, chs[0], 8, 8), (2, chs[1], 2, 2)]
    full = rebnn_hf.vision.__dict__[name](num_classes=0).eval()
    names = {key.replace("stages.", "stages_"): key for key in full.state_dict()}
    full.load_state_dict({names[k.removeprefix("_backbone.")]: v for k, v in backbone.state_dict().items()})
    _, expected = full.forward_intermediates(X, indices=[2, 4])
    assert all(torch.equal(m, e) for m, e in zip(maps, expected, strict=True))
