"""The recipe from end to end on a few digits, its continuation, folders of images, and its parts."""

from __future__ import annotations

import json
import random
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("timm", reason="needs the extra rebnn_hf[vision]")
pytest.importorskip("sklearn", reason="needs the extra rebnn_hf[recipes]")
pytest.importorskip("datasets", reason="needs the extra rebnn_hf[recipes]")

from datasets import ClassLabel
from huggingface_hub import ModelCard
from PIL.Image import fromarray
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModelForImageClassification

from rebnn_hf.checkpoints import STATE_FILE
from rebnn_hf.kernels import use_backend

sys.path.insert(0, str(Path(__file__).parents[2] / "recipes"))

import image_classification
from image_arguments import parse_image_arguments
from image_data import digits, in_our_columns, load_folder, load_images, spread
from image_training import EpochSampler, StageOneTrainer, UpdateAverage
from image_transforms import TrainingImages, seeded, training_transform
from recipe_folder import RunFolder, read_json
from recipe_training import CompactProgress

STAGES = ("teacher", "stage-1", "latent", "packed")
TRAINED, EVALUATED, STEPS = 64, 50, 4
SMALL = ["--max_train_samples", TRAINED, "--max_eval_samples", EVALUATED, "--image_size", 8, "--batch_size", 16]
SMALL += ["--teacher_model", "test_resnet", "--teacher_epochs", 1, "--max_steps", STEPS, "--logging_steps", 1]
SMALL = [str(word) for word in [*SMALL, "--save_steps", 2, "--seed", 3]]


def run(folder: Path, *options: str) -> dict:
    """Runs the recipe in this process and reads its results."""
    image_classification.main(["--output_dir", str(folder), *options])
    return read_json(folder / "results.json")


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=0, msg=name)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> SimpleNamespace:
    folder = tmp_path_factory.mktemp("digits") / "run"
    return SimpleNamespace(folder=folder, results=run(folder, *SMALL))


@pytest.fixture
def copied(finished, tmp_path) -> Path:
    return Path(shutil.copytree(finished.folder, tmp_path / "copy"))


def logits_of(folder: Path) -> torch.Tensor:
    """Logits of a saved model for the validation digits, without any code of the recipe but its data."""
    processor = AutoImageProcessor.from_pretrained(folder)
    model = AutoModelForImageClassification.from_pretrained(folder)
    images = [image.convert("RGB") for image in spread(digits()["validation"], EVALUATED)["image"]]
    with torch.no_grad(), use_backend("reference"):
        return model(**processor(images, return_tensors="pt")).logits


# ------------------------------------------------------------------------------------------------------- a whole run


def test_folder_holds_what_it_should_and_nothing_else(finished):
    assert {path.name for path in finished.folder.iterdir()} == {
        *STAGES,
        "stages",
        "settings.json",
        "results.json",
        "oscillation.png",
        "epoch_flips.png",
        "weights.png",
    }
    assert not list(finished.folder.rglob("checkpoint-*"))
    for picture in finished.folder.glob("*.png"):
        assert picture.read_bytes().startswith(b"\x89PNG")


def test_the_packed_folder_answers_like_the_latent_one(finished):
    assert torch.equal(logits_of(finished.folder / "packed"), logits_of(finished.folder / "latent"))
    assert finished.results["max_logit_difference"] < 1e-4


def test_scores_are_those_of_the_saved_folders(finished):
    labels = torch.tensor(spread(digits()["validation"], EVALUATED)["label"])
    for stage in STAGES:
        accuracy = (logits_of(finished.folder / stage).argmax(-1) == labels).float().mean().item()
        assert finished.results["scores"][stage] == {"accuracy": pytest.approx(accuracy)}, stage


def test_results_say_how_they_were_made(finished):
    results = finished.results
    assert results["examples"] == {"train": TRAINED, "validation": EVALUATED} and results["task"] == "digits"
    assert results["steps"] == {"teacher": TRAINED // 16, "stage-1": STEPS, "latent": STEPS}
    assert results["bytes"]["packed"] < results["bytes"]["latent"] / 15
    assert results["arguments"]["model"] == "rebnn_resnet18" and results["arguments"]["learning_rate"] == 1e-3
    assert {"timm", "torch"} <= results["versions"].keys() and results["oscillation"]["flips_per_weight"] > 0
    assert all(results["seconds"][stage] > 0 for stage in STAGES)


def test_layers_are_logged_and_the_card_says_what_is_one_bit(finished):
    logs = read_json(finished.folder / "latent" / STATE_FILE)["log_history"]
    assert sum(key.startswith("flip_ratio/") for key in logs[0]) == 16
    card = ModelCard.load(finished.folder / "packed" / "README.md")
    assert card.data.pipeline_tag == "image-classification" and "import rebnn_hf.vision" in card.text
    assert card.text.count("PackedConv2d") >= 1 and "distilled from test_resnet in two stages" in card.text
    assert card.data.eval_results[0].metric_value == pytest.approx(finished.results["scores"]["packed"]["accuracy"])


def epoch_flips(folder: Path) -> list[dict[str, float]]:
    return [log for log in read_json(folder / "latent" / STATE_FILE)["log_history"] if "epoch_flip_ratio" in log]


def test_flip_ratios_of_the_epoch_are_those_of_the_saved_weights(finished):
    """The one epoch of stage two begins with the weights of stage one."""
    first, last = weights(finished.folder / "stage-1"), weights(finished.folder / "latent")
    (log,) = epoch_flips(finished.folder)
    assert log["epoch"] == 1 and log["step"] == STEPS
    layers = [name.removeprefix("epoch_flip_ratio/") for name in log if name.startswith("epoch_flip_ratio/")]
    changed = {name: (first[f"{name}.weight"] < 0) != (last[f"{name}.weight"] < 0) for name in layers}
    assert len(layers) == 16 and any(mask.any() for mask in changed.values())
    for name, mask in changed.items():
        assert log[f"epoch_flip_ratio/{name}"] == pytest.approx(mask.float().mean().item()), name
    total = sum(mask.sum().item() for mask in changed.values()) / sum(mask.numel() for mask in changed.values())
    assert log["epoch_flip_ratio"] == pytest.approx(total)


def test_stage_two_begins_with_the_weights_of_stage_one(finished, copied):
    """Where it learns nothing, all that is left of it are the tensors of stage one and scales made of them."""
    run(copied, *SMALL, "--learning_rate", "1e-30", "--overwrite")
    first, last = weights(copied / "stage-1"), weights(copied / "latent")
    assert_equal(first, weights(finished.folder / "stage-1"))
    made = {name for name in last if name.endswith((".weight_scale", ".balance"))}
    assert last.keys() - made == first.keys() and len(made) == 2 * 16
    statistics = (".running_mean", ".running_var", ".num_batches_tracked")  # of BatchNorm: they see new images
    for name in first:
        if not name.endswith(statistics):
            torch.testing.assert_close(last[name], first[name], rtol=0, atol=1e-20, msg=name)
    conv = next(name for name in first if name.endswith("stages.3.2.conv.weight"))
    scale = last[conv.replace(".weight", ".weight_scale")]
    torch.testing.assert_close(scale, first[conv].abs().mean((1, 2, 3)))


def test_the_average_of_the_last_stage_is_what_is_packed(finished, copied, monkeypatch, capsys):
    """Interrupted in the third step, behind the checkpoint of the second; by hand: decays 0, d1, d2, d3 of timm."""
    steps = []

    def watch(self, args, state, control, **kwargs):
        if not any(step == state.global_step for step, _ in steps):
            model = {name: tensor.clone() for name, tensor in self.trainer.model.state_dict().items()}
            steps.append((state.global_step, model))
        update(self, args, state, control, **kwargs)

    def stop(self, args, state, control, logs, **kwargs):
        if state.global_step == 3 and "loss" in logs:
            raise KeyboardInterrupt

    update = UpdateAverage.on_step_end
    monkeypatch.setattr(UpdateAverage, "on_step_end", watch)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(CompactProgress, "on_log", stop)
        run(copied, *SMALL, "--ema", "0.5", "--overwrite")
    results = run(copied, *SMALL, "--ema", "0.5")
    assert "continuing from step 2 of 4" in capsys.readouterr().out and results["arguments"]["ema"] == 0.5
    assert [step for step, _ in steps] == [1, 2, 3, 4]
    average = steps[0][1]
    for step, model in steps[1:]:
        decay = min(1 - step ** (-2 / 3), 0.5)
        average = {n: decay * average[n] + (1 - decay) * t if t.is_floating_point() else t for n, t in model.items()}
    latent = weights(copied / "latent")
    for name, tensor in latent.items():
        torch.testing.assert_close(tensor, average[name], msg=name)
    assert not any(torch.equal(latent[name], steps[-1][1][name]) for name in latent if name.endswith("weight_scale"))
    assert_equal(steps[-1][1], weights(finished.folder / "latent"))  # the training itself is the same
    assert torch.equal(logits_of(copied / "packed"), logits_of(copied / "latent"))


def test_the_balance_rule_can_be_chosen(copied):
    chosen = ["--balance_rule", "const", "--balance_value", "3e-4"]
    with pytest.raises(SystemExit, match="balance_rule: None -> const"):
        run(copied, *SMALL, *chosen)
    kept = (copied / "stage-1" / "model.safetensors").stat().st_mtime_ns
    run(copied, *SMALL, *chosen, "--overwrite")
    assert (copied / "stage-1" / "model.safetensors").stat().st_mtime_ns == kept
    for stage in ("latent", "packed"):
        config = json.loads((copied / stage / "config.json").read_text())["quantization_config"]
        assert (config["balance_rule"], config["balance_value"]) == ("const", 3e-4)
    logs = read_json(copied / "latent" / STATE_FILE)["log_history"]
    assert [logs[0]["balance_mean"], logs[0]["balance_max"]] == pytest.approx([3e-4, 3e-4])


def test_the_baseline_has_closed_form_scales_and_no_balance(tmp_path, finished):
    teacher = Path(shutil.copytree(finished.folder / "teacher", tmp_path / "given"))
    options = ["--teacher", str(teacher), "--model", "reactnet_resnet18", "--packed_dtype", "float16"]
    results = run(tmp_path / "run", *SMALL, *options, "--bf16", "--image_size", "32")
    assert results["steps"] == {"stage-1": STEPS, "latent": STEPS}
    config = json.loads((tmp_path / "run" / "latent" / "config.json").read_text())["quantization_config"]
    assert (config["weight_scale"], config["balance_rule"], config["ste_slope"]) == ("mean_abs", "none", "unit")
    assert results["bytes"]["packed"] < finished.results["bytes"]["packed"]


# ----------------------------------------------------------------------------------------------------- running again


def test_same_command_repeats_nothing(finished, capsys):
    before = {path: path.stat().st_mtime_ns for path in finished.folder.rglob("*.safetensors")}
    assert run(finished.folder, *SMALL) == finished.results
    assert {path: path.stat().st_mtime_ns for path in finished.folder.rglob("*.safetensors")} == before
    output = capsys.readouterr().out
    assert output.count("already complete") == 4 and "| packed" in output and "| stage-1" in output


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["teacher", "stage-1", "latent"])
def test_interrupted_training_continues_to_the_same_weights(stage, finished, tmp_path, monkeypatch, capsys):
    """Stopped in the third step, behind the checkpoint of the second."""

    def stop(self, args, state, control, logs, **kwargs):
        if Path(args.output_dir).name == stage and state.global_step == 3 and "loss" in logs:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(CompactProgress, "on_log", stop)
        run(tmp_path, *SMALL)
    assert RunFolder(tmp_path, STAGES).record(stage) is None and not (tmp_path / "results.json").exists()
    results = run(tmp_path, *SMALL)
    assert "continuing from step 2 of 4" in capsys.readouterr().out
    for name in STAGES:
        assert_equal(weights(tmp_path / name), weights(finished.folder / name))
    assert results["scores"] == finished.results["scores"]
    assert epoch_flips(tmp_path) == epoch_flips(finished.folder)


# ----------------------------------------------------------------------------------------------- images of one's own


@pytest.fixture
def folder(tmp_path) -> Path:
    """Red and blue pictures of several sizes and modes."""
    generator = np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 3)):
        for channel, name in ((0, "red"), (2, "blue")):
            target = tmp_path / "images" / split / name
            target.mkdir(parents=True)
            for number in range(count):
                pixels = generator.integers(0, 90, (40 + number, 50, 3), dtype=np.uint8)
                pixels[..., channel] += 150
                image = fromarray(pixels)
                (image.convert("RGBA") if number == 1 else image).save(target / f"{number}.png")
    return tmp_path / "images"


def test_a_folder_of_images(folder, tmp_path):
    options = ["--data_dir", str(folder), "--teacher_model", "test_resnet", "--teacher_epochs", "2", "--max_steps", "2"]
    options += ["--batch_size", "4", "--image_size", "32", "--logging_steps", "1", "--model", "rebnn_resnet18"]
    results = run(tmp_path / "run", *options, "--stem", "cifar")
    assert results["task"] == "images" and results["examples"] == {"train": 16, "validation": 6}
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "run" / "packed")
    assert model.config.id2label == {0: "blue", 1: "red"} and model.config.model_args["stem"] == "cifar"
    processor = AutoImageProcessor.from_pretrained(tmp_path / "run" / "packed")
    assert processor(load_folder(folder)["train"][0]["image"], return_tensors="pt").pixel_values.shape[-2:] == (32, 32)

    tuned = ["--teacher_model", str(tmp_path / "run" / "teacher")]
    options = [word for word in options if word not in ("--teacher_model", "test_resnet")]
    run(tmp_path / "tuned", *options, *tuned, "--teacher_learning_rate", "1e-30")
    first, second = (weights(tmp_path / name / "teacher") for name in ("run", "tuned"))
    torch.testing.assert_close(first["timm_model.fc.weight"], second["timm_model.fc.weight"], rtol=0, atol=1e-20)


def test_defaults_of_other_images_are_those_of_the_paper(folder):
    arguments = parse_image_arguments(["--data_dir", str(folder), "--epochs", "3"])
    task, _ = load_images("", str(folder))
    arguments.fill_in(task)
    student = arguments.student
    assert (student.batch_size, student.stage_one_learning_rate, student.stage_one_epochs) == (512, 2.5e-3, 128)
    assert (student.learning_rate, student.epochs, student.stage_one_weight_decay) == (1e-3, 3, 1e-5)
    assert arguments.teacher.teacher_model == "timm/resnet34.a1_in1k" and arguments.run.output_dir == "runs/images"


def test_what_is_no_folder_of_images_is_refused_in_one_sentence(folder, tmp_path):
    shutil.move(folder / "val", folder / "holdout")
    with pytest.raises(SystemExit, match="has the folders holdout, train: expected train and one of validation, val"):
        run(tmp_path / "run", "--data_dir", str(folder))
    with pytest.raises(SystemExit, match="has the folders none"):
        run(tmp_path / "run", "--data_dir", str(tmp_path / "nowhere"))
    with pytest.raises(SystemExit, match=r"--dataset no/such cannot be loaded from the Hub .*--data_dir FOLDER"):
        run(tmp_path / "run", "--dataset", "no/such")
    with pytest.raises(ValueError, match="0 columns of type ClassLabel"):
        in_our_columns(digits().remove_columns("label"), "it")
    assert not (tmp_path / "run").exists()


def test_one_of_several_columns_of_classes_is_chosen_by_name():
    both = digits().rename_column("label", "fine_label")
    coarse = ClassLabel(names=["even", "odd"])
    parity = {name: [label % 2 for label in split["fine_label"]] for name, split in both.items()}
    for name, split in both.items():
        both[name] = split.add_column("coarse_label", parity[name]).cast_column("coarse_label", coarse)
    with pytest.raises(ValueError, match=r"2 columns of type ClassLabel .*--label_column says which"):
        in_our_columns(both, "it")
    with pytest.raises(ValueError, match=r"--label_column label is no column .* these are: fine_label, coarse_label"):
        in_our_columns(both, "it", label_column="label")
    chosen = in_our_columns(both, "it", label_column="coarse_label")
    assert chosen["train"].features["label"].names == ["even", "odd"]
    assert chosen["validation"]["label"][:] == parity["validation"]


# ---------------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--dataset", "digits", "--data_dir", "x"], "leave out --dataset"),
        (["--label_column", "fine_label"], "--label_column fine_label does nothing without a --dataset of the Hub"),
        (["--image_size", "0"], "--image_size 0 must be greater than 0"),
        (["--stage_one_epochs", "0"], "--stage_one_epochs 0.0 must be greater than 0"),
        (["--learning_rate", "-1"], "--learning_rate -1.0 must be greater than 0"),
        (["--stage_one_weight_decay", "-1"], "must not be negative"),
        (["--warm_up", "1"], "is a share of the steps"),
        (["--workers", "-1"], "--workers -1 must not be negative"),
        (["--ema", "1"], "--ema 1.0 is a decay: more than 0 and less than 1"),
        (["--stem", "small"], "invalid choice"),
        (["--balance_rule", "const", "--balance_value", "-1"], "must be"),
        (["--balance_value", "1e-4"], "--balance_value 1e-4 does nothing without --balance_rule const"),
        (["--balance_strength", "2"], "--balance_strength 2 does nothing without --balance_form decoupled"),
        (["--max_steps", "0"], "--max_steps 0 must be greater than 0, or -1"),
        (["--gradient_accumulation_steps", "0"], "--gradient_accumulation_steps 0 must be greater than 0"),
        (["--balance", "const"], "unrecognized"),
    ],
)
def test_wrong_options_are_explained(options, complaint, capsys):
    with pytest.raises(SystemExit):
        parse_image_arguments(options)
    assert complaint in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--model", "rebnn_resnet19"], "timm cannot make a rebnn_resnet19"),
        (["--model", "reactnet_a", "--stem", "cifar"], "timm cannot make a reactnet_a with .*stem='cifar'"),
        (["--model", "resnet18"], "timm cannot make a resnet18 with binary_weights=True"),
        (["--teacher_model", "resnet19"], "timm cannot make a resnet19"),
        (["--teacher_model", "no/such"], "no/such cannot be loaded"),
    ],
)
def test_models_that_cannot_be_made_are_refused_before_training(options, complaint, tmp_path):
    with pytest.raises(SystemExit, match=complaint) as refusal:
        run(tmp_path / "run", *options)
    assert len(str(refusal.value).splitlines()) == 1
    assert not any((tmp_path / "run" / stage).exists() for stage in STAGES)


def test_a_teacher_of_other_classes_is_refused(finished, folder, tmp_path):
    with pytest.raises(SystemExit, match="has 10 outputs, but images needs 2"):
        run(tmp_path / "run", "--data_dir", str(folder), "--teacher", str(finished.folder / "teacher"))


# ------------------------------------------------------------------------------------------------------------- parts


def test_digits_are_complete_and_their_split_is_fixed():
    data = digits()
    assert {name: len(split) for name, split in data.items()} == {"train": 1437, "validation": 360}
    for split in data.values():
        assert np.bincount(split["label"], minlength=10).min() > len(split) / 11, "all classes alike"
    assert digits()["validation"]["label"][:] == data["validation"]["label"][:]
    assert {image.size for image in data["validation"]["image"]} == {(8, 8)}
    assert max(image.getextrema()[1] for image in data["validation"]["image"]) == 255


def test_fewer_examples_come_from_all_over_the_split():
    split = digits()["train"].sort("label")
    assert np.unique(spread(split, 20)["label"]).tolist() == list(range(10))
    assert len(spread(split, 5000)) == len(split)


def test_random_images_are_a_function_of_seed_epoch_and_index():
    config = {"input_size": (3, 16, 16), "crop_pct": 1.0, "interpolation": "bilinear"}
    for is_digits in (True, False):
        images = TrainingImages(digits()["train"], training_transform(config, is_digits), seed=5)
        again = TrainingImages(digits()["train"], training_transform(config, is_digits), seed=5)
        other = TrainingImages(digits()["train"], training_transform(config, is_digits), seed=6)
        pixels = [[data[key]["pixel_values"] for key in ((0, 1), (1, 1), (2, 1))] for data in (images, again, other)]
        assert all(torch.equal(a, b) for a, b in zip(pixels[0], pixels[1], strict=True))
        assert not all(torch.equal(a, b) for a, b in zip(pixels[0], pixels[2], strict=True))
        assert not all(torch.equal(pixels[0][0], other) for other in pixels[0][1:])


def test_generators_go_on_as_if_nothing_had_been_drawn():
    def draw() -> tuple[float, float, float]:
        return random.random(), np.random.rand(), torch.rand(()).item()

    with seeded(1, 2):
        pass
    with seeded(1):
        first = draw()
        with seeded(1, 2):
            inner = draw()
        second = draw()
    with seeded(1):
        assert draw() == first and draw() == second
    with seeded(1, 2):
        assert draw() == inner != first


def test_order_is_a_function_of_seed_and_epoch():
    def draw(seed: int, epoch: int) -> list[tuple[int, int]]:
        return list(EpochSampler(100, lambda: epoch, seed))

    assert draw(1, 3) == draw(1, 3) and draw(1, 3) != draw(2, 3)
    assert sorted(draw(1, 3)) == [(3, index) for index in range(100)]
    assert [index for _, index in draw(1, 3)] != [index for _, index in draw(1, 4)]


def test_stage_one_decays_convolutions_only(finished, tmp_path):
    job = image_classification.prepare(
        parse_image_arguments([*SMALL, "--output_dir", str(finished.folder)]), image_classification.ImageJob
    )
    arguments = image_classification.image_arguments(
        image_classification.TrainingArguments, job, "stage-1", learning_rate=0.1, weight_decay=1e-5
    )
    student, teacher = job.new_student(binary_weights=False), job.load(job.teacher_folder)
    trainer = StageOneTrainer(model=student, teacher=teacher, args=arguments, **job.trainer_inputs())
    optimizer = trainer.create_optimizer()
    assert type(optimizer) is torch.optim.Adam, "AdamW would decay the weights, not add to their gradients"
    decayed, others = optimizer.param_groups
    assert (decayed["weight_decay"], others["weight_decay"]) == (1e-5, 0)
    shapes = {p.ndim for p in decayed["params"]}, {p.ndim for p in others["params"]}
    assert shapes == ({4}, {1, 2}) and len(decayed["params"]) == 1 + 16 + 3
    batch = job.trainer_inputs()["data_collator"]([trainer.train_dataset[0, i] for i in range(4)])
    student.eval()
    logits = [model(batch["pixel_values"]).logits.log_softmax(-1) for model in (student, teacher)]
    expected = -(logits[1].exp() * logits[0]).sum() / 4
    torch.testing.assert_close(trainer.compute_loss(student, batch), expected)
