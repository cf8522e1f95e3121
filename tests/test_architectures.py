"""One table of architectures times everything that must hold for each of them."""

import json
import struct
from dataclasses import dataclass, field

import pytest
import torch
import transformers as hf
from torch import nn

from rebnn_hf import ReBNNConfig, binarize, calibrate, pack, unpack
from rebnn_hf.kernels import use_backend
from rebnn_hf.layers import LATENT_TYPES, PACKED_TYPES, BinaryEmbedding, BinaryLinear, PackedLinear
from rebnn_hf.packing import unpack_signs

HIDDEN, WIDE, VOCABULARY = 20, 36, 50  # neither 20 nor 36 is a multiple of 8: every row has spare bits
SIZES = dict(
    vocab_size=VOCABULARY, hidden_size=HIDDEN, num_hidden_layers=2, num_attention_heads=2, intermediate_size=WIDE
)
BERT_BLOCK = [
    "attention.self.query",
    "attention.self.key",
    "attention.self.value",
    "attention.output.dense",
    "intermediate.dense",
    "output.dense",
]


@dataclass(frozen=True)
class Architecture:
    cls: type
    config: hf.PretrainedConfig
    base: str
    blocks: str
    block: list[str]
    embedding: str | None = "embeddings.word_embeddings"
    pooler: list[str] = field(default_factory=list)  # full names
    head: list[str] = field(default_factory=lambda: ["classifier.dense", "classifier.out_proj"])
    file_blocks: str | None = None  # where transformers writes historical names instead of its own
    file_block: list[str] | None = None

    @property
    def vision(self):
        return self.embedding is None

    @property
    def auto(self):
        return hf.AutoModelForImageClassification if self.vision else hf.AutoModelForSequenceClassification

    def converted(self):
        """Full names of the modules that the default converts, written from the table, not from the code."""
        return [f"{self.base}.{self.blocks}.{i}.{leaf}" for i in range(2) for leaf in self.block]

    def in_file(self):
        """The same modules, as transformers names them in a file."""
        leaves = self.file_block or self.block
        return [f"{self.base}.{self.file_blocks or self.blocks}.{i}.{leaf}" for i in range(2) for leaf in leaves]

    def build(self):
        torch.manual_seed(0)
        model = self.cls(self.config.__class__(**self.config.to_diff_dict()))
        with torch.no_grad():
            for parameter in model.parameters():  # biases and norms too: a lost one must change the logits
                parameter.add_(0.1 * torch.randn_like(parameter))
        return model.eval()

    def inputs(self):
        generator = torch.Generator().manual_seed(1)
        if self.vision:
            return {"pixel_values": torch.randn(2, 3, 8, 8, generator=generator)}
        mask = torch.tensor([[1] * 7, [1] * 5 + [0] * 2])
        return {"input_ids": torch.randint(3, VOCABULARY, (2, 7), generator=generator), "attention_mask": mask}

    def logits(self, model):
        with torch.no_grad():
            return model(**self.inputs()).logits


ARCHITECTURES = {
    "bert": Architecture(
        hf.BertForSequenceClassification,
        hf.BertConfig(**SIZES),
        "bert",
        "encoder.layer",
        BERT_BLOCK,
        pooler=["bert.pooler.dense"],
        head=["classifier"],
    ),
    "roberta": Architecture(
        hf.RobertaForSequenceClassification, hf.RobertaConfig(**SIZES), "roberta", "encoder.layer", BERT_BLOCK
    ),
    "distilbert": Architecture(
        hf.DistilBertForSequenceClassification,
        hf.DistilBertConfig(vocab_size=VOCABULARY, dim=HIDDEN, n_layers=2, n_heads=2, hidden_dim=WIDE),
        "distilbert",
        "transformer.layer",
        ["attention.q_lin", "attention.k_lin", "attention.v_lin", "attention.out_lin", "ffn.lin1", "ffn.lin2"],
        head=["pre_classifier", "classifier"],
    ),
    "electra": Architecture(
        hf.ElectraForSequenceClassification,
        hf.ElectraConfig(embedding_size=12, **SIZES),  # the projection from 12 to 20 stays float
        "electra",
        "encoder.layer",
        BERT_BLOCK,
    ),
    "mpnet": Architecture(
        hf.MPNetForSequenceClassification,
        hf.MPNetConfig(**SIZES),
        "mpnet",
        "encoder.layer",
        ["attention.attn.q", "attention.attn.k", "attention.attn.v", "attention.attn.o", *BERT_BLOCK[-2:]],
    ),
    "deberta_v2": Architecture(
        hf.DebertaV2ForSequenceClassification,
        hf.DebertaV2Config(
            relative_attention=True, pos_att_type=["p2c", "c2p"], position_buckets=4, share_att_key=False, **SIZES
        ),
        "deberta",
        "encoder.layer",
        [
            "attention.self.query_proj",
            "attention.self.key_proj",
            "attention.self.value_proj",
            "attention.self.pos_key_proj",
            "attention.self.pos_query_proj",
            *BERT_BLOCK[-3:],
        ],
        pooler=["pooler.dense"],
        head=["classifier"],
    ),
    "modernbert": Architecture(
        hf.ModernBertForSequenceClassification,
        hf.ModernBertConfig(
            pad_token_id=0, bos_token_id=1, cls_token_id=1, eos_token_id=2, sep_token_id=2, norm_bias=True, **SIZES
        ),
        "model",
        "layers",
        ["attn.Wqkv", "attn.Wo", "mlp.Wi", "mlp.Wo"],
        embedding="embeddings.tok_embeddings",
        head=["head.dense", "classifier"],
    ),
    "vit": Architecture(
        hf.ViTForImageClassification,
        hf.ViTConfig(
            hidden_size=HIDDEN,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=WIDE,
            image_size=8,
            patch_size=4,
        ),
        "vit",
        "layers",
        [f"attention.{name}_proj" for name in "qkvo"] + ["mlp.fc1", "mlp.fc2"],
        embedding=None,
        head=["classifier"],
        file_blocks="encoder.layer",
        file_block=[f"attention.attention.{name}" for name in ("query", "key", "value")] + BERT_BLOCK[-3:],
    ),
    "deit": Architecture(
        hf.DeiTForImageClassification,
        hf.DeiTConfig(
            hidden_size=HIDDEN,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=WIDE,
            image_size=8,
            patch_size=4,
        ),
        "deit",
        "layers",
        [f"attention.{name}_proj" for name in "qkvo"] + ["mlp.fc1", "mlp.fc2"],
        embedding=None,
        head=["classifier"],
        file_blocks="encoder.layer",
        file_block=[f"attention.attention.{name}" for name in ("query", "key", "value")] + BERT_BLOCK[-3:],
    ),
}
COUNTS = {
    "bert": 12,
    "roberta": 12,
    "distilbert": 12,
    "electra": 12,
    "mpnet": 12,
    "deberta_v2": 16,
    "modernbert": 8,
    "vit": 12,
    "deit": 12,
}
TEXT = [name for name, arch in ARCHITECTURES.items() if not arch.vision]


@dataclass
class Saved:
    """A model in both states, its outputs, and the folders it was saved to."""

    name: str
    arch: Architecture
    float_dir: str
    latent: nn.Module
    latent_dir: str
    packed: nn.Module
    packed_dir: str
    logits: torch.Tensor


@pytest.fixture(scope="module", params=ARCHITECTURES)
def saved(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    arch = ARCHITECTURES[request.param]
    model = arch.build()
    model.save_pretrained(folder / "float")
    latent = perturbed(binarize(model))
    latent.save_pretrained(folder / "latent")
    logits = arch.logits(latent)
    packed = pack(binary_twin(arch, latent))
    packed.save_pretrained(folder / "packed")
    return Saved(
        request.param,
        arch,
        str(folder / "float"),
        latent,
        str(folder / "latent"),
        packed,
        str(folder / "packed"),
        logits,
    )


def perturbed(model):
    """Scales and balances that differ from their initial values, as after training; one scale negative."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, LATENT_TYPES):
                module.weight_scale.mul_(0.5 + torch.rand(module.weight_scale.shape, generator=generator))
                module.weight_scale[0].neg_()
                module.balance.uniform_(generator=generator)
    return model


def binary_twin(arch, latent):
    twin = binarize(arch.build(), ReBNNConfig(**latent.config.quantization_config.method()))
    twin.load_state_dict(latent.state_dict())
    return twin


def of_types(model, types):
    return {name: module for name, module in model.named_modules() if isinstance(module, types)}


def header(folder):
    with open(f"{folder}/model.safetensors", "rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        tensors = json.loads(file.read(size))
    tensors.pop("__metadata__")
    return tensors


# Selection


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_default_converts_the_linear_layers_of_the_blocks_and_nothing_else(name):
    arch = ARCHITECTURES[name]
    model = arch.build()
    linears = set(of_types(model, nn.Linear))
    binarize(model)
    converted = of_types(model, LATENT_TYPES)
    assert len(converted) == COUNTS[name]
    assert set(converted) == set(arch.converted())
    left = linears - set(converted)
    assert left >= {*arch.pooler, *arch.head}
    assert all(type(model.get_submodule(n)) is nn.Linear for n in left)
    assert not of_types(model, BinaryEmbedding)
    config = model.config.quantization_config
    assert config.converted == [n.removeprefix(f"{arch.base}.") for n in converted]
    assert config.converted_head == []
    assert left <= set(config.not_converted)


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("switch", ["word_embeddings", "pooler", "head"])
def test_a_switch_adds_exactly_its_modules(name, switch):
    arch = ARCHITECTURES[name]
    if switch == "word_embeddings" and arch.vision:
        with pytest.raises(ValueError, match=r"word_embeddings=True, but the input embedding of (ViT|DeiT)"):
            binarize(arch.build(), ReBNNConfig(word_embeddings=True))
        return
    expected = {
        "word_embeddings": [f"{arch.base}.{arch.embedding}"],
        "pooler": arch.pooler,
        "head": arch.head,
    }[switch]
    model = binarize(arch.build(), ReBNNConfig(**{switch: True}))
    assert set(of_types(model, LATENT_TYPES)) == {*arch.converted(), *expected}
    config = model.config.quantization_config
    outside = [n for n in expected if not n.startswith(f"{arch.base}.")]
    assert sorted(config.converted_head) == sorted(outside)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_modules_to_not_convert_leaves_a_block_and_a_kind_of_layer_float(name):
    arch = ARCHITECTURES[name]
    skip = [f"{arch.blocks}.0", arch.block[-1]]
    model = binarize(arch.build(), ReBNNConfig(modules_to_not_convert=skip))
    assert set(of_types(model, LATENT_TYPES)) == {
        f"{arch.base}.{arch.blocks}.1.{leaf}" for leaf in arch.block if not f".{leaf}".endswith(f".{arch.block[-1]}")
    }


# Latent


def test_binary_forward_uses_signs_and_scales(saved):
    """The converted model computes what a float model with weights |alpha| * sign(W) computes."""
    reference = saved.arch.build()
    for name, module in of_types(saved.latent, BinaryLinear).items():
        signs = torch.where(module.weight >= 0, 1.0, -1.0)
        reference.get_submodule(name).weight.data = module.weight_scale.abs().unsqueeze(-1).detach() * signs
    # scale * (x b^T) against x (scale * b)^T: same real number, other rounding of sums of up to 36 terms.
    torch.testing.assert_close(saved.arch.logits(reference), saved.logits, rtol=1e-5, atol=1e-5)


def test_latent_checkpoint_returns_with_equal_tensors_and_logits(saved):
    loaded = saved.arch.auto.from_pretrained(saved.latent_dir)
    assert type(loaded) is saved.arch.cls
    assert set(of_types(loaded, LATENT_TYPES)) == set(saved.arch.converted())
    expected = saved.latent.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in loaded.state_dict().items())
    assert torch.equal(saved.arch.logits(loaded), saved.logits)
    assert loaded.config.quantization_config == saved.latent.config.quantization_config


def test_latent_checkpoint_goes_on_training(saved):
    loaded = saved.arch.auto.from_pretrained(saved.latent_dir).train()
    loaded(**saved.arch.inputs(), labels=torch.tensor([0, 1])).loss.backward()
    for name, module in of_types(loaded, LATENT_TYPES).items():
        assert module.weight.grad.abs().max() > 0, name
        assert module.weight_scale.grad.abs().max() > 0, name
    torch.optim.SGD(loaded.parameters(), lr=1.0).step()
    assert not torch.allclose(saved.arch.logits(loaded.eval()), saved.logits)


def test_float_checkpoint_can_be_binarized_while_it_loads(saved):
    config = ReBNNConfig(head=True)
    loaded = saved.arch.auto.from_pretrained(saved.float_dir, quantization_config=config)
    expected = binarize(saved.arch.auto.from_pretrained(saved.float_dir), config)
    assert set(of_types(loaded, LATENT_TYPES)) == {*saved.arch.converted(), *saved.arch.head}
    assert loaded.state_dict().keys() == expected.state_dict().keys()
    assert all(torch.equal(t, expected.state_dict()[key]) for key, t in loaded.state_dict().items())
    assert loaded.config.quantization_config == expected.config.quantization_config
    assert torch.equal(saved.arch.logits(loaded), saved.arch.logits(expected))
    assert config == ReBNNConfig(head=True), "the user's config object must not change"


# Packed


def test_pack_keeps_the_signs_and_the_logits(saved):
    latent, packed = of_types(saved.latent, BinaryLinear), of_types(saved.packed, PackedLinear)
    assert set(packed) == set(latent) == set(saved.arch.converted())
    for name, module in packed.items():
        assert module.weight.dtype == torch.uint8
        assert torch.equal(
            unpack_signs(module.weight, module.in_features), torch.where(latent[name].weight >= 0, 1.0, -1.0)
        )
        assert torch.equal(module.weight_scale, latent[name].weight_scale.abs())
        assert torch.equal(module.bias, latent[name].bias) if module.bias is not None else latent[name].bias is None
    # Same signs and the same products of them; only the rounding of float sums may differ.
    torch.testing.assert_close(saved.arch.logits(saved.packed), saved.logits, rtol=1e-6, atol=1e-6)


def test_packed_checkpoint_returns_with_bitwise_equal_logits(saved):
    loaded = saved.arch.auto.from_pretrained(saved.packed_dir)
    assert type(loaded) is saved.arch.cls
    assert set(of_types(loaded, PACKED_TYPES)) == set(saved.arch.converted())
    assert torch.equal(saved.arch.logits(loaded), saved.arch.logits(saved.packed))
    assert not loaded.training


def test_packed_checkpoint_loads_without_the_head(saved):
    headless = hf.AutoModel.from_pretrained(saved.packed_dir)
    names = {name.removeprefix(f"{saved.arch.base}.") for name in saved.arch.converted()}
    assert set(of_types(headless, PACKED_TYPES)) == names
    with torch.no_grad():
        hidden = headless(**saved.arch.inputs()).last_hidden_state
        expected = saved.packed.base_model(**saved.arch.inputs()).last_hidden_state
    assert torch.equal(hidden, expected)


def test_bytes_on_disk(saved):
    tensors = header(saved.packed_dir)
    float_shapes = {key: tensor["shape"] for key, tensor in header(saved.float_dir).items()}
    names = saved.arch.in_file()
    assert len(names) == COUNTS[saved.name]
    for name in names:
        rows, width = float_shapes[f"{name}.weight"]
        weight, scale = tensors[f"{name}.weight"], tensors[f"{name}.weight_scale"]
        assert (weight["dtype"], weight["shape"]) == ("U8", [rows, -(-width // 8)])
        assert weight["data_offsets"][1] - weight["data_offsets"][0] == rows * -(-width // 8)
        assert (scale["dtype"], scale["shape"]) == ("F32", [rows])
    scales = {f"{name}.weight_scale" for name in names}
    assert tensors.keys() == float_shapes.keys() | scales, "nothing else is added, nothing is lost"
    for key in tensors.keys() - {f"{name}.weight" for name in names} - scales:
        assert (tensors[key]["dtype"], tensors[key]["shape"]) == ("F32", float_shapes[key])


def test_no_key_that_loaders_rename_and_no_balance_in_packed_files(saved):
    added = header(saved.latent_dir).keys() - header(saved.float_dir).keys()
    assert added == {f"{n}.{t}" for n in saved.arch.in_file() for t in ("weight_scale", "balance")}
    assert not [key for key in added if "gamma" in key or "beta" in key]
    assert not [key for key in header(saved.packed_dir) if key.endswith(("balance", "gamma", "beta"))]


@pytest.mark.parametrize("state", ["latent", "packed"])
def test_unpack_leaves_a_plain_transformers_model(saved, state, tmp_path):
    model = unpack(saved.arch.auto.from_pretrained(getattr(saved, f"{state}_dir")))
    ours = [type(m) for m in model.modules() if type(m).__module__.startswith("rebnn_hf")]
    assert not ours
    assert model.state_dict().keys() == saved.arch.build().state_dict().keys()
    # scale * (x b^T) against x (scale * b)^T, as above.
    torch.testing.assert_close(saved.arch.logits(model), saved.logits, rtol=1e-5, atol=1e-5)
    for name in saved.arch.converted():
        magnitudes = model.get_submodule(name).weight.abs()
        assert torch.equal(magnitudes, magnitudes[:, :1].expand_as(magnitudes)), "two values in a row"
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    assert header(tmp_path).keys() == header(saved.float_dir).keys()
    reloaded = saved.arch.auto.from_pretrained(tmp_path)
    assert torch.equal(saved.arch.logits(reloaded), saved.arch.logits(model))
    assert unpack(model) is model


@pytest.mark.parametrize("name", TEXT)
def test_everything_binary_survives_pack_save_load(name, tmp_path):
    arch = ARCHITECTURES[name]
    model = perturbed(binarize(arch.build(), ReBNNConfig(word_embeddings=True, pooler=True, head=True)))
    latent = arch.logits(model)
    pack(model)
    # Sums of the same products, rounded in another order at most.
    torch.testing.assert_close(arch.logits(model), latent, rtol=1e-6, atol=1e-6)
    model.save_pretrained(tmp_path)
    loaded = arch.auto.from_pretrained(tmp_path)
    expected = {*arch.converted(), *arch.pooler, *arch.head, f"{arch.base}.{arch.embedding}"}
    assert set(of_types(loaded, PACKED_TYPES)) == expected
    assert torch.equal(arch.logits(loaded), arch.logits(model))
    with torch.no_grad():
        hidden = hf.AutoModel.from_pretrained(tmp_path)(**arch.inputs()).last_hidden_state
        assert torch.equal(hidden, model.base_model(**arch.inputs()).last_hidden_state), "the head is not missed"
    table = header(tmp_path)[f"{arch.base}.{arch.embedding}.weight"]
    width = 12 if name == "electra" else HIDDEN
    assert (table["dtype"], table["shape"]) == ("U8", [VOCABULARY, -(-width // 8)])


def test_pipeline_reads_a_packed_folder(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["[PAD]", "[UNK]", "a", "fine", "film", "bad", "plot"]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = hf.PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]")
    arch = ARCHITECTURES["bert"]
    model = pack(binarize(arch.build()))
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    texts = ["a fine film", "bad plot bad film a"]
    answers = hf.pipeline("text-classification", model=str(tmp_path), device="cpu")(texts)
    for text, answer in zip(texts, answers, strict=True):
        with torch.no_grad():
            shares = model(**tokenizer(text, return_tensors="pt")).logits.softmax(-1)[0]
        assert answer["label"] == f"LABEL_{shares.argmax()}"
        assert answer["score"] == pytest.approx(shares.max().item(), abs=1e-6)


@pytest.mark.parametrize("rule", [("elastic", 1), ("elastic", 4), ("rsign", 1), ("token", 8)])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_few_bit_inputs_work_on_every_architecture(name, rule, tmp_path):
    arch = ARCHITECTURES[name]
    model = binarize(arch.build(), ReBNNConfig(activation=rule[0], activation_bits=rule[1]))
    calibrate(model, arch.inputs())
    expected = arch.logits(model)
    inputs = of_types(model, BinaryLinear)
    assert inputs and all(layer.input_binarizer is not None for layer in inputs.values())
    float_inputs = arch.logits(binarize(arch.build()))
    assert (expected - float_inputs).abs().max() > 1e-4, "the inputs were left float"
    pack(model).save_pretrained(tmp_path)
    loaded = arch.auto.from_pretrained(tmp_path)
    assert torch.equal(arch.logits(loaded), arch.logits(model))
    with use_backend("reference"):  # the engine rounds once more, which few bits can make large
        assert torch.equal(arch.logits(loaded), expected)
