"""One table of tasks times what must hold for each of them: binarized, distilled for a few steps, packed, reloaded
through its Auto class, and asked through `pipeline`. Sequence and image classification have tests of their own.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import transformers as hf
from torch import Tensor

import rebnn_hf
from rebnn_hf import ReBNNConfig, ReBNNTrainer, ReBNNTrainingArguments, fusion
from rebnn_hf.kernels import cpu
from rebnn_hf.layers import LATENT_TYPES, PACKED_TYPES

WORDS = ["the", "a", "cat", "dog", "bird", "tree", "house", "river", "sees", "likes", "hates", "sleeps", "runs"]
WORDS += ["small", "large", "green", "and"]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
TEXTS = ["the cat sees a green bird", "a large dog hates the river and runs", "the small bird likes a tree"]
SIZES = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48)
LENGTH = 12
STEPS = 4
CONVERTED = 12  # six matrices in each of two blocks
PRESETS = ["rebnn-w1a32", "rebnn-bit-w1a1"]


# Training examples, all of LENGTH tokens, the shorter ones padded


def encode(tokenizer, *texts) -> dict[str, Tensor]:
    return dict(tokenizer(*texts, padding="max_length", max_length=LENGTH, truncation=True, return_tensors="pt"))


def rows(columns: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def each_token(tokenizer):
    inputs = encode(tokenizer, TEXTS)
    return rows(inputs | {"labels": torch.where(inputs["attention_mask"] == 1, inputs["input_ids"] % 3, -100)})


def choices(tokenizer):
    inputs = encode(tokenizer, [text for text in TEXTS for _ in TEXTS], TEXTS * len(TEXTS))
    groups = {name: tensor.view(len(TEXTS), len(TEXTS), LENGTH) for name, tensor in inputs.items()}
    return rows(groups | {"labels": torch.arange(len(TEXTS))})


def spans(tokenizer):
    inputs = encode(tokenizer, ["the cat sees"] * len(TEXTS), TEXTS)
    return rows(inputs | {"start_positions": torch.tensor([5, 6, 7]), "end_positions": torch.tensor([6, 8, 7])})


def masked(tokenizer):
    inputs = encode(tokenizer, TEXTS)
    hidden = (inputs["input_ids"] % 4 == 1) & (inputs["input_ids"] >= len(SPECIAL))
    labels = torch.where(hidden, inputs["input_ids"], -100)
    inputs["input_ids"] = inputs["input_ids"].masked_fill(hidden, tokenizer.mask_token_id)
    return rows(inputs | {"labels": labels})


def features(tokenizer):
    return rows(encode(tokenizer, TEXTS))


# What `pipeline` must answer, computed from the model's own outputs by the definition of the task


def token_answers(model, tokenizer, text):
    inputs = tokenizer(text, return_tensors="pt")
    shares = model(**inputs).logits[0].softmax(-1)
    words = tokenizer.convert_ids_to_tokens(inputs["input_ids"][0])
    answers = zip(words, shares, strict=True)
    return [(word, model.config.id2label[s.argmax().item()], s.max()) for word, s in answers if word not in SPECIAL]


def masked_answers(model, tokenizer, text):
    inputs = tokenizer(text, return_tensors="pt")
    (place,) = (inputs["input_ids"][0] == tokenizer.mask_token_id).nonzero()
    best = model(**inputs).logits[0, place[0]].softmax(-1).topk(5)
    return list(zip(tokenizer.convert_ids_to_tokens(best.indices), best.values, strict=True))


def feature_answers(model, tokenizer, text):
    return [(number,) for number in model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].flatten()]


@dataclass(frozen=True)
class Task:
    """`answers`, words and a number each, are what `read` makes of those of the pipeline, where there is one."""

    auto: type
    cls: type
    examples: Callable
    options: tuple[tuple[str, float], ...] = ()
    pipeline: str | None = None
    answers: Callable | None = None
    read: Callable | None = None
    ask: str = "the cat sees a small tree"


TASKS = {
    "token classification": Task(
        hf.AutoModelForTokenClassification,
        hf.BertForTokenClassification,
        each_token,
        pipeline="token-classification",
        answers=token_answers,
        read=lambda found: [(answer["word"], answer["entity"], answer["score"]) for answer in found],
    ),
    "multiple choice": Task(hf.AutoModelForMultipleChoice, hf.BertForMultipleChoice, choices),
    "question answering": Task(hf.AutoModelForQuestionAnswering, hf.BertForQuestionAnswering, spans),
    "masked LM": Task(
        hf.AutoModelForMaskedLM,
        hf.BertForMaskedLM,
        masked,
        pipeline="fill-mask",
        answers=masked_answers,
        read=lambda found: [(answer["token_str"], answer["score"]) for answer in found],
        ask="the cat [MASK] a small tree",
    ),
    "feature extraction": Task(
        hf.AutoModel,
        hf.BertModel,
        features,
        options=(("logits_weight", 0.0),),
        pipeline="feature-extraction",
        answers=feature_answers,
        read=lambda found: [(number,) for token in found[0] for number in token],
    ),
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    file = tmp_path_factory.mktemp("tokenizer") / "vocab.txt"
    file.write_text("\n".join([*SPECIAL, *WORDS]))
    return hf.BertTokenizer(vocab=str(file))


CASES = [(name, preset) for name in TASKS for preset in PRESETS]
WITH_PIPELINE = [(name, preset) for name, preset in CASES if TASKS[name].pipeline is not None]


@dataclass
class Trained:
    task: Task
    model: hf.PreTrainedModel
    folder: Path
    batch: dict[str, Tensor]
    before: dict[str, Tensor]
    latent: dict[str, Tensor]


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def trained(request, tokenizer, tmp_path_factory) -> Trained:
    """A distilled model, packed and saved with its tokenizer."""
    name, preset = request.param
    task, folder = TASKS[name], tmp_path_factory.mktemp("task")
    hf.set_seed(0)
    config = hf.BertConfig(vocab_size=len(tokenizer), num_labels=3, initializer_range=0.2, **SIZES)
    if task.cls in (hf.BertForMultipleChoice, hf.BertForQuestionAnswering):
        config.num_labels = 2
    teacher, student = task.cls(config), task.cls(hf.BertConfig(**config.to_diff_dict()))
    student.load_state_dict(teacher.state_dict())
    rebnn_hf.binarize(student, ReBNNConfig.preset(preset))
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    arguments = ReBNNTrainingArguments.preset(
        preset,
        output_dir=str(folder / "run"),
        max_steps=STEPS,
        learning_rate=1e-2,
        per_device_train_batch_size=3,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
        plot_oscillation=False,
        label_weight=0.0 if task.cls is hf.BertModel else 1.0,
        **dict(task.options),
    )
    examples = task.examples(tokenizer)
    trainer = ReBNNTrainer(model=student, teacher=teacher, args=arguments, train_dataset=examples)
    trainer.train()
    assert trainer.state.global_step == STEPS
    batch = hf.default_data_collator(examples)
    student.eval()
    latent = outputs(student, batch)
    rebnn_hf.pack(student).save_pretrained(folder / "packed")
    tokenizer.save_pretrained(folder / "packed")
    return Trained(task, student, folder / "packed", batch, before, latent)


@torch.no_grad()
def outputs(model, batch) -> dict[str, Tensor]:
    """All tensors that a model returns, without what padded positions hold (zeros in a fused model)."""
    real = batch["attention_mask"].bool()
    found = {}
    for name, tensor in model(**batch).items():
        per_token = tensor.shape[: real.ndim] == real.shape
        found[name] = tensor[real] if per_token else tensor
    return found


def test_training_moves_latent_weights_and_packing_keeps_what_they_say(trained):
    after, moved = trained.model.state_dict(), 0
    for name, module in trained.model.named_modules():
        assert not isinstance(module, LATENT_TYPES)
        if isinstance(module, PACKED_TYPES):
            signs = rebnn_hf.packing.pack_signs(trained.before[f"{name}.weight"])
            moved += not torch.equal(signs, after[f"{name}.weight"])
    assert moved == CONVERTED, "every matrix has flipped signs"
    torch.testing.assert_close(outputs(trained.model, trained.batch), trained.latent, rtol=1e-4, atol=1e-4)


def test_reloaded_through_the_auto_class_it_gives_equal_outputs(trained):
    loaded = trained.task.auto.from_pretrained(trained.folder)
    assert type(loaded) is trained.task.cls
    assert sum(isinstance(module, PACKED_TYPES) for module in loaded.modules()) == CONVERTED
    assert fusion.is_fused(loaded) == fusion.is_fused(trained.model)
    aligned = copy.deepcopy(loaded)  # tensors of a mapped file lie anywhere, and where they lie float products round
    expected, found = outputs(trained.model, trained.batch), outputs(aligned, trained.batch)
    assert found.keys() == expected.keys() and len(found) >= 2
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
        assert tensor.isfinite().all() and (tensor.numel() == 1 or tensor.std() > 0), name


@torch.no_grad()
@pytest.mark.parametrize("trained", WITH_PIPELINE, indirect=True, ids="-".join)
def test_pipeline_of_the_folder_gives_the_answers_of_the_model(trained, tokenizer):
    task = trained.task
    expected = task.answers(trained.model, tokenizer, task.ask)
    found = task.read(hf.pipeline(task.pipeline, model=str(trained.folder), device="cpu")(task.ask))
    assert [words for *words, _ in found] == [words for *words, _ in expected] and len(found) >= 5
    assert [number for *_, number in found] == pytest.approx([float(number) for *_, number in expected], rel=1e-5)


@pytest.mark.skipif(not cpu.available(), reason=cpu.why_not())
def test_the_preset_decides_whether_the_encoder_is_one_call(trained):
    assert fusion.is_fused(trained.model) == (trained.model.config.quantization_config.activation == "elastic")
