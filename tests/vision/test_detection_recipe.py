"""The detection recipe from end to end on a few of its shapes, its continuation, its float baseline and its mistakes.

Where torchvision's compiled operators do not load, `conftest.py` puts plain torch in their place.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("timm", reason="needs the extra rebnn_hf[detection]")
pytest.importorskip("pycocotools", reason="needs the extra rebnn_hf[detection]")
pytest.importorskip("sklearn", reason="needs the extra rebnn_hf[recipes]")
pytest.importorskip("datasets", reason="needs the extra rebnn_hf[recipes]")

import timm
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from timm.models import register_model
from transformers import AutoModelForObjectDetection, TimmWrapperConfig, TimmWrapperForImageClassification

import rebnn_hf
from rebnn_hf.checkpoints import STATE_FILE
from rebnn_hf.kernels import use_backend
from rebnn_hf.vision import resnet

sys.path.insert(0, str(Path(__file__).parents[2] / "recipes"))

import detection
from detection_arguments import parse_detection_arguments
from detection_data import load_shapes, spread
from recipe_folder import RunFolder, read_json
from recipe_training import CompactProgress

STAGES = ("stage-1", "latent", "packed")
TRAINED, EVALUATED, STEPS = 6, 2, 3
SMALL = f"""
    --max_train_samples {TRAINED} --max_eval_samples {EVALUATED} --batch_size 2 --max_steps {STEPS} --save_steps 2
    --logging_steps 3 --seed 3 --min_size 64 --max_size 64 --fpn_channels 8 --head_size 32
    --anchor_sizes 8 16 32 64 128 --learning_rate 1e-4 --stage_one_learning_rate 1e-4
""".split()
BACKBONE, LAYERS = "short_rebnn_resnet", 4


@register_model
def short_rebnn_resnet(pretrained=False, **kwargs):
    """`rebnn_resnet18` with a fourth of its layers."""
    return resnet._create("rebnn_resnet18", pretrained, (1, 1, 1, 1), rebnn_hf.WeightRule(), **kwargs)


def run(folder: Path, *options: str) -> dict:
    """Runs the recipe in this process and reads its results."""
    detection.main(["--output_dir", str(folder), *SMALL, *options])
    return read_json(folder / "results.json")


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=0, msg=name)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> SimpleNamespace:
    folder = tmp_path_factory.mktemp("shapes") / "run"
    return SimpleNamespace(folder=folder, results=run(folder, "--model", BACKBONE))


@pytest.fixture
def copied(finished, tmp_path) -> Path:
    return Path(shutil.copytree(finished.folder, tmp_path / "copy"))


def detections_of(folder: Path, shapes: Path) -> list[dict[str, np.ndarray]]:
    """What a saved model finds on the validation images."""
    images = spread(load_shapes(shapes)[1]["validation"], EVALUATED)
    model = AutoModelForObjectDetection.from_pretrained(folder)
    with torch.no_grad():
        found = [model([image.pixels()]).detections[0] for image in images]
    return [{name: tensor.numpy() for name, tensor in one.items()} for one in found]


def assert_same(found: list[dict[str, np.ndarray]], expected: list[dict[str, np.ndarray]]) -> None:
    assert len(found) == len(expected) and all(len(one["boxes"]) for one in found)
    for one, other in zip(found, expected, strict=True):
        assert all((one[name] == other[name]).all() for name in ("boxes", "labels", "scores"))


# ------------------------------------------------------------------------------------------------------- a whole run


def test_folder_holds_what_it_should_and_nothing_else(finished):
    pictures = {"oscillation.png", "epoch_flips.png", "weights.png"}
    names = {"shapes", "stages", "settings.json", "results.json", *pictures}
    assert {path.name for path in finished.folder.iterdir()} == {*STAGES, *names}
    assert not list(finished.folder.rglob("checkpoint-*"))
    assert all((finished.folder / name).read_bytes().startswith(b"\x89PNG") for name in pictures)


def test_scores_are_those_of_what_the_saved_folder_finds(finished, tmp_path):
    """After three steps next to nothing is found: that scores are right, the objects themselves have to show."""
    options = ["--output_dir", str(finished.folder), *SMALL, "--model", BACKBONE]
    job = detection.prepare_detection(parse_detection_arguments(options))
    found = detections_of(finished.folder / "packed", tmp_path)
    assert_same(job.validate(job.load(finished.folder / "packed")), found)
    scores = job.score(found)
    assert finished.results["scores"]["packed"] == pytest.approx(scores.means)
    assert finished.results["scores_by_class"]["packed"] == pytest.approx(scores.by_class)
    perfect = [
        {"boxes": image.boxes, "labels": image.labels, "scores": np.full(len(image.labels), 0.5)}
        for image in job.data["validation"]
    ]
    assert job.score(perfect).means == {"mAP": pytest.approx(1), "AP50": pytest.approx(1), "AP75": pytest.approx(1)}


def test_the_packed_folder_finds_what_the_latent_one_does(finished, tmp_path):
    with use_backend("reference"):
        packed, latent = (detections_of(finished.folder / stage, tmp_path) for stage in ("packed", "latent"))
    assert_same(packed, latent)
    assert finished.results["largest_difference"] == 0


def test_results_say_how_they_were_made(finished):
    results = finished.results
    assert results["examples"] == {"train": TRAINED, "validation": EVALUATED} and results["task"] == "shapes"
    assert results["steps"] == {"stage-1": STEPS, "latent": STEPS} and results["classes"] == ["disc", "rectangle"]
    assert results["bytes"]["packed"] < results["bytes"]["latent"] / 4
    assert results["arguments"]["min_size"] == 64 and results["arguments"]["weight_decay"] == 1e-4
    assert {"timm", "torchvision"} <= results["versions"].keys() and results["oscillation"]["flips_per_weight"] > 0


def test_losses_are_logged_by_part_and_the_card_says_what_is_one_bit(finished):
    for stage, more in (("stage-1", 0), ("latent", LAYERS)):
        logs = [log for log in read_json(finished.folder / stage / STATE_FILE)["log_history"] if "loss" in log]
        assert [log["step"] for log in logs] == [1, STEPS]  # the second is a mean
        assert sum(key.startswith("flip_ratio/") for key in logs[0]) == more
        for log in logs:
            parts = ("loss_classifier", "loss_box_reg", "loss_objectness", "loss_rpn_box_reg")
            assert sum(log[part] for part in parts) == pytest.approx(log["loss"], rel=1e-3)
    card = ModelCard.load(finished.folder / "packed" / "README.md")
    assert (card.data.library_name, card.data.pipeline_tag) == ("rebnn_hf", "object-detection")
    assert "import rebnn_hf.vision.detection" in card.text
    assert "PackedConv2d" in card.text and "| rectangle" in card.text
    assert card.data.eval_results[0].metric_value == pytest.approx(
        finished.results["scores"]["packed"]["mAP"], abs=1e-4
    )


def test_the_card_gets_the_licence_also_later(copied):
    assert "license" not in ModelCard.load(copied / "packed" / "README.md").data.to_dict()
    run(copied, "--model", BACKBONE, "--license", "mit")
    assert ModelCard.load(copied / "packed" / "README.md").data.license == "mit"


def test_the_last_stage_begins_with_what_the_first_learned(finished):
    options = ["--output_dir", str(finished.folder), *SMALL, "--model", BACKBONE]
    job = detection.prepare_detection(parse_detection_arguments(options))
    model = job.new_binary_model()
    detection.continue_stage_one(model, job.load(finished.folder / "stage-1"))
    first, last = weights(finished.folder / "stage-1"), model.state_dict()
    made = {name for name in last if name.endswith((".weight_scale", ".balance"))}
    assert len(made) == 2 * LAYERS
    assert_equal({name: value for name, value in last.items() if name not in made}, first)
    scale = last["backbone.stages.3.0.conv.weight_scale"]
    torch.testing.assert_close(scale, first["backbone.stages.3.0.conv.weight"].abs().mean((1, 2, 3)))


# ----------------------------------------------------------------------------------------------------- running again


def test_same_command_repeats_nothing_and_another_one_is_refused(finished, capsys):
    before = {path: path.stat().st_mtime_ns for path in finished.folder.rglob("*.safetensors")}
    assert run(finished.folder, "--model", BACKBONE) == finished.results
    output = capsys.readouterr().out
    assert output.count("already complete") == 3 and "| packed" in output and "| disc" in output
    with pytest.raises(SystemExit, match="balance_rule: None -> const"):
        run(finished.folder, "--model", BACKBONE, "--balance_rule", "const", "--balance_value", "1e-4")
    assert {path: path.stat().st_mtime_ns for path in finished.folder.rglob("*.safetensors")} == before


@pytest.mark.slow
def test_interrupted_training_continues_to_the_same_weights(finished, copied, monkeypatch, capsys):
    """Stopped in the third step, behind the checkpoint of the second."""

    def stop(self, args, state, control, logs, **kwargs):
        if state.global_step == 3 and "loss" in logs:
            raise KeyboardInterrupt

    for path in (*(copied / stage for stage in STAGES), copied / "stages"):
        shutil.rmtree(path)
    (copied / "results.json").unlink()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(CompactProgress, "on_log", stop)
        run(copied, "--model", BACKBONE)
    assert RunFolder(copied, STAGES).record("stage-1") is None and not (copied / "results.json").exists()
    results = run(copied, "--model", BACKBONE)
    assert "continuing from step 2 of 3" in capsys.readouterr().out
    for name in STAGES:
        assert_equal(weights(copied / name), weights(finished.folder / name))
    assert results["scores"] == finished.results["scores"]


# ------------------------------------------------------------------------------------- float baselines and classifiers


def test_the_float_baseline_is_the_same_command_with_a_float_backbone(tmp_path):
    results = run(tmp_path / "run", "--model", "test_resnet")
    assert results["scores"].keys() == {"float"} and "size" not in results and results["steps"] == {"float": STEPS}
    model = AutoModelForObjectDetection.from_pretrained(tmp_path / "run" / "float")
    assert model.config.backbone == "test_resnet" and model.config.id2label == {0: "disc", 1: "rectangle"}
    assert "What is 1-bit" not in ModelCard.load(tmp_path / "run" / "float" / "README.md").text
    with pytest.raises(SystemExit, match="--balance_rule does nothing: the backbone test_resnet is float"):
        run(tmp_path / "other", "--model", "test_resnet", "--balance_rule", "none")


def classifier(folder: Path, **model_args) -> Path:
    """What `image_classification.py` leaves of a stage."""
    config = TimmWrapperConfig(architecture=BACKBONE, num_labels=3, model_args=model_args)
    config.pretrained_cfg = {"mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)}
    model = TimmWrapperForImageClassification(config)
    model.timm_model = timm.create_model(BACKBONE, num_classes=3, **model_args)
    if model_args.get("binary_weights", True):
        rebnn_hf.binarize(model)
    model.save_pretrained(folder)
    return folder


def test_a_latent_classifier_is_where_the_detector_begins(tmp_path):
    source = classifier(tmp_path / "latent")
    options = ["--backbone", str(source), "--max_steps", "1", "--learning_rate", "1e-30", "--weight_decay", "0"]
    results = run(tmp_path / "run", *options)
    assert results["scores"].keys() == {"latent", "packed"} and results["steps"] == {"latent": 1}
    given, learned = weights(source), weights(tmp_path / "run" / "latent")
    convs = [name for name in given if name.endswith((".conv.weight", ".weight_scale"))]
    assert len(convs) == 1 + 2 * LAYERS
    for name in convs:
        own = learned[name.replace("timm_model.", "backbone.")]
        torch.testing.assert_close(own, given[name], rtol=0, atol=1e-20, msg=name)
    config = AutoModelForObjectDetection.from_pretrained(tmp_path / "run" / "packed").config
    assert config.image_mean == [0.5, 0.5, 0.5] and config.backbone == BACKBONE
    with pytest.raises(
        SystemExit, match=r"--backbone .*packed is packed and cannot be trained: pass the folder `latent`"
    ):
        model = TimmWrapperForImageClassification.from_pretrained(source)
        rebnn_hf.pack(model).save_pretrained(tmp_path / "packed")
        run(tmp_path / "other", "--backbone", str(tmp_path / "packed"))


def test_a_classifier_of_stage_one_goes_through_both_stages(tmp_path):
    source = classifier(tmp_path / "first", binary_weights=False)
    arguments = parse_detection_arguments(["--output_dir", str(tmp_path / "run"), *SMALL, "--backbone", str(source)])
    job = detection.prepare_detection(arguments)
    assert job.run.stages == STAGES and job.backbone_options["image_std"] == [0.25, 0.25, 0.25]
    model = job.new_model(binary_weights=False)
    job.begin_with_classifier(model)
    name = "stages.1.0.conv.weight"
    assert torch.equal(model.backbone.state_dict()[name], weights(source)[f"timm_model.{name}"])


# ---------------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--train_split", "train"], "are splits of --data_dir"),
        (["--data_dir", "x", "--train_split", "train"], "belong together"),
        (["--backbone", "x", "--model", "resnet18"], "leave out --model and --stem"),
        (["--anchor_sizes", "8", "16"], "must be five positive sizes"),
        (["--learning_rate", "0"], "--learning_rate 0.0 must be greater than 0"),
        (["--fpn_channels", "0"], "--fpn_channels 0 must be greater than 0"),
        (["--weight_decay", "-1"], "must not be negative"),
        (["--warm_up", "1"], "is a share of the steps"),
        (["--workers", "-1"], "must not be negative"),
        (["--max_eval_samples", "0"], "--max_eval_samples 0 must be greater than 0"),
        (["--balance_rule", "const", "--balance_value", "-1"], "must be"),
        (["--balance_value", "1e-4"], "--balance_value 1e-4 does nothing without --balance_rule const"),
        (["--balance_strength", "2"], "--balance_strength 2 does nothing without --balance_form decoupled"),
        (["--max_steps", "0"], "--max_steps 0 must be greater than 0, or -1"),
        (["--gradient_accumulation_steps", "0"], "--gradient_accumulation_steps 0 must be greater than 0"),
    ],
)
def test_wrong_options_are_explained(options, complaint, capsys):
    with pytest.raises(SystemExit):
        parse_detection_arguments(options)
    assert complaint in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--model", "rebnn_resnet19"], "no detector with the backbone rebnn_resnet19: Unknown model"),
        (["--model", "resnet18", "--stem", "cifar"], "no detector with the backbone resnet18: .*stem"),
        (["--model", "test_vit"], "each half as large"),
        (["--backbone", "no/such"], "no/such cannot be loaded"),
        (["--data_dir", "no/such"], "--data_dir no/such is no folder"),
    ],
)
def test_what_cannot_be_had_is_said_in_one_sentence_before_training(options, complaint, tmp_path):
    with pytest.raises(SystemExit, match=complaint) as refusal:
        run(tmp_path / "run", *options)
    assert len(str(refusal.value).splitlines()) == 1
    assert not any((tmp_path / "run" / stage).exists() for stage in STAGES)
