"""ReBNNTrainer: losses by name, parameter groups, accumulation, resume, teacher, modes, processes."""

import copy
import os
import socket
import warnings

import pytest
import torch
from torch.utils.data import Dataset
from transformers import (
    BertConfig,
    BertForMultipleChoice,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    TrainerCallback,
    set_seed,
)

import rebnn_hf
from rebnn_hf import ReBNNConfig, ReBNNTrainer, ReBNNTrainingArguments, distillation
from rebnn_hf.plotting import plot_oscillation


class Sentences(Dataset):
    """Random token ids with padding; the label is the parity of the first token."""

    def __init__(self, size=32, length=12, regression=False):
        generator = torch.Generator().manual_seed(0)
        self.items = []
        for index in range(size):
            ids = torch.randint(5, 50, (length,), generator=generator)
            mask = (torch.arange(length) < 4 + index % (length - 3)).long()
            label = float(ids[0]) / 50 if regression else int(ids[0]) % 2
            self.items.append({"input_ids": ids * mask, "attention_mask": mask, "labels": label})

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]


def bert(seed=0, labels=2, dropout=0.0):
    set_seed(seed)
    config = BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        num_labels=labels,
        initializer_range=0.2,
    )
    return BertForSequenceClassification(config)


def packed_bert():
    return rebnn_hf.pack(rebnn_hf.binarize(bert()))


def trainer_for(tmp_path, student=None, teacher="float", dataset=None, callbacks=None, **arguments):
    teacher = bert(seed=1) if teacher == "float" else teacher
    defaults = {
        "output_dir": str(tmp_path),
        "max_steps": 4,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "plot_oscillation": False,
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 3,
    }
    return ReBNNTrainer(
        model=student or rebnn_hf.binarize(bert(seed=1)),
        args=ReBNNTrainingArguments(**(defaults | arguments)),
        teacher=teacher,
        train_dataset=dataset or Sentences(),
        callbacks=callbacks,
    )


def latent_state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same(state, other):
    assert state.keys() == other.keys()
    for name in state:
        assert torch.equal(state[name], other[name]), name


def test_loss_is_the_weighted_sum_of_its_parts(tmp_path):
    trainer = trainer_for(
        tmp_path, label_weight=0.5, logits_weight=2.0, hidden_weight=3.0, relation_weight=0.25, temperature=2.0
    )
    batch = trainer.data_collator([Sentences()[i] for i in range(8)])
    student, teacher, mask = trainer.model, trainer.teacher, batch["attention_mask"]
    student.train()
    loss, outputs = trainer.compute_loss(student, dict(batch), return_outputs=True)
    mine, theirs = student(**batch, output_hidden_states=True), teacher(**batch, output_hidden_states=True)
    parts = {
        "labels": torch.nn.functional.cross_entropy(mine.logits, batch["labels"]),
        "logits": distillation.kl_divergence(mine.logits, theirs.logits, 2.0),
        "hidden": distillation.hidden_loss("relative_mse", mine.hidden_states, theirs.hidden_states, mask),
        "relations": 0,
    }
    for index in range(2):
        attention, target = student.bert.encoder.layer[index].attention.self, teacher.bert.encoder.layer[index]
        target = target.attention.self
        for name in ("query", "key", "value"):
            parts["relations"] += distillation.relation_loss(
                getattr(attention, name)(mine.hidden_states[index]),
                getattr(target, name)(theirs.hidden_states[index]),
                2,
                mask,
            )
    expected = 0.5 * parts["labels"] + 2 * parts["logits"] + 3 * parts["hidden"] + 0.25 * parts["relations"]
    torch.testing.assert_close(loss, expected)
    logged = trainer._mean_losses()
    assert logged.keys() == {f"loss_{name}" for name in parts}
    for name, part in parts.items():
        torch.testing.assert_close(logged[f"loss_{name}"], part.item())
    assert torch.equal(outputs.logits, mine.logits)


def test_each_part_is_logged_by_name_with_the_oscillation(tmp_path):
    trainer = trainer_for(tmp_path, log_oscillation="layer", label_weight=1.0)
    trainer.train()
    log = trainer.state.log_history[1]
    assert {"loss_labels", "loss_logits", "loss_hidden", "loss_reconstruction"} <= set(log)
    assert log["loss"] == pytest.approx(log["loss_labels"] + log["loss_logits"] + log["loss_hidden"], rel=1e-4)
    assert "loss_relations" not in log
    assert 0 < log["flip_ratio"] < 1 and log["balance_max"] > 0 and log["loss_reconstruction"] > 0
    layers = [value for name, value in log.items() if name.startswith("flip_ratio/")]
    weights = [m.weight.numel() for m in trainer.model.modules() if isinstance(m, rebnn_hf.BinaryLinear)]
    assert len(layers) == 12
    mean = sum(a * b for a, b in zip(layers, weights, strict=True)) / sum(weights)
    assert log["flip_ratio"] == pytest.approx(mean)


def test_tensorboard_gets_each_part_and_the_oscillation(tmp_path, monkeypatch):
    """What the event file holds is what the Trainer logged, step by step."""
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
    trainer = trainer_for(tmp_path, report_to="tensorboard", log_oscillation="layer")
    trainer.train()
    (file,) = tmp_path.rglob("events.out.tfevents.*")
    events = reader.EventAccumulator(str(file)).Reload()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert len(logs) == 4
    layer = "flip_ratio/bert.encoder.layer.1.output.dense"
    for name in ("loss_logits", "loss_hidden", "loss_reconstruction", "flip_ratio", "balance_max", layer):
        found = {event.step: event.value for event in events.Scalars(f"train/{name}")}
        assert found == pytest.approx({log["step"]: log[name] for log in logs}, rel=1e-6), name
        assert any(found.values()), name


def test_training_without_a_teacher_uses_the_labels(tmp_path):
    trainer = trainer_for(tmp_path, teacher=None)
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["loss"] == pytest.approx(log["loss_labels"], rel=1e-4) and "loss_logits" not in log


def test_regression_matches_logits_by_mse(tmp_path):
    student = rebnn_hf.binarize(bert(labels=1))
    trainer = trainer_for(tmp_path, student, bert(labels=1, seed=1), Sentences(regression=True), hidden_weight=0.0)
    batch = trainer.data_collator([Sentences(regression=True)[i] for i in range(8)])
    student.train()
    expected = (student(**batch).logits - trainer.teacher(**batch).logits).square().mean()
    torch.testing.assert_close(trainer.compute_loss(student, dict(batch)), expected)


def with_problem(problem_type, labels, seed=0):
    model = bert(seed, labels)
    model.config.problem_type = problem_type
    return model


def logits_loss_and_gradient(tmp_path, student, teacher, dataset=None, **arguments):
    """Loss of the logits alone on a batch, and its gradient for the bias of the student's head."""
    arguments = {"hidden_weight": 0.0, "temperature": 2.0, **arguments}
    trainer = trainer_for(tmp_path, student, teacher, dataset, **arguments)
    batch = trainer.data_collator([(dataset or Sentences())[i] for i in range(8)])
    loss = trainer.compute_loss(student.train(), dict(batch))
    loss.backward()
    del batch["labels"]
    return loss.detach(), student.classifier.bias.grad, student(**batch).logits.detach(), teacher(**batch).logits


@pytest.mark.parametrize("labels", [1, 3])
@pytest.mark.parametrize("said_by", ["teacher", "student"])
def test_labels_that_do_not_exclude_each_other_are_distilled_each_by_itself(tmp_path, labels, said_by):
    """Not by a softmax, which would have the student give probabilities that sum to 1."""
    kinds = {"teacher": None, "student": None} | {said_by: "multi_label_classification"}
    for name in ("kl", "soft_cross_entropy", "mse"):
        student = rebnn_hf.binarize(with_problem(kinds["student"], labels))
        teacher = with_problem(kinds["teacher"], labels, seed=1)
        loss, gradient, s, t = logits_loss_and_gradient(tmp_path, student, teacher, logits_loss=name)
        if name == "mse":
            torch.testing.assert_close(loss, (s - t).square().mean())
            continue
        p, q = (t / 2).sigmoid(), (s / 2).sigmoid()
        torch.testing.assert_close(gradient, 2 * (q - p).mean(0))
        cross_entropy = -4 * (p * q.log() + (1 - p) * (1 - q).log()).sum(-1).mean()
        entropy = -4 * (p * p.log() + (1 - p) * (1 - p).log()).sum(-1).mean()
        torch.testing.assert_close(loss, cross_entropy - entropy if name == "kl" else cross_entropy)


def test_a_regression_with_several_outputs_matches_logits_by_mse(tmp_path):
    student = rebnn_hf.binarize(with_problem("regression", 3))
    loss, _, s, t = logits_loss_and_gradient(tmp_path, student, with_problem("regression", 3, seed=1))
    torch.testing.assert_close(loss, (s - t).square().mean())


def test_the_problem_type_of_an_earlier_task_is_not_that_of_choices_and_tokens(tmp_path):
    """transformers reads it in heads for sequences and images alone."""
    config = bert(labels=1).config
    config.problem_type = "regression"  # fine-tuned on STS-B, then on multiple choice
    models = []
    for seed in (0, 1):
        set_seed(seed)
        models.append(BertForMultipleChoice(config))
    student, teacher = rebnn_hf.binarize(models[0]), models[1]
    trainer = trainer_for(tmp_path, student, teacher, hidden_weight=0.0)
    ids = torch.randint(5, 50, (8, 3, 6), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    expected = distillation.kl_divergence(student.train()(**batch).logits, teacher(**batch).logits)
    torch.testing.assert_close(trainer.compute_loss(student, dict(batch)), expected)


def test_float_labels_without_a_problem_type_are_refused(tmp_path):
    several = [item | {"labels": [float(item["labels"]), 1.0, 0.0]} for item in Sentences().items]
    student = rebnn_hf.binarize(bert(labels=3))
    with pytest.raises(ValueError, match=r"labels are floats \[8, 3\].*set problem_type.*multi_label"):
        logits_loss_and_gradient(tmp_path, student, bert(labels=3), several)
    teacher = with_problem("multi_label_classification", 3)
    assert logits_loss_and_gradient(tmp_path, student, teacher, several)[0] > 0


def test_question_answering_matches_both_ends_of_the_span(tmp_path):
    set_seed(0)
    teacher = BertForQuestionAnswering(bert().config)
    student = rebnn_hf.binarize(copy.deepcopy(teacher))
    data = [{name: item[name] for name in ("input_ids", "attention_mask")} for item in Sentences().items]
    trainer = trainer_for(tmp_path, student, teacher, data, hidden_weight=0.0)
    batch = trainer.data_collator(data[:8])
    student.train()
    mine, theirs = student(**batch), trainer.teacher(**batch)
    expected = 0  # the mean over sentences, each without its padding
    for name in ("start_logits", "end_logits"):
        for row, length in enumerate(batch["attention_mask"].sum(-1)):
            pair = mine[name][row : row + 1, :length], theirs[name][row : row + 1, :length]
            expected += distillation.kl_divergence(*pair) / 8
    torch.testing.assert_close(trainer.compute_loss(student, dict(batch)), expected)
    trainer.args.temperature = 0.5  # which doubles the logits of padding too
    assert trainer.compute_loss(student, dict(batch)).isfinite()
    trainer.args.logits_reduction = "batch_class"
    wider = {name: torch.nn.functional.pad(values, (0, 3)) for name, values in batch.items()}
    for loss in ("kl", "soft_cross_entropy", "mse"):  # none depends on how far the batch was padded
        trainer.args.logits_loss = loss
        alone = trainer.compute_loss(student, dict(batch))
        torch.testing.assert_close(trainer.compute_loss(student, dict(wider)), alone, rtol=1e-4, atol=1e-6)
    headless = trainer_for(tmp_path, rebnn_hf.binarize(bert().bert), bert().bert, data)
    with pytest.raises(ValueError, match=r"returns only last_hidden_state.*set logits_weight=0"):
        headless.compute_loss(headless.model.train(), dict(batch))


def test_evaluation_reports_the_task_s_own_loss(tmp_path):
    trainer = trainer_for(tmp_path, per_device_eval_batch_size=32)
    data = Sentences()
    batch = trainer.data_collator(data.items)
    trainer.model.eval()
    expected = torch.nn.functional.cross_entropy(trainer.model(**batch).logits, batch["labels"]).item()
    assert trainer.evaluate(data)["eval_loss"] == pytest.approx(expected, rel=1e-5)
    assert trainer.predict(data).predictions.shape == (32, 2)


def test_parameter_groups(tmp_path):
    trainer = trainer_for(
        tmp_path,
        student=rebnn_hf.binarize(bert(), ReBNNConfig(word_embeddings=True)),
        learning_rate=1e-3,
        latent_learning_rate=2e-3,
        scale_learning_rate=3e-3,
        weight_decay=0.1,
        latent_weight_decay=0.01,
    )
    optimizer = trainer.create_optimizer()
    found = {}
    for name, parameter in trainer.model.named_parameters():
        groups = [g for g in optimizer.param_groups if any(p is parameter for p in g["params"])]
        assert len(groups) == 1, name
        found[name] = (groups[0]["lr"], groups[0]["weight_decay"])
    prefix = "bert.encoder.layer.0.output."
    assert found[prefix + "dense.weight"] == (2e-3, 0.01)
    assert found["bert.embeddings.word_embeddings.weight"] == (2e-3, 0.01)
    assert found[prefix + "dense.weight_scale"] == (3e-3, 0.0)
    assert found[prefix + "dense.bias"] == (1e-3, 0.0)
    assert found["classifier.weight"] == (1e-3, 0.1)


@pytest.mark.parametrize("rule", ["flip_maxgrad", "none"])
def test_accumulation_equals_one_batch(tmp_path, rule):
    """8 examples at once, or 4 times 2: the same weights, balance and gradients (plain Trainer differs by 4)."""
    states = []
    for batch, accumulation in ((8, 1), (2, 4)):
        student = rebnn_hf.binarize(bert(seed=1).double(), ReBNNConfig(balance_rule=rule))
        trainer = trainer_for(
            tmp_path,
            student,
            bert(seed=1).double(),
            Sentences(length=4),  # no padding: the mean over tokens of parts is then that of the whole
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
            hidden_loss="mse",
            optim="sgd",
            learning_rate=0.05,
            latent_learning_rate=1.0,
        )
        trainer.train()
        states.append(latent_state(trainer.model))
    if rule == "flip_maxgrad":
        assert max(value.max() for name, value in states[0].items() if "balance" in name) > 0
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, msg=lambda text, name=name: f"{name}: {text}")


class StopAt(TrainerCallback):
    """Interrupts training after a step, as a user would."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.step


RESUMED = {
    "gradient": ReBNNConfig(balance_form="gradient", word_embeddings=True),
    "decoupled": ReBNNConfig(balance_form="decoupled", word_embeddings=True),
    "few bits": ReBNNConfig.preset("rebnn-bit-w1a1"),
}


@pytest.mark.parametrize("config", RESUMED.values(), ids=RESUMED)
def test_resume_is_exact(tmp_path, config):
    """A run stopped after 3 of 6 steps and resumed ends with the weights and balance of one that was not."""
    settings = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "gradient_accumulation_steps": 2}
    settings |= {"per_device_train_batch_size": 2, "warmup_steps": 2}

    def student():
        return rebnn_hf.binarize(bert(seed=1, dropout=0.1), config)

    whole = trainer_for(tmp_path / "whole", student(), **settings)
    whole.train()
    trainer_for(tmp_path / "parts", student(), callbacks=[StopAt(3)], **settings).train()
    resumed = trainer_for(tmp_path / "parts", student(), **settings)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 6
    assert max(value.max() for name, value in whole.model.state_dict().items() if "balance" in name) > 0
    assert_same(latent_state(whole.model), latent_state(resumed.model))
    assert_same(whole.model.state_dict(), resumed.model.state_dict())


def test_every_run_of_a_search_is_under_the_rule(tmp_path):
    """With model_init each train() has a new model and optimizer (hyperparameter search)."""
    trainer = trainer_for(tmp_path, max_steps=2)
    trainer.model_init = lambda: rebnn_hf.binarize(bert(seed=1))
    groups = []
    for _ in range(2):
        trainer.train()
        assert trainer.state.log_history[0]["flip_ratio"] > 0
        groups.append([len(group["params"]) for group in trainer.optimizer.optimizer.param_groups])
        assert max(m.balance.max() for m in trainer.model.modules() if isinstance(m, rebnn_hf.BinaryLinear)) > 0
    assert groups[0] == groups[1] and len(groups[0]) == 4


def test_a_search_refuses_models_that_cannot_train(tmp_path):
    arguments = ReBNNTrainingArguments(str(tmp_path), use_cpu=True)
    for build, message in ((lambda: bert(), "no 1-bit layer"), (packed_bert, "is packed")):
        with pytest.raises(ValueError, match=message):
            ReBNNTrainer(model_init=build, args=arguments)


def test_relations_between_different_heads_are_refused(tmp_path):
    config = bert().config
    config.num_attention_heads = 4
    trainer = trainer_for(tmp_path, teacher=BertForSequenceClassification(config), relation_weight=1.0)
    with pytest.raises(ValueError, match="student has 2 heads, the teacher 4"):
        trainer.train()


def test_hidden_relations_are_refused(tmp_path):
    """Reentrant checkpointing runs the encoder without a graph: the relation loss would train nothing."""
    trainer = trainer_for(
        tmp_path,
        relation_weight=1.0,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": True},
    )
    with pytest.raises(ValueError, match="reached no gradient"):
        trainer.train()


def test_a_sum_over_items_cannot_be_mixed_with_distillation(tmp_path):
    def summed(outputs, labels, num_items_in_batch=None):
        return torch.nn.functional.cross_entropy(outputs.logits, labels, reduction="sum") / num_items_in_batch

    arguments = ReBNNTrainingArguments(str(tmp_path), gradient_accumulation_steps=2, use_cpu=True)
    student = rebnn_hf.binarize(bert())
    with pytest.raises(ValueError, match="compute_loss_func is expected to divide"):
        ReBNNTrainer(model=student, args=arguments, teacher=bert(), compute_loss_func=summed)
    ReBNNTrainer(model=student, args=arguments, compute_loss_func=summed)


def test_teacher_is_frozen_in_eval_mode_and_never_saved(tmp_path):
    teacher = bert(seed=1, dropout=0.5).train()
    before = latent_state(teacher)
    trainer = trainer_for(tmp_path, teacher=teacher)
    trainer.train()
    assert not teacher.training and not any(p.requires_grad for p in teacher.parameters())
    assert_same(before, latent_state(teacher))
    trainer.save_model(str(tmp_path / "saved"))
    saved = BertForSequenceClassification.from_pretrained(tmp_path / "saved")
    assert_same(latent_state(trainer.model), latent_state(saved))
    assert not any("teacher" in name for name in saved.state_dict())


def test_a_saved_latent_model_goes_on_training(tmp_path):
    trainer = trainer_for(tmp_path)
    trainer.train()
    trainer.save_model(str(tmp_path / "latent"))
    loaded = BertForSequenceClassification.from_pretrained(tmp_path / "latent")
    again = trainer_for(tmp_path, student=loaded)
    again.train()
    moved = [n for n, v in latent_state(again.model).items() if not torch.equal(v, trainer.model.state_dict()[n])]
    assert any(name.endswith("query.weight") for name in moved)
    assert again.resilience is not None


def test_teacher_by_path(tmp_path):
    teacher = bert(seed=1)
    teacher.save_pretrained(tmp_path / "teacher")
    by_path = trainer_for(tmp_path, teacher=str(tmp_path / "teacher"))
    assert_same(latent_state(teacher), latent_state(by_path.teacher))


def test_gradient_checkpointing_changes_nothing(tmp_path):
    states = []
    for checkpointing in (False, True):
        trainer = trainer_for(tmp_path, gradient_checkpointing=checkpointing, relation_weight=0.5)
        trainer.train()
        states.append(latent_state(trainer.model))
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value)


def test_compiled_training_takes_the_same_steps(tmp_path):
    states = []
    for compiled in (False, True):
        trainer = trainer_for(tmp_path, torch_compile=compiled, torch_compile_backend="aot_eager" if compiled else None)
        trainer.train()
        states.append(latent_state(trainer.model))
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, rtol=1e-4, atol=1e-5)


def test_bfloat16_autocast_keeps_float_latents_and_learns(tmp_path):
    trainer = trainer_for(tmp_path, bf16=True, max_steps=30, learning_rate=3e-3)
    trainer.train()
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])


def test_half_precision_latents_of_a_half_precision_file_are_warned_of(tmp_path):
    """transformers loads a file in its own type; an update of 1e-4 of a bfloat16 weight is nothing."""
    bert().bfloat16().save_pretrained(tmp_path)
    for options, narrow in (({}, True), ({"dtype": torch.float32}, False)):
        student = rebnn_hf.binarize(BertForSequenceClassification.from_pretrained(tmp_path, **options))
        before = latent_state(student)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer_for(tmp_path, student, None, optim="sgd", latent_learning_rate=1e-4).train()
        told = [str(warning.message) for warning in caught if "latent weights are" in str(warning.message)]
        name = "bert.encoder.layer.0.attention.self.query.weight"
        moved = (student.state_dict()[name] != before[name]).float().mean()
        if narrow:
            (text,) = told
            assert text.startswith("12 of 12 latent weights are torch.bfloat16 (first: bert.encoder.layer.0.")
            assert "dtype=torch.float32" in text and moved < 0.1
        else:
            assert not told and moved > 0.5


def _train_as_one_of_two(rank, folder, port):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    trainer = distributed_trainer(folder, 4)
    assert trainer.args.world_size == 2
    trainer.train()
    torch.save(latent_state(trainer.model), f"{folder}/{rank}.pt")
    few_bits = distributed_trainer(folder, 4, rebnn_hf.ReBNNConfig.preset("rebnn-bit-w1a1"))
    few_bits.train()
    torch.save(few_bits.model.state_dict(), f"{folder}/{rank}-few-bits.pt")


def distributed_trainer(folder, batch, config=None):
    """Float64 and no padding, so that processes differ from one by rounding only."""
    return trainer_for(
        folder,
        rebnn_hf.binarize(bert(seed=1).double(), config),
        bert(seed=1).double(),
        Sentences(length=4),
        per_device_train_batch_size=batch,
        optim="sgd",
        hidden_loss="mse",
        learning_rate=0.05,
        latent_learning_rate=1.0,
    )


def test_two_processes_agree_with_one(tmp_path):
    """DDP over gloo: balance and weights are equal on both ranks, and equal to one process with the same batch."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # Spawned, not forked: torch's thread pool does not survive a fork.
    torch.multiprocessing.start_processes(
        _train_as_one_of_two, args=(str(tmp_path), port), nprocs=2, start_method="spawn"
    )
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    assert_same(first, second)
    assert max(value.max() for name, value in first.items() if "balance" in name) > 0
    single = distributed_trainer(tmp_path, 8)
    single.train()
    for name, value in latent_state(single.model).items():
        torch.testing.assert_close(first[name], value)
    first, second = (torch.load(tmp_path / f"{rank}-few-bits.pt", weights_only=True) for rank in (0, 1))
    assert_same(first, second)
    scales = [value.item() for name, value in first.items() if name.endswith(".scale")]
    assert len(scales) > 10 and all(scale != 0 for scale in scales)


def test_plot_of_a_run(tmp_path):
    trainer = trainer_for(tmp_path, log_oscillation="layer", plot_oscillation=True)
    trainer.train()
    assert (tmp_path / "oscillation.png").exists()  # drawn by the trainer itself
    plot_oscillation(trainer.state.log_history, tmp_path / "again.png")
    assert (tmp_path / "again.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    with pytest.raises(ValueError, match="holds no 'flip_ratio'"):
        plot_oscillation([{"loss": 1.0}], tmp_path / "nothing.png")


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"hidden_loss": "cosine"}, "hidden_loss='cosine' is unknown; expected one of relative_mse, mse, direction"),
        ({"temperature": 0.0}, "temperature=0.0 must be > 0"),
        ({"logits_weight": -1.0}, "logits_weight=-1.0 is negative"),
        ({"logits_weight": 0.0, "hidden_weight": 0.0}, "every loss weight is 0"),
        ({"teacher": None, "label_weight": 0.0}, "no teacher"),
        ({"relation_weight": 1.0, "torch_compile": True}, "torch_compile hides; set both to 0"),
        ({"student": bert}, "call rebnn_hf.binarize"),
        (
            {"student": lambda: rebnn_hf.pack(rebnn_hf.binarize(bert()))},
            "packed: its bits cannot be trained.*adapters",
        ),
    ],
)
def test_errors(tmp_path, arguments, message):
    if "student" in arguments:
        arguments = {**arguments, "student": arguments["student"]()}
    with pytest.raises(ValueError, match=message):
        trainer_for(tmp_path, **arguments)


def test_student_as_its_own_teacher_is_refused(tmp_path):
    student = rebnn_hf.binarize(bert())
    with pytest.raises(ValueError, match="student itself"):
        trainer_for(tmp_path, student=student, teacher=student)
    assert all(p.requires_grad for p in student.parameters())
