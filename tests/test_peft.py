"""PEFT on 1-bit bases: what adapters compute, train, save and reload, and that nothing is ever merged into bits."""

import copy
import json
import subprocess
import sys

import peft
import pytest
import torch
import transformers as hf
from operators import Recorded
from peft import AutoPeftModelForSequenceClassification, IA3Config, LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

import rebnn_hf
from rebnn_hf import ReBNNConfig, ReBNNTrainer, ReBNNTrainingArguments, fuse, kernels, pack, unpack
from rebnn_hf.integrations.after_import import after_import
from rebnn_hf.integrations.peft import IA3BinaryLinear, LoraBinaryLinear
from rebnn_hf.layers import LATENT_TYPES, PACKED_TYPES, BinaryLinear, PackedEmbedding, PackedLinear

METHODS = {"w1a32": ReBNNConfig(word_embeddings=True), "w1a1": ReBNNConfig.preset("rebnn-bit-w1a1", pooler=True)}
AUTO = hf.AutoModelForSequenceClassification
WIDE = 32


def batch(size=4, length=9, seed=3):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 60, (size, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, length // 2 :] = 0
    return {"input_ids": ids, "attention_mask": mask}


def float_model(name, seed=0):
    hf.set_seed(seed)
    if name == "bert":
        config = hf.BertConfig(
            hidden_size=WIDE, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, vocab_size=60
        )
    else:
        config = hf.DistilBertConfig(dim=WIDE, n_layers=2, n_heads=2, hidden_dim=48, vocab_size=60)
    for dropout in [field for field in vars(config) if "dropout" in field]:
        setattr(config, dropout, 0.0)
    config.initializer_range = 0.2
    return AUTO.from_config(config).eval()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folder of a saved base by (architecture, method, state); made once."""
    root, made = tmp_path_factory.mktemp("bases"), {}

    def folder(name="bert", method="w1a32", state="packed"):
        key = (name, method, state)
        if key not in made:
            model = rebnn_hf.binarize(float_model(name), copy.deepcopy(METHODS[method]))
            rebnn_hf.calibrate(model, batch())
            if state == "packed":
                pack(model)
            made[key] = root / "-".join(key)
            model.save_pretrained(made[key])
        return made[key]

    return folder


@pytest.fixture(scope="module")
def base(folders):
    """Loads a base as a user does."""
    return lambda *key: AUTO.from_pretrained(folders(*key))


EVERY_BASE = pytest.mark.parametrize(
    "key",
    [
        ("bert", "w1a32", "packed"),
        ("bert", "w1a1", "packed"),
        ("distilbert", "w1a1", "packed"),
        ("distilbert", "w1a32", "latent"),
        ("bert", "w1a1", "latent"),
    ],
    ids="-".join,
)


def lora(name="bert", **options):
    options = {"task_type": "SEQ_CLS", "r": 3, "lora_alpha": 6, "target_modules": "all-linear"} | options
    if name == "distilbert":  # PEFT cannot have it in all-linear, of no DistilBERT: its name ends like that of the head
        options["exclude_modules"] = ["pre_classifier"]
    return LoraConfig(**options)


def ia3(name="bert", **options):
    inner = "output.dense" if name == "bert" else "ffn.lin2"
    outer = ["value", "intermediate.dense"] if name == "bert" else ["v_lin", "ffn.lin1"]
    return IA3Config(task_type="SEQ_CLS", target_modules=[*outer, inner], feedforward_modules=[inner], **options)


ADAPTERS = {"lora": lora, "ia3": ia3}


@torch.no_grad()
def trained(model, seed=5):
    """As after some training: no adapter is what it starts as."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name or "ia3_" in name:
            parameter.copy_(float("ia3_" in name) + 0.3 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


@torch.no_grad()
def logits(model, inputs=None, **options):
    return model(**(inputs or batch()), **options).logits


def state_of(model):
    """Every parameter and buffer of the base, by its name without adapters."""
    names = ("lora_", "ia3_", "modules_to_save")
    return {
        name.replace("base_model.model.", "").replace("base_layer.", "").replace("original_module.", ""): tensor.clone()
        for name, tensor in model.state_dict().items()
        if not any(part in name for part in names)
    }


def assert_unchanged(model, before):
    after = state_of(model)
    assert after.keys() == before.keys()
    assert [name for name in before if not torch.equal(after[name], before[name])] == []


def one_bit_names(model):
    """Base names of all 1-bit linear layers."""
    return {name for name, module in model.named_modules() if isinstance(module, PackedLinear | BinaryLinear)}


def adapted_names(model):
    names = (name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer))
    return {name.removeprefix("base_model.model.") for name in names}


# What an adapter computes


@EVERY_BASE
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_a_fresh_adapter_changes_nothing_and_a_trained_one_adds_what_its_equation_says(base, key, adapter):
    model = base(*key)
    names, before = one_bit_names(model), logits(model)
    with kernels.use_backend("reference"):
        expected = logits(model)
        model = get_peft_model(model, ADAPTERS[adapter](key[0])).eval()
        assert torch.equal(logits(model), expected)
    assert adapted_names(model) & names
    trained(model)
    assert (logits(model) - before).abs().max() > 1e-3
    layers = {n: m for n, m in model.named_modules() if isinstance(m, BaseTunerLayer)}
    for name, layer in layers.items():
        inner = layer.get_base_layer()
        if not isinstance(inner, PackedLinear | BinaryLinear):
            continue
        x = torch.randn(2, 5, inner.in_features, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            if adapter == "lora":
                a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
                wanted = inner(x) + 2 * (x @ a.T) @ b.T
            elif layer.is_feedforward:
                wanted = inner(x * layer.ia3_l["default"].flatten())
            else:
                wanted = inner(x) * layer.ia3_l["default"].flatten()
            torch.testing.assert_close(layer(x), wanted, rtol=1e-5, atol=1e-5, msg=name)


@EVERY_BASE
def test_all_linear_finds_every_1_bit_layer_and_not_the_classifier(base, key):
    names = one_bit_names(base(*key))
    model = get_peft_model(base(*key), lora(key[0]))
    adapted = adapted_names(model)
    assert len(names) == 12 + (key[:2] == ("bert", "w1a1")) and names <= adapted
    assert "classifier" not in adapted
    model.add_adapter("second", lora(key[0]))
    assert all("second" in model.get_submodule(f"base_model.model.{name}").lora_A for name in names)


def test_names_mean_the_projections_and_not_their_binarizers(base, tmp_path):
    """1-bit attention has modules called query, key and value too, and these are the names PEFT takes by itself."""
    model = trained(get_peft_model(base("bert", "w1a1"), LoraConfig(task_type="SEQ_CLS")))
    blocks = (f"bert.encoder.layer.{index}.attention.self" for index in range(2))
    assert adapted_names(model) == {f"{block}.{name}" for block in blocks for name in ("query", "value")}
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(base("bert", "w1a1"), tmp_path)), logits(model))
    assert str(rebnn_hf.summary(model)).count("float: adapter") == 4


def test_gradients_go_through_packed_layers_as_through_the_float_model_with_their_weights(base):
    """The first layer learns by what the layers above it let through."""
    packed, dense = (trained(get_peft_model(model, lora())) for model in (base("bert"), unpack(base("bert"))))
    labels = torch.tensor([0, 1, 1, 0])
    for model in (packed, dense):
        model(**batch(), labels=labels).loss.backward()
    expected = {name: p.grad for name, p in dense.named_parameters() if p.grad is not None}
    found = {name: p.grad for name, p in packed.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys() and len(found) == 2 * 13 + 2
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)
        assert gradient.abs().max() > 1e-5, name


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_gradients_through_few_bit_inputs_are_those_of_the_reference(base, adapter):
    gradients = []
    for backend in ("reference", kernels.backend()):
        model = trained(get_peft_model(base("bert", "w1a1"), ADAPTERS[adapter]("bert")))
        with kernels.use_backend(backend):
            model(**batch(), labels=torch.tensor([0, 1, 1, 0])).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    first = [name for name in gradients[0] if "layer.0." in name]
    assert first and gradients[0].keys() == gradients[1].keys()
    for name in gradients[0]:
        torch.testing.assert_close(gradients[1][name], gradients[0][name], rtol=1e-3, atol=1e-5)
    assert all(gradients[0][name].abs().max() > 0 for name in first)


def test_embeddings_take_lora_too(base):
    model = trained(get_peft_model(base("bert"), lora(target_modules=["word_embeddings"])))
    layer, ids = model.get_input_embeddings(), torch.tensor([[3, 0, 59]])
    assert isinstance(layer.base_layer, PackedEmbedding)
    with torch.no_grad():
        delta = 2 * (layer.lora_embedding_B["default"] @ layer.lora_embedding_A["default"]).T
        torch.testing.assert_close(layer(ids), layer.base_layer(ids) + delta[ids])
    with pytest.raises(ValueError, match="cannot be merged into 1 PackedEmbedding"):
        model.merge_and_unload()


# Training, saving, reloading


@EVERY_BASE
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_trained_saved_reloaded_in_every_way_with_the_same_logits(base, folders, key, adapter, tmp_path):
    model = base(*key)
    before = state_of(model)
    model = get_peft_model(model, ADAPTERS[adapter](key[0])).train()
    start = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    assert start.keys() == {n for n, _ in model.named_parameters() if "lora_" in n or "ia3_" in n or "modules_to" in n}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(6):
        loss = model(**batch(), labels=torch.tensor([0, 1, 1, 0])).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert not [name for name, p in model.named_parameters() if name in start and torch.equal(p, start[name])]
    if key[1] == "w1a32":  # with 1-bit activations a step this long may lead uphill
        assert losses[-1] < losses[0] - 0.05
    assert_unchanged(model, before)
    expected = logits(model.eval())
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"] == str(folders(*key))
    reloaded = [
        PeftModel.from_pretrained(base(*key), tmp_path),
        AutoPeftModelForSequenceClassification.from_pretrained(tmp_path),
        AUTO.from_pretrained(tmp_path),
    ]
    for again in reloaded:
        assert torch.equal(logits(again), expected)
        assert_unchanged(again, before)


def test_adapters_of_transformers_itself(base, tmp_path):
    model = base("bert", "w1a1")
    model.add_adapter(lora(target_modules=["query", "output.dense"]), adapter_name="one")
    trained(model).save_pretrained(tmp_path)
    again = base("bert", "w1a1")
    plain = logits(again)
    again.load_adapter(tmp_path, adapter_name="one")
    assert torch.equal(logits(again), logits(model)) and not torch.equal(logits(model), plain)
    again.disable_adapters()
    model.disable_adapters()
    assert torch.equal(logits(again), logits(model))


def test_several_adapters_take_turns_and_share_a_batch(base):
    def alone(seed, config):
        return logits(trained(get_peft_model(base("bert", "w1a1"), config), seed))

    model = get_peft_model(base("bert", "w1a1"), lora(), adapter_name="first")
    model.add_adapter("second", lora(r=2, target_modules=["query", "value"]))
    for seed, name in ((1, "first"), (2, "second")):
        others = {n: p.clone() for n, p in model.named_parameters() if name not in n}
        trained(model, seed)
        with torch.no_grad():
            for other, parameter in model.named_parameters():
                if other in others:
                    parameter.copy_(others[other])
    plain = get_peft_model(base("bert", "w1a1"), lora()).eval()
    answers = {}
    for name in ("first", "second"):
        model.set_adapter(name)
        answers[name] = logits(model)
    assert (answers["first"] - answers["second"]).abs().max() > 1e-3
    mixed = logits(model, adapter_names=["first", "second", "__base__", "first"])
    torch.testing.assert_close(mixed[[0, 3]], answers["first"][[0, 3]], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(mixed[1], answers["second"][1], rtol=1e-4, atol=1e-4)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(plain))
    model.delete_adapter("second")
    model.set_adapter("first")
    assert torch.equal(logits(model), answers["first"])


def test_an_adapter_moves_from_the_latent_base_to_the_packed_one(base, tmp_path):
    model = trained(get_peft_model(base("bert", "w1a32", "latent"), lora()))
    model.save_pretrained(tmp_path)
    on_packed = PeftModel.from_pretrained(base("bert"), tmp_path)
    pack(model.get_base_model())
    assert not [m for m in model.modules() if isinstance(m, LATENT_TYPES)]
    with kernels.use_backend("reference"):
        latent = PeftModel.from_pretrained(base("bert", "w1a32", "latent"), tmp_path)
        assert torch.equal(logits(on_packed), logits(latent)) and torch.equal(logits(model), logits(latent))


def test_bfloat16_autocast_trains(base):
    for method in METHODS:
        model = trained(get_peft_model(base("bert", method), lora())).train()
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**batch(), labels=torch.tensor([0, 1, 1, 0])).loss
        loss.backward()
        gradients = [p.grad for n, p in model.named_parameters() if "lora_B" in n]
        assert all(g.isfinite().all() and g.abs().max() > 0 for g in gradients)


# The Trainer


class Sentences(torch.utils.data.Dataset):
    def __init__(self):
        ids = torch.randint(5, 60, (32, 8), generator=torch.Generator().manual_seed(0))
        self.items = [{"input_ids": row, "attention_mask": row.gt(0).long(), "labels": int(row[0]) % 2} for row in ids]

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]


def trainer_for(model, folder, **arguments):
    defaults = {"output_dir": str(folder), "max_steps": 4, "per_device_train_batch_size": 8, "learning_rate": 3e-2}
    defaults |= {"logging_steps": 1, "save_steps": 4, "disable_tqdm": True, "use_cpu": True}
    return ReBNNTrainer(
        model=model,
        args=ReBNNTrainingArguments(**(defaults | arguments)),
        teacher=str(folder / "teacher"),
        train_dataset=Sentences(),
    )


@pytest.mark.parametrize("state", ["packed", "latent"])
def test_rebnn_trainer_distils_into_adapters_and_leaves_the_base_alone(base, state, tmp_path):
    """All losses, the relations of queries, keys and values too; no balance is kept on frozen weights."""
    float_model("bert", seed=1).save_pretrained(tmp_path / "teacher")
    key = ("bert", "w1a1", state)
    model = base(*key)
    before = state_of(model)
    model = get_peft_model(model, lora())
    trainer = trainer_for(model, tmp_path, relation_weight=0.1, attention_weight=0.01)
    assert type(trainer.teacher) is hf.BertForSequenceClassification
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert {"loss_logits", "loss_hidden", "loss_relations", "loss_attention"} <= logs[0].keys()
    assert logs[-1]["loss"] < logs[0]["loss"]
    assert trainer.resilience is None and not any("flip" in name or "reconstruction" in name for name in logs[0])
    assert_unchanged(model, before)
    checkpoint = tmp_path / "checkpoint-4"
    assert not (checkpoint / "model.safetensors").exists() and not (tmp_path / "oscillation.png").exists()
    again = PeftModel.from_pretrained(base(*key), checkpoint)
    assert torch.equal(logits(again), logits(model.eval()))
    assert not torch.equal(logits(again), logits(base(*key)))


def test_plain_trainer(base, tmp_path):
    model = base("distilbert", "w1a32")
    before = state_of(model)
    model = get_peft_model(model, ia3("distilbert"))
    arguments = hf.TrainingArguments(str(tmp_path), max_steps=3, learning_rate=3e-2, use_cpu=True, disable_tqdm=True)
    hf.Trainer(model, arguments, train_dataset=Sentences()).train()
    assert_unchanged(model, before)
    assert any((p != 1).any() for n, p in model.named_parameters() if "ia3_" in n)


def test_the_balance_rule_refuses_frozen_weights(base):
    model = get_peft_model(base("bert", "w1a32", "latent"), lora())
    with pytest.raises(ValueError, match="all are frozen, as under adapters"):
        rebnn_hf.attach(torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1), model)


# Merging


MERGES = {
    "merge_and_unload": lambda model: model.merge_and_unload(),
    "merge_adapter": lambda model: model.merge_adapter(),
    "safely": lambda model: model.merge_and_unload(safe_merge=True),
    "layer": lambda model: next(m for m in model.modules() if type(m) in (LoraBinaryLinear, IA3BinaryLinear)).merge(),
}


@pytest.mark.parametrize("merge", MERGES)
@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("state", ["packed", "latent"])
def test_merging_is_refused_before_anything_changed(base, state, adapter, merge):
    model = base("bert", "w1a1", state)
    before = state_of(model)
    config = ADAPTERS[adapter]("bert")
    if adapter == "lora":  # the first target is float: it could be merged before the refusal of the next
        config.target_modules = ["word_embeddings", "query", "output.dense"]
    model = trained(get_peft_model(model, config))
    expected = logits(model)
    with pytest.raises(ValueError, match="with an adapter in them the weights would not be 1-bit") as why:
        MERGES[merge](model)
    assert "rebnn_hf.unpack(peft_model.get_base_model())" in str(why.value)
    assert ("PackedLinear" if state == "packed" else "BinaryLinear") in str(why.value)
    assert_unchanged(model, before)
    assert torch.equal(logits(model), expected)
    with pytest.warns(UserWarning, match="Already unmerged"):
        model.unmerge_adapter()
    assert_unchanged(model, before)


def test_mixed_adapters_are_not_merged_either(base):
    model = base("bert")
    before = state_of(model)
    mixed = peft.get_peft_model(model, lora(target_modules=["query"], task_type=None), mixed=True)
    mixed.add_adapter("other", lora(target_modules=["query", "key"], task_type=None))
    with pytest.raises(ValueError, match="cannot be merged into 1 PackedLinear"):
        mixed.merge_and_unload()
    assert_unchanged(mixed, before)


def test_adapters_on_float_modules_merge_as_ever(base):
    model = trained(get_peft_model(base("bert"), lora(target_modules=["pooler.dense"])))
    expected = logits(model)
    merged = model.merge_and_unload()
    assert isinstance(merged, hf.BertForSequenceClassification)
    torch.testing.assert_close(logits(merged), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("state", ["packed", "latent"])
@pytest.mark.parametrize("when", ["before the adapter is loaded", "under the adapter"])
def test_unpacked_bases_merge(base, when, state, adapter, tmp_path):
    model = trained(get_peft_model(base("bert", "w1a32", state), ADAPTERS[adapter]("bert")))
    expected = logits(model)
    if when == "under the adapter":
        assert unpack(model.get_base_model()) is model.get_base_model()
    else:
        model.save_pretrained(tmp_path / "adapter")
        model = PeftModel.from_pretrained(unpack(base("bert", "w1a32", state)), tmp_path / "adapter")
    merged = model.merge_and_unload()
    assert not [m for m in merged.modules() if isinstance(m, (BaseTunerLayer, *LATENT_TYPES, *PACKED_TYPES))]
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-4)
    merged.save_pretrained(tmp_path / "merged")
    assert torch.equal(logits(AUTO.from_pretrained(tmp_path / "merged")), logits(merged))


def test_the_wrapper_is_not_unpacked_by_mistake(base):
    with pytest.raises(TypeError, match=r"peft_model\.get_base_model\(\)"):
        unpack(get_peft_model(base("bert"), lora()))


# What is refused


@pytest.mark.parametrize(
    "config, reason",
    [
        (lora(use_dora=True), "use_dora=True divides by the norms of float weights, and 13 of"),
        (lora(init_lora_weights="pissa"), "init_lora_weights='pissa' starts from the float weights"),
        (lora(init_lora_weights="olora", target_modules=["query"]), "init_lora_weights='olora' .* and 2 of"),
        (lora(use_dora=True, target_modules=None), r"first: bert\.encoder\.layer\.0\.attention\.self\.query"),
        (peft.HRAConfig(target_modules=["query", "key"]), "HRA is not among the methods .* plain LoRA and IA3 work"),
        (peft.OFTConfig(target_modules=".*dense", oft_block_size=0, r=2), "OFT is not among"),
        (peft.VeraConfig(target_modules=["query"], r=2), "VERA is not among"),
    ],
)
@pytest.mark.parametrize("state", ["packed", "latent"])
def test_methods_that_need_float_weights_are_refused_before_anything_changed(base, state, config, reason):
    model = base("bert", "w1a1", state)
    before, expected = state_of(model), logits(model)
    with pytest.raises(ValueError, match=reason):
        get_peft_model(model, copy.deepcopy(config))
    assert not adapted_names(model)
    assert_unchanged(model, before)
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("name", ["latent", "packed"])
@pytest.mark.parametrize("kind", [LoraConfig, IA3Config])
def test_convolutions_are_refused(name, kind):
    """PEFT would build the adapter of the class of its base, out of 1-bit convolutions."""
    latent = rebnn_hf.BinaryConv2d(6, 8, 3)
    network = nn.ModuleDict({"latent": latent, "packed": latent.pack(), "head": nn.Linear(2, 2)})
    options = {"feedforward_modules": []} if kind is IA3Config else {}
    with pytest.raises(ValueError, match=rf"convolutions take no adapters, and 1 of .* \(first: {name}\)"):
        get_peft_model(network, kind(target_modules=["head", name], **options))
    assert type(network["head"]) is nn.Linear
    adapted = get_peft_model(network, LoraConfig(target_modules="all-linear"))
    assert adapted_names(adapted) == {"head"}


def test_a_second_adapter_is_looked_at_like_the_first(base):
    model = get_peft_model(base("bert"), lora(target_modules=["query"]))
    with pytest.raises(ValueError, match=r"2 of the targeted modules are 1-bit \(first: bert\S+query\)"):
        model.add_adapter("second", lora(target_modules=["query"], use_dora=True))


def test_other_methods_are_free_on_float_modules(base):
    pooler = get_peft_model(base("bert"), lora(target_modules=["pooler.dense"], use_dora=True))
    norms = get_peft_model(base("bert"), peft.LNTuningConfig(target_modules=["LayerNorm"]))
    for model in (pooler, norms):
        model(**batch(), labels=torch.tensor([0, 1, 1, 0])).loss.backward()
        assert any(p.grad is not None for p in model.parameters())


# The fused encoder


def operators(model):
    with torch.no_grad(), Recorded() as used:
        result = model(**batch()).logits
    return set(used.names), result


FUSED = "rebnn::encoder"


@pytest.mark.skipif(not kernels.cpu.available(), reason=kernels.cpu.why_not() or "it is there")
@pytest.mark.parametrize("name", ["bert", "distilbert"])
def test_the_fused_encoder_does_not_bypass_adapters_and_comes_back_without_them(base, name):
    model = base(name, "w1a1")
    with_fused, fused = operators(model)
    assert FUSED in with_fused
    assert fuse(model, False) is None
    by_layers = logits(model)
    assert fuse(model) is None
    adapted = trained(get_peft_model(model, lora(name)))
    used, answer = operators(adapted)
    assert FUSED not in used and (answer - by_layers).abs().max() > 1e-2
    slow = base(name, "w1a1")
    fuse(slow, False)
    slow = get_peft_model(slow, lora(name))
    slow.load_state_dict(adapted.state_dict())
    assert torch.equal(logits(slow.eval()), answer)
    with adapted.disable_adapter():
        used, answer = operators(adapted)
        assert FUSED not in used and torch.equal(answer, by_layers)
    plain = adapted.unload()
    used, answer = operators(plain)
    assert used == with_fused and torch.equal(answer, fused)


@pytest.mark.skipif(not kernels.cpu.available(), reason=kernels.cpu.why_not() or "it is there")
def test_adapters_outside_of_the_encoder_leave_it_fused(base):
    model = base("bert", "w1a1")
    before = logits(model)
    model = trained(get_peft_model(model, lora(target_modules=["word_embeddings", "pooler.dense"])))
    used, answer = operators(model)
    assert FUSED in used and (answer - before).abs().max() > 1e-3


# How PEFT gets to know


def test_whoever_imports_peft_and_when():
    code = (
        "import importlib.util, sys, rebnn_hf\n"
        "from transformers.utils import is_peft_available\n"
        "assert is_peft_available() and importlib.util.find_spec('peft').origin\n"
        "assert 'peft' not in sys.modules and 'rebnn_hf.integrations.peft' not in sys.modules\n"
        "from peft.tuners.tuners_utils import BaseTuner\n"
        "for method in (BaseTuner.inject_adapter, BaseTuner._check_merge_allowed):\n"
        "    print(method.__globals__['__name__'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["rebnn_hf.integrations.peft"] * 2, done.stderr


@pytest.fixture
def library(tmp_path, monkeypatch):
    """A library and its glue, which notes what it found of the library."""
    (tmp_path / "some_library.py").write_text("parts = ['whole']\n")
    (tmp_path / "some_glue.py").write_text("import some_library\nsome_library.parts.append('glue')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "meta_path", sys.meta_path.copy())
    yield
    for name in ("some_library", "some_glue"):
        sys.modules.pop(name, None)


def test_glue_follows_its_library_once(library):
    finders = len(sys.meta_path)
    for _ in range(2):
        after_import("some_library", "some_glue")
    assert len(sys.meta_path) == finders + 1 and "some_glue" not in sys.modules
    import some_library

    assert some_library.parts == ["whole", "glue"] and some_library.__spec__.origin.endswith("some_library.py")
    after_import("some_library", "some_glue")
    assert some_library.parts == ["whole", "glue"]


def test_glue_to_a_library_that_is_there_already(library):
    import some_library

    after_import("some_library", "some_glue")
    assert some_library.parts == ["whole", "glue"]


@pytest.mark.parametrize("version, glued", [("1.9", False), ("1.10.dev0", False), ("1.10", True), ("2.0", True)])
def test_glue_that_needs_a_newer_library_waits_for_it(library, tmp_path, caplog, version, glued):
    with (tmp_path / "some_library.py").open("a") as file:
        file.write(f"__version__ = '{version}'\n")
    after_import("some_library", "some_glue", oldest="1.10")
    import some_library

    assert some_library.parts == ["whole", "glue"][: 1 + glued]
    assert (f"some_glue needs some_library 1.10, and this is {version}" in caplog.text) != glued


def test_a_missing_library_stays_missing(library):
    after_import("no_such_library", "some_glue")
    with pytest.raises(ModuleNotFoundError, match="No module named 'no_such_library'"):
        __import__("no_such_library")
    assert "some_glue" not in sys.modules
