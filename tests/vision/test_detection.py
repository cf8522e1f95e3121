"""Faster R-CNN on timm's backbones: against torchvision's own, trained, packed, saved and loaded.

On the machines of this project torchvision's compiled operators do not load; there `conftest.py` puts plain torch in
place of `nms` and `roi_align`. With a torchvision that works, its own operators run here.
"""

import importlib
import sys
from collections import OrderedDict

import pytest
import torch
from torch import nn

pytest.importorskip("timm", reason="needs the extra rebnn_hf[detection]")
pytest.importorskip("torchvision", reason="needs the extra rebnn_hf[detection]")

import timm
import torchvision
from safetensors.torch import load_file
from transformers import (
    AutoModelForObjectDetection,
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
    Trainer,
    TrainingArguments,
)

import rebnn_hf
from rebnn_hf.kernels import use_backend
from rebnn_hf.vision.detection import FasterRCNNConfig, FasterRCNNForObjectDetection, load_classifier

SMALL = {"min_size": 64, "max_size": 96, "fpn_channels": 16, "head_size": 32, "anchor_sizes": [8, 16, 32, 64, 128]}
FEW = {"rpn_post_nms_top_n_train": 60, "rpn_post_nms_top_n_test": 30, "box_batch_size_per_image": 32}
BACKBONE = "rebnn_resnet18"


def detector(backbone=BACKBONE, num_labels=2, seed=0, **options):
    torch.manual_seed(seed)
    config = FasterRCNNConfig(backbone=backbone, num_labels=num_labels, detector_args=FEW, **{**SMALL, **options})
    return FasterRCNNForObjectDetection(config)


def examples():
    """Two noisy images of different sizes with bright boxes on them."""
    generator = torch.Generator().manual_seed(1)
    images = [torch.rand(3, 64, 80, generator=generator) * 0.3, torch.rand(3, 70, 64, generator=generator) * 0.3]
    boxes = [torch.tensor([[10.0, 12, 40, 44], [50, 4, 74, 30]]), torch.tensor([[20.0, 20, 60, 50]])]
    classes = [torch.tensor([0, 1]), torch.tensor([1])]
    for image, rows, names in zip(images, boxes, classes, strict=True):
        for (x1, y1, x2, y2), name in zip(rows.int().tolist(), names.tolist(), strict=True):
            image[name, y1:y2, x1:x2] = 1
    return images, [{"boxes": b, "class_labels": c} for b, c in zip(boxes, classes, strict=True)]


def assert_same(found, expected):
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert len(one["boxes"]) > 0
        for name in ("boxes", "labels", "scores"):
            torch.testing.assert_close(one[name], other[name], rtol=0, atol=0)


def detections(model, images):
    with torch.no_grad(), use_backend("reference"):
        return model.eval()(images).detections


class Levels(nn.Module):
    """Backbone and pyramid as torchvision's detector takes them."""

    def __init__(self, model):
        super().__init__()
        self.model, self.out_channels = [model], model.config.fpn_channels

    def forward(self, x):
        _, levels = self.model[0].backbone.forward_intermediates(x, indices=[1, 2, 3, 4])
        return self.model[0].fpn(OrderedDict(zip("0123", levels, strict=True)))


def torchvisions_own(model):
    """The same detector, put together by torchvision."""
    anchors = torchvision.models.detection.anchor_utils.AnchorGenerator(
        tuple((size,) for size in SMALL["anchor_sizes"]), ((0.5, 1.0, 2.0),) * 5
    )
    heads = torchvision.models.detection.faster_rcnn
    other = heads.FasterRCNN(
        Levels(model),
        min_size=SMALL["min_size"],
        max_size=SMALL["max_size"],
        rpn_anchor_generator=anchors,
        box_head=heads.TwoMLPHead(SMALL["fpn_channels"] * 49, SMALL["head_size"]),
        box_predictor=heads.FastRCNNPredictor(SMALL["head_size"], 3),
        **FEW,
    )
    state = {name: value for name, value in model.state_dict().items() if name.startswith(("rpn.", "roi_heads."))}
    other.load_state_dict(state)
    return other


@pytest.mark.parametrize("backbone", [BACKBONE, "resnet18"])
def test_losses_and_detections_are_those_of_torchvisions_detector(backbone):
    model, (images, labels) = detector(backbone), examples()
    other = torchvisions_own(model)
    model.backbone.eval()  # statistics of BatchNorm would change between the two
    for part in (model, model.rpn, model.roi_heads, model.transform, other):
        part.training = True
    targets = [{"boxes": one["boxes"], "labels": one["class_labels"] + 1} for one in labels]
    torch.manual_seed(3)
    outputs = model(images, labels)
    torch.manual_seed(3)
    expected = other(images, targets)
    assert outputs.losses.keys() == expected.keys() and len(expected) == 4
    for name, loss in expected.items():
        torch.testing.assert_close(outputs.losses[name], loss, rtol=0, atol=0)
    torch.testing.assert_close(outputs.loss, sum(expected.values()))

    found = detections(model, images)
    with torch.no_grad(), use_backend("reference"):
        expected = other.eval()(images)
    assert_same(found, [{**one, "labels": one["labels"] - 1} for one in expected])


def test_what_stands_in_for_nms_keeps_the_best_of_those_that_overlap():
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 9], [0, 0, 10, 4], [20, 20, 30, 30]])
    scores = torch.tensor([0.5, 0.9, 0.8, 0.6])
    assert torchvision.ops.nms(boxes, scores, 0.5).tolist() == [
        1,
        2,
        3,
    ]  # overlaps of the first: 0.9, of the third: 0.44


def test_roi_align_takes_means_of_interpolated_samples():
    ramp = torch.arange(16.0).expand(1, 1, 16, 16)  # its value is the column
    pooled = torchvision.ops.roi_align(ramp, [torch.tensor([[2.0, 2.0, 10.0, 10.0]])], (2, 2), 1.0, 2)
    assert pooled[0, 0].tolist() == [[4.0, 8.0], [4.0, 8.0]]


def test_weights_start_as_torchvision_and_timm_start_them():
    model = detector()
    torch.testing.assert_close(model.rpn.head.cls_logits.weight.std(), torch.tensor(0.01), rtol=0.3, atol=0)
    conv = model.backbone.stages[3][1].conv
    torch.testing.assert_close(conv.weight.std(), torch.tensor((3 * 512 * 9) ** -0.5), rtol=0.01, atol=0)
    torch.testing.assert_close(conv.weight_scale, conv.weight.abs().mean((1, 2, 3)))


def test_packed_saved_and_loaded_finds_the_same(tmp_path):
    model, (images, _) = rebnn_hf.binarize(detector()), examples()
    assert rebnn_hf.binarize(model) is model and len(model.config.quantization_config.converted) == 16
    expected = detections(model, images)
    model.save_pretrained(tmp_path / "latent")
    latent = AutoModelForObjectDetection.from_pretrained(tmp_path / "latent")
    assert_same(detections(latent, images), expected)

    rebnn_hf.pack(model).save_pretrained(tmp_path / "packed")
    packed, info = AutoModelForObjectDetection.from_pretrained(tmp_path / "packed", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for one in (model, packed):
        assert_same(detections(one, images), expected)
    bits = {
        name
        for name, value in load_file(tmp_path / "packed" / "model.safetensors").items()
        if value.dtype is torch.uint8
    }
    assert bits == {f"backbone.stages.{i}.{j}.conv.weight" for i in range(4) for j in range(4)}
    with torch.no_grad():  # by the engine
        found = packed(images).detections
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one["scores"], other["scores"], rtol=0, atol=1e-3)


def test_only_the_backbone_of_a_float_detector_is_chosen():
    chosen = rebnn_hf.selected_modules(detector("resnet18"), rebnn_hf.ReBNNConfig(activation="elastic"))
    assert chosen == [f"backbone.layer{i}.{j}.conv{k}" for i in (1, 2, 3, 4) for j in (0, 1) for k in (1, 2)]


def test_operations_of_the_backbone_are_those_of_the_classifier():
    def of_blocks(model):
        rows = rebnn_hf.operations(model, image_size=64).rows
        return {row.bits: row.macs for row in rows if row.part == "convolutions of the blocks"}

    classifier = TimmWrapperForImageClassification(TimmWrapperConfig(architecture=BACKBONE, num_labels=2))
    assert of_blocks(detector()) == of_blocks(classifier) != {}


def test_training_lowers_the_loss(tmp_path):
    """As a user does it: lists of images and labels, a collator, the package's Trainer under the balance rule."""
    images, labels = examples()
    data = [{"pixel_values": image, "labels": label} for image, label in zip(images, labels, strict=True)]

    def collate(rows):
        return {name: [row[name] for row in rows] for name in rows[0]}

    options = {"learning_rate": 2e-3, "lr_scheduler_type": "constant", "max_steps": 12, "logging_steps": 3}
    options |= {
        "per_device_train_batch_size": 2,
        "report_to": "none",
        "remove_unused_columns": False,
        "use_cpu": True,
        "save_strategy": "no",
    }
    arguments = rebnn_hf.ReBNNTrainingArguments(str(tmp_path), plot_oscillation=False, disable_tqdm=True, **options)
    model = rebnn_hf.binarize(detector())
    trainer = rebnn_hf.ReBNNTrainer(model=model, args=arguments, train_dataset=data, data_collator=collate)
    trainer.train()
    logs = [log for log in trainer.state.log_history if "flip_ratio" in log]
    assert logs[-1]["loss"] < 0.6 * logs[0]["loss"] and all(log["flip_ratio"] > 0 for log in logs)

    float_trainer = Trainer(
        detector("test_resnet"),
        TrainingArguments(str(tmp_path), disable_tqdm=True, **options | {"max_steps": 1}),
        train_dataset=data,
        data_collator=collate,
    )
    assert float_trainer.train().training_loss > 0


def test_a_classifier_gives_its_weights(tmp_path):
    torch.manual_seed(5)
    config = TimmWrapperConfig(architecture=BACKBONE, num_labels=7)
    classifier = TimmWrapperForImageClassification(config)
    classifier.timm_model = timm.create_model(BACKBONE, num_classes=7)
    rebnn_hf.binarize(classifier).save_pretrained(tmp_path)
    classifier = TimmWrapperForImageClassification.from_pretrained(tmp_path)
    for source in (classifier, classifier.timm_model):
        model = detector()
        load_classifier(model, source)
        state, given = model.backbone.state_dict(), classifier.timm_model.state_dict()
        assert given.keys() - state.keys() == {"head.fc.weight", "head.fc.bias"}
        assert all(torch.equal(value, given[name]) for name, value in state.items())

    model = detector(backbone_args={"stem": "cifar"})
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"1 weights .* other shapes \(first: stem.conv.weight, \(64, 3, 7, 7\)"):
        load_classifier(model, classifier)
    with pytest.raises(ValueError, match=r"does not fit the model: .* missing"):
        load_classifier(model, timm.create_model("resnet18"))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda labels: labels.pop(), "2 images have 1 labels"),
        (lambda labels: labels[1].pop("boxes"), r"labels\[1\] lacks boxes"),
        (lambda labels: labels[0].update(class_labels=torch.tensor([0])), r"labels\[0\]: boxes are \(2, 4\)"),
        (lambda labels: labels[0].update(class_labels=torch.tensor([0, 2])), "are 0 to 2; the config has 2 labels"),
        (
            lambda labels: labels[1]["boxes"].copy_(torch.tensor([20.0, 20, 20, 50])),
            r"\[20.0, 20.0, 20.0, 50.0\] is empty",
        ),
        (
            lambda labels: labels[1]["boxes"].copy_(torch.tensor([20.0, 20, 65, 50])),
            "leaves its image of 64 x 70 pixels",
        ),
        (lambda labels: labels[1]["boxes"].fill_(float("nan")), "leaves its image"),
    ],
)
def test_wrong_labels_are_explained(change, complaint):
    images, labels = examples()
    change(labels)
    with pytest.raises(ValueError, match=complaint):
        detector("test_resnet").train()(images, labels)


def test_training_without_labels_and_wrong_configs_are_explained():
    with pytest.raises(ValueError, match="needs labels"):
        detector("test_resnet").train()(examples()[0])
    with pytest.raises(ValueError, match="expected 5, one for each level"):
        FasterRCNNConfig(anchor_sizes=[8])
    with pytest.raises(ValueError, match="fpn_channels=0 must be positive"):
        FasterRCNNConfig(fpn_channels=0)
    with pytest.raises(ValueError, match=r"backbone='test_vit' has features of 1/16, 1/16, .* 4 levels, each half"):
        detector("test_vit")


def test_import_without_torchvision_says_what_to_install(monkeypatch):
    monkeypatch.delitem(sys.modules, "rebnn_hf.vision.detection")
    for name in [name for name in sys.modules if name.startswith("torchvision.models.detection")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(ImportError, match=r"pip install 'rebnn_hf\[detection\]'"):
        importlib.import_module("rebnn_hf.vision.detection")
