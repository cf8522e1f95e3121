"""`--student`: the encoder of an earlier latent model under the head of the teacher."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    BertConfig,
    DistilBertConfig,
    RobertaConfig,
    set_seed,
)

import rebnn_hf
from rebnn_hf.binarizers import PARAMETRIC

sys.path.insert(0, str(Path(__file__).parents[1] / "recipes"))

import glue
from glue_arguments import parse_glue_arguments
from glue_job import GlueJob
from recipe_folder import RunFolder
from recipe_stages import check_architecture
from recipe_student import build_student
from squad_arguments import parse_squad_arguments
from squad_job import SquadJob

SHAPE = {
    "vocab_size": 90,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 40,
}
CONFIGS = {
    "bert": lambda **options: BertConfig(**{**SHAPE, **options}),
    "roberta": lambda **options: RobertaConfig(**{**SHAPE, **options}),
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
    shape = {name: options.pop(name) for name in list(options) if name in SHAPE}
    shape |= {} if labels is None else {"num_labels": labels}
    model = kind.from_config(CONFIGS[architecture](**shape))
    moved(rebnn_hf.binarize(model, rebnn_hf.ReBNNConfig.preset(preset, **options))).save_pretrained(folder)
    return folder


def packed_in(folder: Path) -> Path:
    """The same in bits."""
    model = AutoModelForSequenceClassification.from_pretrained(student_in(folder, "rebnn-w1a32"))
    rebnn_hf.pack(model).save_pretrained(folder)
    return folder


def cut_in(folder: Path, name: str = "layer.0.attention.self.query.weight") -> Path:
    """A latent model whose file lacks a tensor."""
    file = student_in(folder, "rebnn-w1a32") / "model.safetensors"
    save_file({key: t for key, t in load_file(file).items() if not key.endswith(name)}, file, {"format": "pt"})
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
        (lambda folder: student_in(folder, "rebnn-w1a32", "distilbert"), (), "its model_type is distilbert"),
        (lambda folder: student_in(folder, "rebnn-w1a32", vocab_size=91), (), r"word_embeddings.weight is \[91, 16\]"),
        (lambda folder: student_in(folder, "rebnn-w1a32", num_attention_heads=4), (), "its num_attention_heads is 4"),
        (lambda folder: student_in(folder, "rebnn-w1a32", pooler=True), (), "a 1-bit pooler or head"),
        (lambda folder: student_in(folder, "rebnn-w1a32"), ("--pooler",), "a 1-bit pooler or head"),
        (lambda folder: student_in(folder, "bit"), (), "the stages differ in ffn_activation"),
        (lambda folder: packed_in(folder), (), "is a packed one, but distillation goes on from a latent model"),
        (lambda folder: cut_in(folder), (), "cannot be used: .*query"),
        (lambda folder: cut_in(folder, "embeddings.LayerNorm.bias"), (), "lacks bert.embeddings.LayerNorm.bias"),
        (lambda folder: folder, (), "cannot be loaded: pass the folder of a model"),
    ],
    ids=[
        "float",
        "other-architecture",
        "other-vocabulary",
        "other-heads",
        "its-pooler",
        "pooler",
        "method",
        "packed",
        "cut",
        "cut-embeddings",
        "nothing",
    ],
)
def test_what_does_not_fit_is_refused(make, options, said, tmp_path):
    teacher, folder = teacher_in(tmp_path / "teacher"), make(tmp_path / "earlier")
    with pytest.raises(SystemExit, match=said):
        check_architecture(job_of(tmp_path, teacher, folder, *options))


# ------------------------------------------------------------------------------------------------------- whole runs


SMALL = [
    "--max_train_samples",
    "64",
    "--max_eval_samples",
    "32",
    "--teacher_epochs",
    "1",
    "--max_steps",
    "2",
    "--batch_size",
    "8",
]


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> Path:
    """A finished run of a tiny part of the demo."""
    threads = torch.get_num_threads()
    folder = tmp_path_factory.mktemp("start") / "demo"
    glue.main([*SMALL, "--output_dir", str(folder)])
    torch.set_num_threads(threads)
    return folder


@pytest.fixture(autouse=True)
def _keep_threads():
    """The demo sets the number of threads of its process, which here is that of all tests."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def begun(demo: Path, folder: Path, *options: str) -> None:
    """Runs the demo with the teacher and the student of a finished run."""
    teacher, student = demo / "teacher", demo / "latent"
    glue.main([*SMALL, "--teacher", str(teacher), "--student", str(student), "--output_dir", str(folder), *options])


def test_a_run_begins_with_the_student_says_so_and_needs_it_no_more_once_finished(demo, tmp_path, capsys):
    earlier = Path(shutil.copytree(demo, tmp_path / "earlier"))
    begun(earlier, tmp_path / "run", "--learning_rate", "1e-9")
    mine, first = (load_file(run / "latent" / "model.safetensors") for run in (tmp_path / "run", earlier))
    binary = [name for name in first if name.endswith("query.weight")]
    assert binary and all(torch.allclose(mine[name], first[name], atol=1e-6) for name in binary)
    card = (tmp_path / "run" / "packed" / "README.md").read_text(encoding="utf-8")
    assert "beginning with the encoder of an earlier 1-bit model" in card
    shutil.rmtree(earlier / "latent")
    capsys.readouterr()
    begun(earlier, tmp_path / "run", "--learning_rate", "1e-9")
    assert "| packed" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"student: .*earlier/latent -> None"):
        glue.main(
            [
                *SMALL,
                "--teacher",
                str(earlier / "teacher"),
                "--output_dir",
                str(tmp_path / "run"),
                "--learning_rate=1e-9",
            ]
        )


def test_what_is_refused_costs_nothing(demo, tmp_path):
    run = Path(shutil.copytree(demo, tmp_path / "run"))
    with pytest.raises(SystemExit, match="lies in --output_dir, which may be cleared"):
        glue.main([*SMALL, "--student", str(run / "latent"), "--output_dir", str(run), "--overwrite"])
    with pytest.raises(SystemExit, match="is a packed one"):
        glue.main([*SMALL, "--student", str(demo / "packed"), "--output_dir", str(run), "--overwrite"])
    assert (run / "latent" / "model.safetensors").exists() and (run / "results.json").exists()


def test_a_student_that_reads_other_words_is_refused(demo, tmp_path):
    earlier = Path(shutil.copytree(demo / "latent", tmp_path / "earlier"))
    tokenizer = json.loads((earlier / "tokenizer.json").read_text(encoding="utf-8"))
    words = sorted(tokenizer["model"]["vocab"], key=tokenizer["model"]["vocab"].get)
    tokenizer["model"]["vocab"] |= {words[-1]: len(words) - 2, words[-2]: len(words) - 1}
    (earlier / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    with pytest.raises(SystemExit, match="its tokenizer has another vocabulary"):
        glue.main([*SMALL, "--student", str(earlier), "--output_dir", str(tmp_path / "run")])


def test_question_answering_begins_with_a_classifiers_encoder(tmp_path):
    set_seed(1)
    AutoModelForQuestionAnswering.from_config(CONFIGS["bert"]()).save_pretrained(tmp_path / "teacher")
    earlier = student_in(tmp_path / "earlier", "rebnn-bit-w1a1")
    words = ["--teacher", str(tmp_path / "teacher"), "--student", str(earlier), "--preset", "rebnn-bit-w1a1"]
    run = RunFolder(tmp_path / "run")
    job = SquadJob(parse_squad_arguments(words), None, None, None, run, tmp_path / "teacher", None)
    check_architecture(job)
    model, encoders = built(job), AutoModel.from_pretrained(earlier).state_dict()
    assert torch.equal(model.bert.encoder.layer[1].output.dense.weight, encoders["encoder.layer.1.output.dense.weight"])
    teacher = AutoModelForQuestionAnswering.from_pretrained(tmp_path / "teacher")
    assert torch.equal(model.qa_outputs.weight, teacher.qa_outputs.weight)
