"""Operation accounting: worked counts of BERT-base, a model small enough for paper, torch's own counter."""

import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForMultipleChoice,
    BertForPreTraining,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    CamembertConfig,
    CamembertForTokenClassification,
    DebertaV2Config,
    DebertaV2Model,
    DeiTConfig,
    DeiTForImageClassification,
    DeiTForImageClassificationWithTeacher,
    DeiTModel,
    DistilBertConfig,
    DistilBertForQuestionAnswering,
    DistilBertForSequenceClassification,
    ElectraConfig,
    ElectraForMaskedLM,
    ElectraForSequenceClassification,
    ModernBertConfig,
    ModernBertForMaskedLM,
    ModernBertForSequenceClassification,
    ModernBertForTokenClassification,
    ModernBertModel,
    MPNetConfig,
    MPNetForMaskedLM,
    MPNetForSequenceClassification,
    MPNetModel,
    RobertaConfig,
    RobertaForMaskedLM,
    RobertaForSequenceClassification,
    SegformerConfig,
    SegformerForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTForMaskedImageModeling,
    ViTModel,
    XLMRobertaConfig,
    XLMRobertaModel,
)

from rebnn_hf import ReBNNConfig, binarize, calibrate, compare, operations, pack
from rebnn_hf.inputs import pair
from rebnn_hf.patching import prepare_for_loading, select_for_loading

ALL = {"word_embeddings": True, "pooler": True}
BLOCKS = 128 * 84_934_656  # matrices of BERT-base's blocks at 128 tokens
ATTENTION = 2 * 12 * 128 * 128 * 768
POOLER = 768 * 768
HEAD = 768 * 2
BASE = 11_174_215_680  # all of them without a head (oracle E2)


def base_on_meta(method, model_class=BertForSequenceClassification, state="latent", config=None):
    with torch.device("meta"):
        model = model_class(config or BertConfig())
    select_for_loading(model, method)
    method.state = state
    prepare_for_loading(model, method)
    model.config.quantization_config = method
    return model


def parts(result):
    return {(row.part, row.bits): row.macs for row in result.rows}


# BERT-base (oracle E2)


def test_float_bert_base():
    with torch.device("meta"):
        result = operations(BertModel(BertConfig()))
    assert parts(result) == {
        ("linear layers of the blocks", (32, 32)): 10_871_635_968,
        ("products of attention", (32, 32)): 301_989_888,
        ("pooler", (32, 32)): 589_824,
    }
    assert result.inputs == "one sequence of 128 tokens"
    assert result.totals == {
        "macs": BASE,
        "float_flops": 22_348_431_360,
        "equivalent_flops": 22_348_431_360,
        "ratio": 1,
    }


@pytest.mark.parametrize("state", ["latent", "packed"])
@pytest.mark.parametrize("preset", ["rebnn-bit-w1a1", "rebnn-bibert-w1a1", "bibert", "bit", "reactnet"])
def test_everything_1_bit_is_a_64th(preset, state):
    result = operations(base_on_meta(ReBNNConfig.preset(preset, **ALL), state=state))
    assert parts(result) == {
        ("linear layers of the blocks", (1, 1)): BLOCKS,
        ("products of attention", (1, 1)): ATTENTION,
        ("pooler", (1, 1)): POOLER,
        ("head", (32, 32)): HEAD,
    }
    assert result.totals["macs"] == BASE + HEAD
    assert result.totals["float_flops"] == 2 * (BASE + HEAD)
    assert result.totals["equivalent_flops"] == 349_194_240 + 2 * HEAD
    assert round(result.totals["equivalent_flops"] / 1e9, 3) == 0.349
    assert result.totals["ratio"] == pytest.approx(64, abs=0.001)


@pytest.mark.parametrize(
    "bits, equivalent, published",
    [(1, 349_194_240, 0.349), (2, 717_262_848, 0.698), (4, 1_510_023_168, 1.397), (8, 3_322_036_224, None)],
)
def test_bits_of_activations(bits, equivalent, published):
    result = operations(base_on_meta(ReBNNConfig.preset(f"rebnn-bit-w1a{bits}", **ALL), BertModel))
    assert parts(result) == {
        ("linear layers of the blocks", (1, bits)): BLOCKS,
        ("products of attention", (bits, bits)): ATTENTION,
        ("pooler", (1, bits)): POOLER,
    }
    assert equivalent == 2 * (bits * (BLOCKS + POOLER) + bits**2 * ATTENTION) / 64
    assert result.totals["equivalent_flops"] == equivalent
    if published:  # counts attention, whose factors both have k bits, at 1 x k too
        assert round(result.totals["float_flops"] * bits / 64 / 1e9, 3) == published


def test_a_float_factor_makes_it_float():
    result = operations(base_on_meta(ReBNNConfig.preset("rebnn-w1a32", **ALL)))
    assert parts(result)["linear layers of the blocks", (1, 32)] == BLOCKS
    assert parts(result)["products of attention", (32, 32)] == ATTENTION
    assert result.totals["equivalent_flops"] == result.totals["float_flops"] == 2 * (BASE + HEAD)


def test_few_bit_inputs_with_float_attention():
    result = operations(base_on_meta(ReBNNConfig(activation="token"), BertModel))
    assert parts(result) == {
        ("linear layers of the blocks", (1, 8)): BLOCKS,
        ("products of attention", (32, 32)): ATTENTION,
        ("pooler", (32, 32)): POOLER,
    }
    assert result.totals["equivalent_flops"] == 2 * (BLOCKS / 8 + ATTENTION + POOLER)


# Small enough for paper


def small(**changes):
    shape = {"vocab_size": 11, "hidden_size": 4, "num_hidden_layers": 2, "num_attention_heads": 2}
    shape |= {"intermediate_size": 6, "max_position_embeddings": 8, "num_labels": 5}
    return BertForSequenceClassification(BertConfig(**shape | changes))


def test_by_hand():
    model = binarize(small(), ReBNNConfig.preset("rebnn-bibert-w1a1"))
    result = operations(model, tokens=3)
    # blocks: 2 layers x 3 tokens x (4 matrices 4x4 and two 4x6); attention: 2 layers x 2 products x 3x3 pairs x 4
    assert parts(result) == {
        ("linear layers of the blocks", (1, 1)): 672,
        ("products of attention", (1, 1)): 144,
        ("pooler", (32, 32)): 16,
        ("head", (32, 32)): 20,
    }
    assert [row.equivalent_flops for row in result.rows] == [21, 4.5, 32, 40]
    assert result.totals == {
        "macs": 852,
        "float_flops": 1704,
        "equivalent_flops": 97.5,
        "ratio": 1704 / 97.5,
    }


def test_blocks_in_part_float():
    config = ReBNNConfig.preset("rebnn-bibert-w1a1", modules_to_not_convert=["layer.1.output"], head=True)
    assert parts(operations(binarize(small(), config), tokens=3)) == {
        ("linear layers of the blocks", (1, 1)): 672 - 3 * 24,
        ("linear layers of the blocks", (32, 32)): 3 * 24,
        ("products of attention", (1, 1)): 144,
        ("pooler", (32, 32)): 16,
        ("head", (1, 1)): 20,
    }


def test_half_precision_is_float_too():
    model = pack(binarize(small(), ReBNNConfig(pooler=True)), torch.float16)
    result = operations(model, tokens=3)
    assert parts(result) == {
        ("linear layers of the blocks", (1, 16)): 672,
        ("products of attention", (16, 16)): 144,
        ("pooler", (1, 16)): 16,
        ("head", (16, 16)): 20,
    }
    assert result.totals["equivalent_flops"] == result.totals["float_flops"]


# torch's counter of what a forward pass really multiplies

SHAPE = {"vocab_size": 23, "hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 3}
SHAPE |= {"intermediate_size": 20, "max_position_embeddings": 16, "pad_token_id": 0}
DISTIL = {"vocab_size": 23, "dim": 12, "n_layers": 2, "n_heads": 3, "hidden_dim": 20, "max_position_embeddings": 16}
ELECTRA = SHAPE | {"embedding_size": 8}
MODERN = SHAPE | {"bos_token_id": 1, "cls_token_id": 1, "eos_token_id": 2, "sep_token_id": 2}
MODERN |= {"num_hidden_layers": 4, "global_attn_every_n_layers": 2, "local_attention": 4}  # windows are masked only
VISION = {"hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 20}
VISION |= {"num_labels": 5, "_attn_implementation": "eager"}


@pytest.mark.parametrize(
    "model_class, config",
    [
        (BertModel, BertConfig(**SHAPE)),
        (BertForSequenceClassification, BertConfig(**SHAPE)),
        (BertForTokenClassification, BertConfig(**SHAPE)),
        (BertForQuestionAnswering, BertConfig(**SHAPE)),
        (BertForMaskedLM, BertConfig(**SHAPE)),
        (BertForMultipleChoice, BertConfig(**SHAPE)),
        (RobertaForSequenceClassification, RobertaConfig(**SHAPE)),
        (RobertaForMaskedLM, RobertaConfig(**SHAPE)),
        (XLMRobertaModel, XLMRobertaConfig(**SHAPE)),
        (CamembertForTokenClassification, CamembertConfig(**SHAPE)),
        (ElectraForSequenceClassification, ElectraConfig(**ELECTRA)),
        (ElectraForMaskedLM, ElectraConfig(**ELECTRA)),
        (DistilBertForSequenceClassification, DistilBertConfig(**DISTIL)),
        (DistilBertForQuestionAnswering, DistilBertConfig(**DISTIL)),
        (MPNetModel, MPNetConfig(**SHAPE)),
        (MPNetForSequenceClassification, MPNetConfig(**SHAPE)),
        (MPNetForMaskedLM, MPNetConfig(**SHAPE)),
        (ModernBertModel, ModernBertConfig(**MODERN)),
        (ModernBertForSequenceClassification, ModernBertConfig(**MODERN)),
        (ModernBertForTokenClassification, ModernBertConfig(**MODERN)),
        (ModernBertForMaskedLM, ModernBertConfig(**MODERN)),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_counts_are_those_of_a_forward_pass(model_class, config):
    config._attn_implementation = "eager"
    model = model_class(config).eval()
    ids = torch.arange(2, 9)[None]
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(input_ids=ids[None] if model_class is BertForMultipleChoice else ids)
    assert operations(model, tokens=7).totals["float_flops"] == counter.get_total_flops()


VIT = ViTConfig(image_size=20, patch_size=4, **VISION)
WIDE_VIT = ViTConfig(image_size=(8, 12), patch_size=(4, 3), num_channels=2, **VISION)
DEIT = DeiTConfig(image_size=20, patch_size=4, **VISION)


@pytest.mark.parametrize(
    "model_class, config, size",
    [
        (ViTModel, VIT, (20, 20)),
        (ViTForImageClassification, VIT, (20, 20)),
        (ViTForImageClassification, VIT, (28, 28)),
        (ViTForImageClassification, VIT, (31, 24)),
        (ViTForImageClassification, WIDE_VIT, (8, 12)),
        (DeiTModel, DEIT, (20, 20)),
        (DeiTForImageClassification, DEIT, (20, 20)),
        (DeiTForImageClassificationWithTeacher, DEIT, (20, 20)),
        (DeiTForImageClassificationWithTeacher, DEIT, (24, 16)),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_counts_of_an_image_are_those_of_a_forward_pass(model_class, config, size):
    model, own = model_class(config).eval(), size == pair(config.image_size)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(pixel_values=torch.zeros(1, config.num_channels, *size), interpolate_pos_encoding=not own)
    result = operations(model, image_size=size)
    assert result.totals["float_flops"] == counter.get_total_flops()
    assert result.inputs == "one image of {} x {}".format(*size)
    assert (operations(model).inputs == result.inputs) == own, "the default is that of the config"


def test_vit_base_in_bits():
    """By hand; with a float head 17.6 GMACs, as papers have it."""
    model = base_on_meta(ReBNNConfig.preset("rebnn-elastic-w1a1"), ViTForImageClassification, config=ViTConfig())
    result = operations(model)
    assert parts(result) == {
        ("stem and other convolutions", (32, 32)): 14 * 14 * 768 * 3 * 16 * 16,
        ("linear layers of the blocks", (1, 1)): 12 * 197 * (4 * 768 * 768 + 2 * 768 * 3072),
        ("products of attention", (32, 32)): 2 * 12 * 197 * 197 * 768,
        ("head", (32, 32)): 768 * 2,
    }
    assert round(result.totals["macs"] / 1e9, 1) == 17.6
    assert result.totals["ratio"] == pytest.approx(16.1, abs=0.1)


def test_compare_counts_images_of_the_size_that_is_given():
    model = ViTForImageClassification(VIT).eval()
    images = {"pixel_values": torch.randn(2, 3, 20, 20)}
    packed = binarize(ViTForImageClassification(VIT), ReBNNConfig.preset("rebnn-elastic-w1a1"))
    calibrate(packed, images)
    result = compare(model, pack(packed.eval()), inputs=images, rounds=1)
    assert result.counted == "one image of 20 x 20"
    assert [row.macs for row in result.rows] == [operations(model).totals["macs"]] * 2
    assert result.rows[1].equivalent_flops == operations(packed).totals["equivalent_flops"]
    assert result.rows[1].equivalent_flops < result.rows[0].equivalent_flops


# Table and errors


def test_table_says_what_it_counts():
    text = str(operations(base_on_meta(ReBNNConfig.preset("rebnn-bit-w1a4", **ALL))))
    lines = text.splitlines()
    assert [" ".join(line.split()) for line in lines[:6]] == [
        "one sequence of 128 tokens bits MACs equivalent FLOPs",
        "linear layers of the blocks 1 x 4 10,871,635,968 1,358,954,496",
        "products of attention 4 x 4 301,989,888 150,994,944",
        "pooler 1 x 4 589,824 73,728",
        "head 32 x 32 1,536 3,072",
        "total 11,174,217,216 1,510,026,240",
    ]
    assert len({len(line) for line in lines[:6]}) == 1
    assert "all in float: 22,348,434,432 FLOPs (2 for each multiply-accumulate), 14.8 x as many" in text
    assert "m * n / 64" in text and "never a measured speed" in text and "Not counted: " in text


def test_to_dict_is_json():
    result = operations(binarize(small(), ReBNNConfig.preset("rebnn-bibert-w1a1")), tokens=3)
    data = json.loads(json.dumps(result.to_dict()))
    assert data["inputs"] == "one sequence of 3 tokens"
    assert data["totals"] == result.totals
    assert data["rows"][1] == {
        "part": "products of attention",
        "bits": [1, 1],
        "macs": 144,
        "equivalent_flops": 4.5,
    }


class BertWithAnotherHead(BertForSequenceClassification.__base__):
    """A model whose head may run once or for every token."""

    def __init__(self, config):
        super().__init__(config)
        self.bert = BertModel(config)
        self.scorer = torch.nn.Linear(config.hidden_size, 1)


class RenamedClassifier(BertForSequenceClassification):
    """A subclass of a known one."""


def test_heads_that_are_not_known():
    for model_class in (BertForPreTraining, BertWithAnotherHead):
        model = model_class(BertConfig(**SHAPE))
        with pytest.raises(ValueError, match=rf"head of {model_class.__name__}.*ForSequenceClassification.*base_model"):
            operations(model)
        assert operations(model.base_model).totals["macs"] > 0
    renamed, known = RenamedClassifier(BertConfig(**SHAPE)), BertForSequenceClassification(BertConfig(**SHAPE))
    assert operations(renamed).totals == operations(known).totals


def test_errors():
    with pytest.raises(ValueError, match=r"'deberta-v2' is not among bert, .*mpnet, modernbert, vit, deit, nor a conv"):
        operations(DebertaV2Model(DebertaV2Config(**SHAPE)))
    hybrid = SegformerForImageClassification(SegformerConfig(num_encoder_blocks=1, depths=[1], hidden_sizes=[8]))
    with pytest.raises(ValueError, match="'segformer' is not among bert, "):  # its attention is in no layer
        operations(hybrid, image_size=32)
    with pytest.raises(ValueError, match="head of ViTForMaskedImageModeling"):
        operations(ViTForMaskedImageModeling(VIT))
    with pytest.raises(ValueError, match="an image of 3 x 20 is smaller than a patch, 4 x 4"):
        operations(ViTModel(VIT), image_size=(3, 20))
    for size in (0, -1, 1.5, True, "128", (8,), (8, 0), (8, 8, 8)):
        with pytest.raises(ValueError, match="image_size"):
            operations(ViTModel(VIT), image_size=size)
    with pytest.raises(ValueError, match="decoder"):
        operations(BertModel(BertConfig(**SHAPE, is_decoder=True)))
    with pytest.raises(TypeError, match=r"expects a transformers PreTrainedModel or a plain .*, got str"):
        operations("model")
    with pytest.raises(ValueError, match="'Linear' is not among bert"):
        operations(torch.nn.Linear(2, 2))
    for tokens in (0, -1, 1.5, True, "128"):
        with pytest.raises(ValueError, match="tokens"):
            operations(small(), tokens=tokens)
