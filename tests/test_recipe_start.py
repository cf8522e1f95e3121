"""`--student`: the encoder of an earlier latent model under the head of the teacher."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    BertConfig,
    DistilBertConfig,
    RobertaConfig,
    set_seed,
)

import rebnn_hf
from rebnn_hf.binarizers import PARAMETRIC

sys.path.insert(0, str(Path(__file__).parents[1] / "recipes"))

from glue_arguments import parse_glue_arguments
from glue_job import GlueJob
from recipe_folder import RunFolder
from recipe_stages import check_architecture
from recipe_student import build_student

CONFIGS = {
    "bert": lambda **options: BertConfig(
        vocab_size=90,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=40,
        **options,
    ),
    "roberta": lambda **options: RobertaConfig(
        vocab_size=90,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=40,
        **options,
    ),
    "distilbert": lambda **options: DistilBertConfig(
        vocab_size=90, dim=16, n_layers=2, n_heads=2, hidden_dim=32, max_position_embeddings=40, **options
    ),
}
PRESETS = ["rebnn-bit-w1a1", "bit", "bibert", "reactnet", "rebnn-w1a32"]


def moved(model: torch.nn.Module) -> torch.nn.Module:
    """A model that looks trained: no tensor is as initialised, and every balance is above 0."""
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                tensor += (0.1 + torch.rand_like(tensor)) * (1.0 if "balance" in name else 0.02)
    return model


def teacher_in(folder: Path, architecture: str = "bert", labels: int = 3) -> Path:
    """A float classifier."""
    set_seed(1)
    model = AutoModelForSequenceClassification.from_config(CONFIGS[architecture](num_labels=labels))
    moved(model).save_pretrained(folder)
    return folder


def student_in(folder: Path, preset: str, architecture: str = "bert", labels: int | None = 2, **options) -> Path:
    """A latent model for other labels than the teacher's, or without a head."""
    set_seed(2)
    kind = AutoModel if labels is None else AutoModelForSequenceClassification
    shape = {} if labels is None else {"num_labels": labels}
    model = kind.from_config(CONFIGS[architecture](**shape))
    moved(rebnn_hf.binarize(model, rebnn_hf.ReBNNConfig.preset(preset, **options))).save_pretrained(folder)
    return folder


def job_of(tmp_path: Path, teacher: Path, student: Path, *options: str) -> GlueJob:
    """A run of the recipe that has not begun."""
    words = ["--teacher", str(teacher), "--student", str(student), *options]
    return GlueJob(parse_glue_arguments(words), None, None, None, RunFolder(tmp_path / "run"), teacher, None)


def built(job: GlueJob) -> torch.nn.Module:
    """The student of its first stage."""
    return build_student(job, job.arguments.distillations()[0])


@pytest.mark.parametrize("labels", [2, None], ids=["other-labels", "no-head"])
@pytest.mark.parametrize("architecture", CONFIGS)
@pytest.mark.parametrize("preset", PRESETS)
def test_the_encoder_is_the_students_and_the_head_the_teachers(preset, architecture, labels, tmp_path):
    teacher = teacher_in(tmp_path / "teacher", architecture)
    earlier = student_in(tmp_path / "earlier", preset, architecture, labels)
    model = built(job_of(tmp_path, teacher, earlier, "--preset", preset))
    assert model.config.num_labels == 3 and model.config.quantization_config.state == "latent"
    heads = AutoModelForSequenceClassification.from_pretrained(teacher).state_dict()
    encoders = AutoModel.from_pretrained(earlier).state_dict()
    prefix = f"{model.base_model_prefix}."
    for name, tensor in model.state_dict().items():
        if name.startswith(prefix) and "pooler" not in name:
            wanted = encoders[name.removeprefix(prefix)]
            wanted = torch.zeros_like(wanted) if name.endswith("balance") else wanted
        else:
            wanted = heads[name]
        assert torch.equal(tensor, wanted), name


@pytest.mark.parametrize("change", ["--activation_bits=2", "--ffn_activation=rprelu"])
def test_other_activations_begin_anew_and_weights_go_on(change, tmp_path):
    teacher = teacher_in(tmp_path / "teacher")
    earlier = student_in(tmp_path / "earlier", "rebnn-bit-w1a1", ffn_activation="model")
    options = ["--preset", "rebnn-bit-w1a1", "--ffn_activation", "model", change]
    model = built(job_of(tmp_path, teacher, earlier, *options))
    encoders = AutoModel.from_pretrained(earlier).state_dict()
    weights = {name: m.weight for name, m in model.bert.named_modules() if hasattr(m, "weight_scale")}
    assert weights and all(torch.equal(weight, encoders[f"{name}.weight"]) for name, weight in weights.items())
    activations = [module for module in model.modules() if isinstance(module, PARAMETRIC)]
    assert activations and not any(module.calibrated for module in activations if hasattr(module, "calibrated"))


def test_a_closed_form_takes_the_weights_alone(tmp_path):
    teacher, earlier = teacher_in(tmp_path / "teacher"), student_in(tmp_path / "earlier", "rebnn-bit-w1a1")
    model = built(job_of(tmp_path, teacher, earlier, "--preset", "bit"))
    layer, old = model.bert.encoder.layer[0].attention.self.query, AutoModel.from_pretrained(earlier)
    assert layer.weight_scale is None
    assert torch.equal(layer.weight, old.encoder.layer[0].attention.self.query.weight)


def test_dropout_and_frozen_embeddings_are_those_of_this_run(tmp_path):
    teacher, earlier = teacher_in(tmp_path / "teacher"), student_in(tmp_path / "earlier", "rebnn-w1a32")
    model = built(job_of(tmp_path, teacher, earlier, "--dropout", "0.25"))
    assert {m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)} == {0.25}
    assert not model.bert.embeddings.word_embeddings.weight.requires_grad


@pytest.mark.parametrize(
    ("make", "options", "said"),
    [
        (lambda folder: teacher_in(folder), (), "is a float model, but distillation goes on from a latent model"),
        (lambda folder: student_in(folder, "rebnn-w1a32", "distilbert"), (), "1-bit weight .* not there"),
        (lambda folder: student_in(folder, "rebnn-w1a32", pooler=True), (), "the stages differ in pooler"),
        (
            lambda folder: student_in(folder, "rebnn-w1a32", pooler=True),
            ("--pooler",),
            "--pooler and --head make 1-bit",
        ),
        (lambda folder: student_in(folder, "bit", ffn_activation="model"), (), "attention='softmax' cannot follow"),
        (lambda folder: folder, (), "cannot be loaded: pass the folder of a model"),
    ],
    ids=["float", "other-architecture", "other-layers", "head", "attention", "nothing"],
)
def test_what_does_not_fit_is_refused_before_anything_is_trained(make, options, said, tmp_path):
    teacher, folder = teacher_in(tmp_path / "teacher"), make(tmp_path / "earlier")
    with pytest.raises(SystemExit, match=said):
        check_architecture(job_of(tmp_path, teacher, folder, *options))
    assert not (tmp_path / "run").exists()


def test_a_packed_model_is_refused(tmp_path):
    teacher, earlier = teacher_in(tmp_path / "teacher"), student_in(tmp_path / "earlier", "rebnn-w1a32")
    model = AutoModelForSequenceClassification.from_pretrained(earlier)
    rebnn_hf.pack(model).save_pretrained(tmp_path / "packed")
    with pytest.raises(SystemExit, match="is a packed one, but distillation goes on from a latent model"):
        check_architecture(job_of(tmp_path, teacher, tmp_path / "packed"))


def test_a_student_in_the_folder_of_the_run_is_refused(tmp_path):
    teacher, earlier = teacher_in(tmp_path / "teacher"), student_in(tmp_path / "run" / "latent", "rebnn-w1a32")
    with pytest.raises(SystemExit, match="lies in --output_dir, which may be cleared"):
        check_architecture(job_of(tmp_path, teacher, earlier))
