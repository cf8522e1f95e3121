"""Presets: what each stands for, that nothing in it is dead, that it trains, packs and comes back."""

import datasets
import pytest
import torch
import transformers as hf

from rebnn_hf import (
    ReBNNConfig,
    ReBNNTrainer,
    ReBNNTrainingArguments,
    binarize,
    calibrate,
    pack,
    rebinarize,
    selected_modules,
    summary,
    unpack,
)
from rebnn_hf.binarizers import Elastic
from rebnn_hf.kernels import use_backend
from rebnn_hf.layers import LATENT_TYPES
from rebnn_hf.presets import CONFIGS, LOSSES

SIZES = dict(vocab_size=50, hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=40)
BATCH = {
    "input_ids": torch.randint(3, 50, (8, 9), generator=torch.Generator().manual_seed(1)),
    "attention_mask": torch.tensor([[1] * 9] * 5 + [[1] * 4 + [0] * 5] * 3),
}
LABELS = torch.tensor([0, 1] * 4)


def build(num_labels=2):
    torch.manual_seed(0)
    config = hf.BertConfig(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, num_labels=num_labels, **SIZES)
    model = hf.BertForSequenceClassification(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():  # attention that prefers some words, as a trained one does
            parameter.mul_(8 if "query" in name or "key" in name else 1).add_(0.02 * torch.randn_like(parameter))
    return model


def student(preset, **overrides):
    model = binarize(build(), ReBNNConfig.preset(preset, **overrides))
    calibrate(model, BATCH)
    return model


def logits(model):
    with torch.no_grad():
        return model(**BATCH).logits


@pytest.mark.parametrize("preset", CONFIGS)
def test_every_parameter_gets_a_gradient_from_the_losses_of_the_preset(preset, tmp_path):
    """No dead parameters (BiT's code has some): also the classifier and the pooler, by the loss on the logits."""
    teacher, model = build(), binarize(build(), ReBNNConfig.preset(preset, word_embeddings=True, pooler=True))
    arguments = ReBNNTrainingArguments.preset(preset, output_dir=str(tmp_path), report_to="none", use_cpu=True)
    with torch.no_grad():  # another answer than the teacher's
        model.classifier.weight.add_(0.1)
    data = [{k: v[i] for k, v in BATCH.items()} | {"labels": LABELS[i]} for i in range(8)]
    trainer = ReBNNTrainer(model=model, teacher=teacher, args=arguments, train_dataset=data)
    calibrate(model, BATCH)
    trainer.compute_loss(model.train(), {**BATCH, "labels": LABELS}).backward()
    dead = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    # A distance of directions is 0, with gradient 0, where student and teacher agree: nothing is before the embeddings.
    assert not dead


@pytest.mark.parametrize("preset", [name for name in CONFIGS if not name.endswith("released")])
def test_packs_and_comes_back_with_the_same_answers(preset, tmp_path):
    model = student(preset, word_embeddings=True, pooler=True)
    expected = logits(model)
    pack(model)
    model.save_pretrained(tmp_path)
    loaded = hf.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    with use_backend("reference"):  # the engine rounds at other places, which few bits can make large
        assert torch.equal(logits(model), expected) and torch.equal(logits(loaded), expected)
    assert loaded.config.quantization_config == model.config.quantization_config
    state = loaded.state_dict()
    assert not any("balance" in name or "gamma" in name or "beta" in name for name in state)
    uint8 = [name for name, tensor in state.items() if tensor.dtype == torch.uint8]
    assert len(uint8) == 14  # two blocks of six, word embeddings, pooler


@pytest.mark.parametrize("preset", [name for name in CONFIGS if name.endswith("released")])
def test_released_choices_train_but_do_not_pack(preset):
    model = student(preset)
    with pytest.raises(ValueError, match=r"ties='released' has sign\(0\) = 0, a third value"):
        pack(model)
    assert any(isinstance(module, LATENT_TYPES) for module in model.modules())


@pytest.mark.parametrize("preset", ["rebnn-bit-w1a1", "bit-released"])
def test_latent_checkpoints_continue(preset, tmp_path):
    model = student(preset)
    model.save_pretrained(tmp_path)
    loaded = hf.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert calibrate(loaded, BATCH) == 0


def test_binarized_while_loading_a_float_checkpoint(tmp_path):
    build().save_pretrained(tmp_path)
    config = ReBNNConfig.preset("rebnn-bit-w1a1")
    loaded = hf.AutoModelForSequenceClassification.from_pretrained(tmp_path, quantization_config=config)
    assert calibrate(loaded, BATCH) > 0
    assert torch.equal(logits(loaded), logits(student("rebnn-bit-w1a1")))


def test_a_lost_scale_is_an_error(tmp_path):
    from safetensors.torch import load_file, save_file

    pack(student("rebnn-bit-w1a1")).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    lost = "bert.encoder.layer.1.attention.self.binary_attention.probabilities.scale"
    del tensors[lost]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=f"the checkpoint lacks {lost}"):
        hf.AutoModelForSequenceClassification.from_pretrained(tmp_path)


def test_what_a_few_names_stand_for():
    config = ReBNNConfig.preset("rebnn-bit-w1a4")
    assert (config.activation, config.activation_bits, config.attention, config.ffn_activation) == (
        "elastic", 4, "elastic", "relu",
    )  # fmt: skip
    assert (config.weight_scale, config.balance_rule, config.ties) == ("learned", "flip_maxgrad", "up")
    bit = ReBNNConfig.preset("bit", balance_rule="const")
    assert (bit.scale_granularity, bit.weight_center, bit.weight_ste) == ("tensor", "tensor", "identity")
    assert bit.balance_rule == "const"
    released = ReBNNConfig.preset("bibert-released")
    assert released.word_embeddings and released.pooler and released.ties == "released"
    arguments = ReBNNTrainingArguments.preset("bibert", output_dir="x", label_weight=0.0)
    assert (arguments.hidden_loss, arguments.relation_weight, arguments.label_weight) == ("direction", 1.0, 0.0)
    assert LOSSES.keys() <= CONFIGS.keys()


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"attention": "elastic"}, r"attention='elastic' has the bits of the activations, .* has 32"),
        ({"attention": "bool", "activation": "elastic", "activation_bits": 2}, "has 2 bits; use activation='sign'"),
        ({"ffn_activation": "relu", "activation": "sign"}, "would see one sign only"),
        ({"activation": "sign", "activation_bits": 4}, "'sign' comes in 1 bits"),
        ({"activation_bits": 1}, "activation='none' with activation_bits=1 is not possible"),
        ({"attention": "linear"}, "attention='linear' is unknown; expected one of 'softmax'"),
    ],
)
def test_impossible_combinations_say_why(fields, message):
    with pytest.raises(ValueError, match=message):
        ReBNNConfig(**fields)


def test_unknown_presets_are_refused():
    for preset in (ReBNNConfig.preset, ReBNNTrainingArguments.preset):
        with pytest.raises(
            ValueError, match="preset 'rebnn' is unknown; expected one of rebnn-w1a32, rebnn-bibert-w1a1"
        ):
            preset("rebnn")


def test_no_float_model_computes_the_same():
    model = pack(student("rebnn-bit-w1a1"))
    expected = logits(model)
    with pytest.raises(ValueError, match=r"cannot compute activation='elastic' with attention='elastic'"):
        unpack(model)
    assert torch.equal(logits(model), expected)


def test_relu_alone_can_be_unpacked(tmp_path):
    model = student("rebnn-w1a32", ffn_activation="relu")
    expected = logits(model)
    unpack(model).save_pretrained(tmp_path)
    loaded = hf.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert loaded.config.hidden_act == "relu"
    torch.testing.assert_close(logits(loaded), expected)


def test_what_is_not_to_be_converted_keeps_its_attention_and_its_function(tmp_path):
    model = binarize(build(), ReBNNConfig.preset("rebnn-bit-w1a1", modules_to_not_convert=["layer.0"]))
    first, second = model.bert.encoder.layer
    assert not hasattr(first.attention.self, "binary_attention") and hasattr(second.attention.self, "binary_attention")
    assert type(first.intermediate.intermediate_act_fn) is not torch.nn.ReLU
    assert type(second.intermediate.intermediate_act_fn) is torch.nn.ReLU
    calibrate(model, BATCH)
    with torch.no_grad():
        mine = model(**BATCH, output_hidden_states=True).hidden_states[1]
        torch.testing.assert_close(mine, build()(**BATCH, output_hidden_states=True).hidden_states[1])
    expected = logits(model)
    pack(model).save_pretrained(tmp_path)
    with use_backend("reference"):
        assert torch.equal(logits(hf.AutoModelForSequenceClassification.from_pretrained(tmp_path)), expected)
    base = hf.AutoModel.from_pretrained(tmp_path)
    assert not hasattr(base.encoder.layer[0].attention.self, "binary_attention")
    relu = binarize(build(), ReBNNConfig(ffn_activation="relu", modules_to_not_convert=["layer.0"]))
    with pytest.raises(ValueError, match="cannot compute"):  # a float config has one function for all blocks
        unpack(relu)


def test_another_attention_implementation_is_refused_not_ignored():
    model = student("rebnn-bit-w1a1")
    expected = logits(model)
    model.set_attn_implementation("sdpa")
    with pytest.raises(RuntimeError, match=r"set to 'sdpa' after binarize\(\).*set_attn_implementation\('rebnn'\)"):
        logits(model)
    model.set_attn_implementation("rebnn")
    assert torch.equal(logits(model), expected)


def test_embeddings_have_a_scale_for_each_token_also_where_matrices_have_one():
    """BiT C4: a scale for the tensor of a linear layer, but for each row of the embedding."""
    model = binarize(build(), ReBNNConfig.preset("bit", word_embeddings=True))
    words = model.get_input_embeddings()
    torch.testing.assert_close(words.scale(), words.weight.detach().abs().mean(-1))
    assert model.bert.encoder.layer[0].output.dense.scale().shape == (1,)


def test_new_parameters_of_a_frozen_model_are_frozen():
    model = build()
    model.bert.requires_grad_(False)
    binarize(model, ReBNNConfig.preset("rebnn-bit-w1a1"))
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {"classifier.weight", "classifier.bias"}


def test_a_scale_that_half_precision_would_lose_is_refused():
    model = student("rebnn-bit-w1a1")
    with torch.no_grad():
        model.bert.encoder.layer[0].output.dense.input_binarizer.scale.fill_(1e-8)
    with pytest.raises(ValueError, match=r"input_binarizer.scale is too small for torch.float16, and would be 0"):
        pack(model, torch.float16)


def test_selected_modules_are_those_that_binarize_converts():
    config = ReBNNConfig.preset("rebnn-bit-w1a1", pooler=True)
    with torch.device("meta"):
        names = selected_modules(hf.BertForSequenceClassification(hf.BertConfig(**SIZES)), config)
    model = binarize(build(), config)
    assert names == [name for name, module in model.named_modules() if isinstance(module, LATENT_TYPES)]


def test_packing_needs_scales():
    model = binarize(build(), ReBNNConfig.preset("rebnn-bit-w1a1"))
    with pytest.raises(ValueError, match=r"20 elastic activations have no scale yet \(first: bert.encoder.layer.0"):
        pack(model)


# Stages


@pytest.mark.parametrize("carry", [True, False])
def test_next_stage_keeps_weights_and_starts_the_balance_anew(carry):
    model = student("rebnn-bit-w1a2")
    layer = model.bert.encoder.layer[1].output.dense
    with torch.no_grad():
        layer.balance.fill_(0.5)
        layer.weight_scale.mul_(1.5)
        layer.input_binarizer.shift.fill_(0.25)
    weight, scale, step = (t.clone() for t in (layer.weight, layer.weight_scale, layer.input_binarizer.scale))
    rebinarize(model, ReBNNConfig.preset("rebnn-bit-w1a1"), carry_weight_scales=carry, carry_activation_scales=carry)
    layer = model.bert.encoder.layer[1].output.dense
    assert torch.equal(layer.weight, weight) and not layer.balance.any()
    assert layer.input_binarizer.bits == 1 and model.config.quantization_config.activation_bits == 1
    if carry:
        assert torch.equal(layer.weight_scale, scale) and torch.equal(layer.input_binarizer.scale, step)
        assert layer.input_binarizer.shift.unique().tolist() == [0.25]
        assert calibrate(model, BATCH) == 0
    else:
        torch.testing.assert_close(layer.weight_scale.detach(), weight.abs().mean(-1))
        assert not layer.input_binarizer.shift.any()
        assert calibrate(model, BATCH) == len([m for m in model.modules() if isinstance(m, Elastic)]) == 20
    assert logits(model).isfinite().all()


def test_next_stage_can_change_the_weight_rule():
    model = student("bit")
    rebinarize(model, ReBNNConfig.preset("rebnn-bit-w1a1"))
    calibrate(model, BATCH)
    layer = model.bert.encoder.layer[0].output.dense
    torch.testing.assert_close(layer.weight_scale.detach(), layer.weight.detach().abs().mean(-1))
    assert layer.rule.center == "none" and logits(model).isfinite().all()


@pytest.mark.parametrize(
    "make, overrides, message",
    [
        (build, {}, "expects a latent model, got a float one"),
        (lambda: pack(student("rebnn-bit-w1a2")), {}, "expects a latent model, got a packed one"),
        (lambda: student("rebnn-bit-w1a2"), {"pooler": True}, "the stages differ in pooler"),
        (lambda: student("rebnn-bit-w1a2"), {"attention": "softmax"}, "reverse the order"),
        (lambda: student("rebnn-bit-w1a2"), {"ffn_activation": "rprelu"}, "the stages differ in ffn_activation"),
        (lambda: mpnet(), {"ffn_activation": "model"}, "'mpnet' is not among bert"),
    ],
)
def test_stages_that_do_not_fit_are_refused_and_change_nothing(make, overrides, message):
    model = make()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        rebinarize(model, ReBNNConfig.preset("rebnn-bit-w1a1", **overrides))
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def mpnet():
    """2-bit inputs alone, on an architecture whose attention code is not known."""
    model = hf.MPNetForSequenceClassification(hf.MPNetConfig(**SIZES))
    return binarize(model, ReBNNConfig(activation="elastic", activation_bits=2))


def test_float_activations_can_be_the_first_stage():
    """Also the feed-forward function may change, from that of the model."""
    model = student("rebnn-w1a32")
    rebinarize(model, ReBNNConfig.preset("rebnn-bit-w1a1"))
    calibrate(model, BATCH)
    again = student("rebnn-bit-w1a1")
    assert torch.equal(logits(model), logits(again))  # nothing was trained: the same as binarizing at once
    assert model.config.quantization_config == again.config.quantization_config


# Training


class Stream(torch.utils.data.IterableDataset):
    """Examples without a length, with a column that the model does not take."""

    def __iter__(self):
        for i in range(64):
            yield {k: v[i % 8] for k, v in BATCH.items()} | {"sentence": "not for the model"}


def columns():
    examples = [{k: v[i].tolist() for k, v in BATCH.items()} | {"sentence": "not for the model"} for i in range(8)]
    return datasets.Dataset.from_list(examples)


@pytest.mark.parametrize("dataset", [Stream, columns, lambda: columns().to_iterable_dataset()])
def test_training_calibrates_on_what_the_trainer_would_train_on(dataset, tmp_path):
    arguments = ReBNNTrainingArguments(
        output_dir=str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=4,
        report_to="none",
        use_cpu=True,
        save_strategy="no",
        plot_oscillation=False,
        disable_tqdm=True,
    )
    trainer = ReBNNTrainer(
        model_init=lambda: binarize(build(), ReBNNConfig.preset("rebnn-bit-w1a1")),  # a new model when training starts
        teacher=build(),
        args=arguments,
        train_dataset=dataset(),
        data_collator=hf.DefaultDataCollator(),
    )
    trainer.train()
    assert all(m.scale.item() > 0 for m in trainer.model.modules() if isinstance(m, Elastic))


def test_a_step_of_training_calibrates_alike_whatever_the_process_sees_first(tmp_path):
    """Scales come from a sample fixed by the seed; a resumed model keeps those it has."""

    def scales(order):
        model = binarize(build(), ReBNNConfig.preset("rebnn-bit-w1a1"))
        data = [{k: v[i] for k, v in BATCH.items()} for i in range(8)]
        arguments = ReBNNTrainingArguments(
            output_dir=str(tmp_path),
            max_steps=1,
            learning_rate=0.0,
            data_seed=order,
            per_device_train_batch_size=2,
            report_to="none",
            use_cpu=True,
            save_strategy="no",
            plot_oscillation=False,
            disable_tqdm=True,
        )
        ReBNNTrainer(model=model, teacher=build(), args=arguments, train_dataset=data).train()
        return [m.scale.item() for m in model.modules() if isinstance(m, Elastic)]

    assert scales(1) == scales(2) and all(scale > 0 for scale in scales(1))


def test_activation_parameters_have_their_own_learning_rate(tmp_path):
    model = student("reactnet")
    arguments = ReBNNTrainingArguments(
        output_dir=str(tmp_path), learning_rate=1e-3, activation_learning_rate=1e-2, weight_decay=0.1, use_cpu=True
    )
    optimizer = ReBNNTrainer(model=model, teacher=build(), args=arguments).create_optimizer()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    (group,) = [g for g in optimizer.param_groups if g["lr"] == 1e-2]
    held = {names[id(parameter)].rpartition(".")[2] for parameter in group["params"]}
    assert held == {"shift", "shift_in", "slope", "shift_out"} and group["weight_decay"] == 0
    assert sum(len(g["params"]) for g in optimizer.param_groups) == len(names)


def test_regression_takes_the_mean_square_whatever_the_preset(tmp_path):
    """A soft cross-entropy of one logit is always 0 and trains nothing (BiT's fault C3)."""
    teacher, model = build(1), binarize(build(1), ReBNNConfig.preset("bit"))
    calibrate(model, BATCH)
    arguments = ReBNNTrainingArguments.preset("bit", output_dir=str(tmp_path), hidden_weight=0.0, use_cpu=True)
    trainer = ReBNNTrainer(model=model, teacher=teacher, args=arguments)
    loss = trainer.compute_loss(model.train(), BATCH)
    assert loss.item() == pytest.approx((logits(model) - logits(teacher)).square().mean().item(), rel=1e-5)


def test_summary_says_what_stays_float():
    result = summary(student("rebnn-bit-w1a1", word_embeddings=True, pooler=True))
    notes = {row.name: row.note for row in result.rows}
    floats = {
        "bert.embeddings.position_embeddings": "float: embedding",
        "bert.embeddings.LayerNorm": "float: norm",
        "classifier": "float: head (head=False)",
    }
    for name, note in floats.items():
        assert notes[name] == note
        assert [line for line in str(result).splitlines() if name in line and note in line], name
    assert all(notes[name].startswith("latent") for name in ("bert.embeddings.word_embeddings", "bert.pooler.dense"))


@pytest.mark.parametrize("preset", ["rebnn-bit-w1a1", "rebnn-bit-w1a8", "rebnn-bibert-w1a1", "reactnet"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_runs_and_comes_back(preset, dtype, tmp_path):
    """Codes may differ from those of float32; file and memory must not."""
    model = pack(student(preset, word_embeddings=True), dtype)
    expected = logits(model)
    assert expected.dtype == dtype and expected.isfinite().all()
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(hf.AutoModelForSequenceClassification.from_pretrained(tmp_path)), expected)
