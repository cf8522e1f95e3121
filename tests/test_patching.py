"""binarize, pack, unpack: refusals that leave a model as it was, idempotence, tied decoders, types, other heads."""

import copy
import json

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file
from torch import nn

from rebnn_hf import ReBNNConfig, binarize, pack, unpack
from rebnn_hf.kernels import use_backend
from rebnn_hf.layers import LATENT_TYPES, PACKED_TYPES, BinaryEmbedding, BinaryLinear, PackedEmbedding, PackedLinear

SIZES = dict(vocab_size=50, hidden_size=20, num_hidden_layers=2, num_attention_heads=2, intermediate_size=36)
IDS = torch.arange(3, 17).reshape(2, 7)
MASKED_LM = {
    "bert": (hf.BertForMaskedLM, hf.BertConfig(**SIZES)),
    "roberta": (hf.RobertaForMaskedLM, hf.RobertaConfig(**SIZES)),
    "distilbert": (
        hf.DistilBertForMaskedLM,
        hf.DistilBertConfig(vocab_size=50, dim=20, n_layers=2, n_heads=2, hidden_dim=36),
    ),
    "electra": (hf.ElectraForMaskedLM, hf.ElectraConfig(embedding_size=12, **SIZES)),
    "mpnet": (hf.MPNetForMaskedLM, hf.MPNetConfig(**SIZES)),
    "deberta_v2": (hf.DebertaV2ForMaskedLM, hf.DebertaV2Config(**SIZES)),
    "modernbert": (
        hf.ModernBertForMaskedLM,
        hf.ModernBertConfig(pad_token_id=0, bos_token_id=1, cls_token_id=1, eos_token_id=2, sep_token_id=2, **SIZES),
    ),
}


def build(cls=hf.BertForSequenceClassification, config=None):
    torch.manual_seed(0)
    model = cls(copy.deepcopy(config) if config is not None else hf.BertConfig(**SIZES))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def snapshot(model):
    """Everything that a refused call must leave alone: classes, tensors and their identity, ties, config."""
    return (
        {name: type(module) for name, module in model.named_modules(remove_duplicate=False)},
        {key: (id(tensor), tensor.dtype) for key, tensor in model.state_dict(keep_vars=True).items()},
        {k: t.clone() for k, t in model.state_dict().items() if not t.is_meta},
        model.config.to_json_string(use_diff=False),
    )


def assert_untouched(model, before):
    after = snapshot(model)
    assert after[0] == before[0]
    assert after[1] == before[1]
    assert after[2].keys() == before[2].keys()
    assert all(torch.equal(after[2][key], tensor) or tensor.isnan().any() for key, tensor in before[2].items())
    assert after[3] == before[3]


def converted(model, types=LATENT_TYPES):
    return {name for name, module in model.named_modules() if isinstance(module, types)}


# Refusals


class MyLinear(nn.Linear):
    pass


def with_subclass(model):
    layer = model.bert.encoder.layer[1]
    layer.output.dense = MyLinear(36, 20)
    return model


def with_shared_module(model):
    layers = model.bert.encoder.layer
    layers[1].output.dense = layers[0].output.dense
    return model


def with_shared_weight(model):
    layers = model.bert.encoder.layer
    layers[1].output.dense.weight = layers[0].output.dense.weight
    return model


def with_integer_weight(model):
    layer = model.bert.encoder.layer[1].output.dense
    layer.weight = nn.Parameter(torch.zeros(20, 36, dtype=torch.int8), requires_grad=False)
    return model


def on_meta(model):
    return model.to("meta")


def with_sparse_embedding(model):
    model.bert.embeddings.word_embeddings.sparse = True
    return model


LAST = r"bert\.encoder\.layer\.1\.output\.dense"
REFUSALS = {
    "nothing matched": (
        None,
        dict(modules_to_not_convert=["encoder"]),
        r"nothing to binarize in BertForSequenceClassification: of its 14 linear layers .*Looked at: .*bert\.pooler",
    ),
    "unknown name": (
        None,
        dict(modules_to_not_convert=["encoder.layer.7"]),
        r"'encoder\.layer\.7' matches no module of BertForSequenceClassification; print\(model\)",
    ),
    "invalid expression": (
        None,
        dict(modules_to_not_convert=["encoder.(layer"]),
        r"modules_to_not_convert: 'encoder\.\(layer' is not a regular expression \(missing \)",
    ),
    "subclass": (
        with_subclass,
        {},
        rf"{LAST} is a .*\.MyLinear, not a plain nn\.Linear, .* add 'bert.* to modules_to_not_convert",
    ),
    "shared module": (with_shared_module, {}, rf"layer\.0\.output\.dense\.weight is shared with {LAST}\.weight"),
    "shared weight": (with_shared_weight, {}, rf"layer\.0\.output\.dense\.weight is shared with {LAST}\.weight"),
    "integer weight": (with_integer_weight, {}, rf"{LAST}\.weight is torch\.int8; expected floating point"),
    "meta device": (on_meta, {}, r"is on the meta device and has no values; load the model first"),
    "sparse embedding": (with_sparse_embedding, dict(word_embeddings=True), r"max_norm or sparse"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_a_refused_model_is_as_it_was(case):
    prepare, settings, message = REFUSALS[case]
    model = build()
    if prepare is not None:
        model = prepare(model)
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        binarize(model, ReBNNConfig(**settings))
    assert_untouched(model, before)


def test_names_for_a_subclass_or_a_shared_module_are_a_remedy():
    model = binarize(with_subclass(build()), ReBNNConfig(modules_to_not_convert=["encoder.layer.1.output.dense"]))
    assert len(converted(model)) == 11
    model = binarize(with_shared_module(build()), ReBNNConfig(modules_to_not_convert=["layer.0.output.dense"]))
    assert len(converted(model)) == 10


def test_a_packed_model_is_not_binarized_again():
    model = pack(binarize(build()))
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"the model is packed: .* use unpack\(\) .*, or load the latent checkpoint"):
        binarize(model)
    assert_untouched(model, before)


@pytest.mark.parametrize("verb", [binarize, pack, unpack])
def test_what_is_no_model_is_refused(verb):
    with pytest.raises(TypeError, match=rf"{verb.__name__}\(\) expects .* or a plain .*, got OrderedDict"):
        verb(build().state_dict())


def test_a_float_model_is_not_packed():
    model = build()
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"pack\(\) expects a model made by rebnn_hf\.binarize\(\), got a float one"):
        pack(model)
    assert_untouched(model, before)


def test_a_float_model_is_returned_by_unpack():
    model = build()
    before = snapshot(model)
    assert unpack(model) is model
    assert_untouched(model, before)


@pytest.mark.parametrize("tensor", ["weight", "weight_scale"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_diverged_model_is_not_packed(tensor, value):
    model = binarize(build())
    broken = model.bert.encoder.layer[1].output.dense
    with torch.no_grad():
        getattr(broken, tensor).flatten()[3] = value
    before = snapshot(model)
    with pytest.raises(
        ValueError, match=rf"1 tensors hold NaN or infinity \(first: {LAST}\.{tensor}\); training diverged"
    ):
        pack(model)
    assert_untouched(model, before)


def test_pack_refuses_an_integer_type():
    model = binarize(build())
    before = snapshot(model)
    with pytest.raises(TypeError, match=r"dtype=torch\.int8 is not floating point; use torch\.float32"):
        pack(model, dtype=torch.int8)
    assert_untouched(model, before)


def test_pack_checks_what_stays_float_and_packed_models_too():
    model = pack(binarize(build()))
    with torch.no_grad():
        model.classifier.weight[0, 0] = 1e6
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"classifier\.weight has values that do not fit into torch\.float16"):
        pack(model, dtype=torch.float16)
    assert_untouched(model, before)
    assert pack(model, dtype=torch.bfloat16).classifier.weight.dtype == torch.bfloat16


def test_pack_refuses_a_type_too_small_for_the_scales():
    model = binarize(build())
    with torch.no_grad():
        model.bert.encoder.layer[1].output.dense.weight_scale[0] = 1e5
    before = snapshot(model)
    with pytest.raises(ValueError, match=rf"{LAST}\.weight_scale has values that do not fit into torch\.float16"):
        pack(model, dtype=torch.float16)
    assert_untouched(model, before)


# Names to leave out


@pytest.mark.parametrize(
    ("patterns", "count"),
    [
        (["encoder.layer.0"], 6),  # a name relative to the base model, with all it contains
        (["bert.encoder.layer.0"], 6),  # a full name
        (["layer.0"], 6),  # whole parts of a name
        (["attention"], 4),
        (["attention.self"], 6),
        (["query"], 10),
        (["output.dense"], 8),
        ([r"encoder\.layer\.\d+\.attention"], 4),  # a regular expression for the start
        ([r".*\.(query|key)"], 8),
        (["layer.0", "layer.1.attention"], 2),
        (["classifier", "pooler"], 12),
    ],
)
def test_modules_to_not_convert(patterns, count):
    model = binarize(build(), ReBNNConfig(modules_to_not_convert=patterns))
    assert len(converted(model)) == count


def test_parts_of_a_word_do_not_match():
    with pytest.raises(ValueError, match="'quer' matches no module"):
        binarize(build(), ReBNNConfig(modules_to_not_convert=["quer"]))


def test_embeddings_left_out_by_name_stay_tied():
    settings = dict(word_embeddings=True, modules_to_not_convert=["word_embeddings"])
    model = binarize(build(hf.BertForMaskedLM), ReBNNConfig(**settings))
    assert type(model.get_input_embeddings()) is nn.Embedding
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert model.config.tie_word_embeddings


# Idempotence, settings, shared configs


def test_binarize_is_idempotent():
    model = binarize(build(), ReBNNConfig(pooler=True))
    before = snapshot(model)
    assert binarize(model) is model
    assert binarize(model, ReBNNConfig(pooler=True)) is model
    assert_untouched(model, before)


def test_other_settings_on_a_latent_model_are_refused():
    model = binarize(build())
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"already binarized with other settings \(weight_ste, pooler\); reload"):
        binarize(model, ReBNNConfig(pooler=True, weight_ste="identity"))
    assert_untouched(model, before)


def test_pack_and_unpack_are_idempotent():
    model = pack(binarize(build()))
    before = snapshot(model)
    assert pack(model) is model
    assert_untouched(model, before)
    unpack(model)
    before = snapshot(model)
    assert unpack(model) is model
    assert_untouched(model, before)


def test_binarize_keeps_the_very_parameters():
    model = build()
    before = {name: id(parameter) for name, parameter in model.named_parameters()}
    binarize(model)
    after = {name: id(parameter) for name, parameter in model.named_parameters()}
    assert {name: after[name] for name in before} == before, "an optimizer made earlier must still hold them"


def test_the_users_config_is_copied():
    config = ReBNNConfig()
    first, second = binarize(build(), config), binarize(build(hf.BertModel), config)
    assert config == ReBNNConfig()
    pack(first)
    assert first.config.quantization_config.state == "packed"
    assert second.config.quantization_config.state == "latent"


def test_a_model_with_the_same_config_object_is_not_taken_for_binarized():
    shared = hf.BertConfig(**SIZES)
    teacher, student, other = (hf.BertForSequenceClassification(shared) for _ in range(3))
    binarize(student)
    with pytest.raises(ValueError, match="got a float one"):
        pack(teacher)
    binarize(other, ReBNNConfig(pooler=True))
    assert len(converted(other)) == 13
    assert student.config.quantization_config.pooler is False
    pack(other)
    assert student.config.quantization_config.state == "latent"
    assert other.bert.config is other.config


def test_a_model_built_from_a_binarized_config_is_float_until_binarized():
    student = binarize(build())
    fresh = hf.BertForSequenceClassification(student.config)
    assert len(converted(binarize(fresh))) == 12


def test_binarizing_the_base_model_is_saved_with_the_whole(tmp_path):
    model = build()
    binarize(model.bert)
    expected = logits(model)
    model.save_pretrained(tmp_path)
    loaded = hf.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert converted(loaded) == converted(model)
    assert torch.equal(logits(loaded), expected)


def test_training_mode_is_kept():
    model = binarize(build().train())
    assert all(module.training for module in model.modules())
    assert all(not module.training for module in pack(model.eval()).modules())


@pytest.mark.parametrize("state", ["latent", "packed"])
def test_deepcopy_is_independent(state):
    model = binarize(build())
    if state == "packed":
        pack(model)
    twin = copy.deepcopy(model)
    expected = logits(model)
    assert torch.equal(logits(twin), expected)
    unpack(twin)
    assert model.config.quantization_config.state == state
    assert converted(model, LATENT_TYPES + PACKED_TYPES) and not converted(twin, LATENT_TYPES + PACKED_TYPES)
    assert torch.equal(logits(model), expected)


# Tied decoders


@pytest.mark.parametrize("name", MASKED_LM)
def test_default_keeps_the_decoder_tied(name, tmp_path):
    model = pack(binarize(build(*MASKED_LM[name])))
    model.save_pretrained(tmp_path)
    loaded = hf.AutoModelForMaskedLM.from_pretrained(tmp_path)
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    assert torch.equal(logits(loaded), logits(model))
    with torch.no_grad():
        loaded.get_input_embeddings().weight.mul_(2)
    assert not torch.allclose(logits(loaded), logits(model))


@pytest.mark.parametrize("name", MASKED_LM)
def test_tied_word_embeddings_are_refused_with_a_remedy(name, tmp_path):
    model = build(*MASKED_LM[name])
    model.save_pretrained(tmp_path)
    before = snapshot(model)
    message = r"embeddings\.weight is shared with .*\.weight, and bits cannot be tied: untie_embeddings=True"
    with pytest.raises(ValueError, match=message):
        binarize(model, ReBNNConfig(word_embeddings=True))
    assert_untouched(model, before)
    with pytest.raises(ValueError, match=message):
        hf.AutoModelForMaskedLM.from_pretrained(tmp_path, quantization_config=ReBNNConfig(word_embeddings=True))


@pytest.mark.parametrize("name", MASKED_LM)
def test_untied_decoder_has_a_float_life_of_its_own(name, tmp_path):
    model = build(*MASKED_LM[name])
    table = model.get_input_embeddings().weight
    start = table.detach().clone()
    binarize(model, ReBNNConfig(word_embeddings=True, untie_embeddings=True))
    decoder = model.get_output_embeddings()
    assert type(decoder) is nn.Linear
    assert type(model.get_input_embeddings()) is BinaryEmbedding
    assert model.get_input_embeddings().weight is table and decoder.weight is not table
    assert torch.equal(decoder.weight, start)
    assert model.config.tie_word_embeddings is False
    model.tie_weights(recompute_mapping=False)
    model.tie_weights()
    assert decoder.weight is not table, "transformers has forgotten the tie"

    with torch.no_grad():  # as after training: weight and bias of the decoder have moved on
        decoder.weight.add_(0.3 * torch.randn_like(decoder.weight))
        decoder.bias.add_(0.3 * torch.randn_like(decoder.bias))
    assert torch.equal(model.get_input_embeddings().weight, start)
    expected = logits(model)
    model.save_pretrained(tmp_path / "latent")
    assert torch.equal(logits(hf.AutoModelForMaskedLM.from_pretrained(tmp_path / "latent")), expected)

    exact = copy.deepcopy(model).double()
    pack(model).save_pretrained(tmp_path / "packed")
    loaded = hf.AutoModelForMaskedLM.from_pretrained(tmp_path / "packed")
    assert type(loaded.get_input_embeddings()) is PackedEmbedding
    assert type(loaded.get_output_embeddings()) is nn.Linear
    assert torch.equal(loaded.get_output_embeddings().weight, decoder.weight)
    assert torch.equal(logits(loaded), logits(model))
    # In float64, where the order in which products are summed does not show.
    in_latent = logits(exact)
    torch.testing.assert_close(logits(pack(exact)), in_latent, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["bert", "distilbert"])
def test_untied_while_loading_a_float_checkpoint(name, tmp_path):
    config = ReBNNConfig(word_embeddings=True, untie_embeddings=True)
    build(*MASKED_LM[name]).save_pretrained(tmp_path / "float")
    loaded = hf.AutoModelForMaskedLM.from_pretrained(tmp_path / "float", quantization_config=config)
    expected = binarize(hf.AutoModelForMaskedLM.from_pretrained(tmp_path / "float"), config)
    assert loaded.get_output_embeddings().weight is not loaded.get_input_embeddings().weight
    assert torch.equal(logits(loaded), logits(expected))
    loaded.save_pretrained(tmp_path / "latent")
    again = hf.AutoModelForMaskedLM.from_pretrained(tmp_path / "latent")
    assert torch.equal(logits(again), logits(expected))


def test_a_tied_decoder_is_not_binarized_as_head():
    model = build(hf.BertForMaskedLM)
    before = snapshot(model)
    message = r"predictions\.decoder\.weight is shared with bert\.embeddings.*: add 'cls.* to modules_to_not_convert"
    with pytest.raises(ValueError, match=message):
        binarize(model, ReBNNConfig(head=True))
    assert_untouched(model, before)
    binarize(model, ReBNNConfig(head=True, modules_to_not_convert=["decoder"]))
    assert "cls.predictions.transform.dense" in converted(model)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_binary_embeddings_are_not_tied_to_a_decoder_that_joins_later(tmp_path):
    pack(binarize(build(hf.BertModel), ReBNNConfig(word_embeddings=True))).save_pretrained(tmp_path)
    loaded = hf.AutoModelForMaskedLM.from_pretrained(tmp_path)
    assert type(loaded.get_input_embeddings()) is PackedEmbedding
    assert loaded.get_output_embeddings().weight.shape == (50, 20)
    assert logits(loaded).isfinite().all()


# Types


@pytest.mark.parametrize("name", ["bert", "modernbert"])
def test_pack_to_float16(name, tmp_path):
    cls = {"bert": hf.BertForSequenceClassification, "modernbert": hf.ModernBertForSequenceClassification}[name]
    model = binarize(build(cls, MASKED_LM[name][1]))
    expected = logits(model)
    bits = {n: m.weight for n, m in pack(copy.deepcopy(model)).named_modules() if isinstance(m, PackedLinear)}
    pack(model, dtype=torch.float16)
    assert model.dtype == model.config.dtype == torch.float16
    for key, tensor in model.state_dict().items():
        expected_type = torch.uint8 if key.removesuffix(".weight") in bits else torch.float16
        assert tensor.dtype == expected_type, key
    assert all(torch.equal(model.get_submodule(n).weight, weight) for n, weight in bits.items())
    # fp16 has eps = 2**-10 (half of it per rounding). Some 20 roundings lie on the path of a logit (values and
    # weights are about 1), so 20 * 2**-11 = 1e-2 of the logit's size is a bound with room to spare.
    torch.testing.assert_close(logits(model).float(), expected, rtol=1e-2, atol=1e-2)

    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "float16"
    loaded = hf.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert loaded.dtype == torch.float16
    buffers = {n: b.dtype for n, b in loaded.named_buffers()}
    assert buffers == {n: b.dtype for n, b in model.named_buffers()}
    assert torch.equal(logits(loaded), logits(model))


def test_float16_halves_what_is_not_bits(tmp_path):
    model = pack(binarize(build()), dtype=torch.float16)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    bits = sum(t.numel() for t in tensors.values() if t.dtype == torch.uint8)
    halves = sum(t.numel() for t in tensors.values() if t.dtype == torch.float16)
    # per layer: query, key, value, output 20 rows of 3 bytes; intermediate 36 of 3; output 20 of 5
    assert bits == 2 * (4 * 20 * 3 + 36 * 3 + 20 * 5)
    assert sum(t.numel() for t in tensors.values()) == bits + halves


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_models_are_binarized_in_their_type(dtype):
    model = binarize(build().to(dtype))
    layer = model.bert.encoder.layer[0].output.dense
    assert layer.weight.dtype == layer.weight_scale.dtype == layer.balance.dtype == dtype
    expected = logits(model)
    pack(model)
    assert layer is not model.bert.encoder.layer[0].output.dense
    assert model.bert.encoder.layer[0].output.dense.weight_scale.dtype == dtype
    with use_backend("reference"):
        assert torch.equal(logits(model), expected)
    torch.testing.assert_close(logits(model), expected)  # the engine computes in float32 and rounds at the end


# Other heads, other vocabularies


@pytest.mark.parametrize("pooler", [False, True])
@pytest.mark.parametrize("state", ["latent", "packed"])
def test_another_head_class_loads_the_encoder(state, pooler, tmp_path):
    model = binarize(build(), ReBNNConfig(pooler=pooler))
    if state == "packed":
        pack(model)
    model.save_pretrained(tmp_path)
    loaded = hf.AutoModelForTokenClassification.from_pretrained(tmp_path, num_labels=2)  # it has no pooler
    assert len(converted(loaded, LATENT_TYPES + PACKED_TYPES)) == 12
    with torch.no_grad():
        hidden = loaded.bert(input_ids=IDS).last_hidden_state
        assert torch.equal(hidden, model.bert(input_ids=IDS).last_hidden_state)
    assert type(loaded.classifier) is nn.Linear
    answering = hf.AutoModelForQuestionAnswering.from_pretrained(tmp_path)
    assert answering.qa_outputs.weight.isfinite().all()


def test_a_binary_head_is_new_where_the_float_checkpoint_has_none(tmp_path):
    build(hf.BertModel).save_pretrained(tmp_path)
    model = hf.AutoModelForSequenceClassification.from_pretrained(tmp_path, quantization_config=ReBNNConfig(head=True))
    assert type(model.classifier) is BinaryLinear
    # transformers' own initial values: normal with deviation 0.02, here 40 draws
    assert 0.01 < model.classifier.weight.std() < 0.03
    assert torch.equal(model.classifier.bias, torch.zeros(2))
    torch.testing.assert_close(model.classifier.weight_scale, model.classifier.weight.abs().mean(-1))


def test_float_embeddings_of_a_packed_model_can_grow(tmp_path):
    model = pack(binarize(build()))
    expected = logits(model)
    model.resize_token_embeddings(60)
    assert torch.equal(logits(model), expected)
    model.save_pretrained(tmp_path)
    loaded = hf.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert loaded.get_input_embeddings().weight.shape == (60, 20)
    assert torch.equal(logits(loaded), expected)
    new = IDS + 43
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=new).logits, model(input_ids=new).logits)


# Other weight rules


@pytest.mark.parametrize(
    "settings",
    [
        dict(weight_scale="mean_abs"),
        dict(scale_granularity="tensor"),
        dict(weight_scale="mean_abs", scale_granularity="tensor", weight_center="tensor"),
        dict(weight_scale="mean_abs", weight_center="row", ste_slope="unit", weight_ste="identity"),
    ],
)
def test_every_rule_packs_to_one_scale_per_row(settings, tmp_path):
    model = binarize(build(), ReBNNConfig(word_embeddings=True, **settings))
    expected = logits(model)
    model.save_pretrained(tmp_path / "latent")
    latent = hf.AutoModelForSequenceClassification.from_pretrained(tmp_path / "latent")
    assert torch.equal(logits(latent), expected)
    pack(model).save_pretrained(tmp_path / "packed")
    loaded = hf.AutoModelForSequenceClassification.from_pretrained(tmp_path / "packed")
    assert loaded.bert.encoder.layer[0].output.dense.weight_scale.shape == (20,)
    assert loaded.get_input_embeddings().weight_scale.shape == (50,)
    # Same signs and scales; a scale kept per tensor is only repeated.
    torch.testing.assert_close(logits(loaded), expected, rtol=1e-6, atol=1e-6)
