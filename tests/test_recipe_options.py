"""The options of the recipes: every one of the method is there, and those that are wrong or do nothing are refused."""

from __future__ import annotations

import sys
from dataclasses import fields
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "recipes"))

from embedder_arguments import parse_embedder_arguments
from glue_arguments import parse_glue_arguments
from recipe_arguments import BalanceArguments, BinaryArguments
from squad_arguments import parse_squad_arguments

from rebnn_hf import ReBNNConfig
from rebnn_hf.presets import CONFIGS

TEXT = (parse_glue_arguments, parse_squad_arguments, parse_embedder_arguments)


def refusal(parse, options: list[str], capsys) -> str:
    """What a recipe says of its command line."""
    with pytest.raises(SystemExit) as error:
        parse(options)
    assert error.value.code == 2
    return capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------- the method

NO_OPTIONS = {
    "untie_embeddings",  # no recipe has a model whose word embeddings are shared by a decoder
    "weight_bits",  # part of the format
    "quant_method",
}


def test_every_field_of_the_method_is_an_option():
    options = {option.name for option in fields(BinaryArguments)} - {"preset", "stages"}
    assert options == ReBNNConfig().method().keys() - NO_OPTIONS
    balance = {name for name in ReBNNConfig().method() if name.startswith("balance_")}
    assert {option.name for option in fields(BalanceArguments)} == balance


@pytest.mark.parametrize("parse", TEXT)
def test_switches_need_no_value(parse):
    config = parse(["--word_embeddings", "--pooler", "--head"]).binary.config()
    assert config.word_embeddings and config.pooler and config.head
    binary = parse(["--preset", "bit-released", "--word_embeddings", "false", "--center_gradient"]).binary
    config, preset = binary.config(), ReBNNConfig.preset("bit-released")
    assert preset.word_embeddings and not config.word_embeddings and config.pooler
    assert not preset.center_gradient and config.center_gradient
    assert parse([]).binary.config() == ReBNNConfig()


@pytest.mark.parametrize("preset", CONFIGS)
def test_every_preset_can_be_asked_for(preset):
    assert parse_glue_arguments(["--preset", preset]).binary.config() == ReBNNConfig.preset(preset)


# -------------------------------------------------------------------------------------------------------- wrong numbers


@pytest.mark.parametrize("parse", TEXT)
@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--max_eval_samples", "0"], "--max_eval_samples 0 must be greater than 0"),
        (["--max_train_samples", "-5"], "--max_train_samples -5 must be greater than 0"),
        (["--max_steps", "0"], "--max_steps 0 must be greater than 0, or -1 to count epochs"),
        (["--max_steps", "-2"], "--max_steps -2 must be greater than 0, or -1 to count epochs"),
        (["--batch_size", "0"], "--batch_size 0 must be greater than 0"),
        (["--gradient_accumulation_steps", "0"], "--gradient_accumulation_steps 0 must be greater than 0"),
        (["--epochs", "nan"], "--epochs nan must be greater than 0"),
        (["--warm_up", "-0.1"], "--warm_up -0.1 is a share of the steps"),
        (["--save_steps", "0"], "--save_steps 0 must be greater than 0"),
        (["--seed", "-1"], "--seed -1 must not be negative"),
    ],
)
def test_wrong_numbers_are_refused(parse, options, complaint, capsys):
    assert complaint in refusal(parse, options, capsys)
    assert parse(["--max_steps", "-1", "--seed", "0", "--warm_up", "0"])


@pytest.mark.parametrize("parse", TEXT)
@pytest.mark.parametrize("dropout", ["2", "1", "-0.1"])
def test_dropout_is_a_share(parse, dropout, capsys):
    assert f"--dropout {float(dropout)} is a share of the activations" in refusal(parse, ["--dropout", dropout], capsys)


def test_the_longest_input_is_a_length(capsys):
    for parse in TEXT:
        assert "--max_length 0 must be greater than 0" in refusal(parse, ["--max_length", "0"], capsys)


# ---------------------------------------------------------------------------------------------- options that do nothing

ALONE = [
    ("--stage_teacher previous", "--stages"),
    ("--stage_weight_scales reset", "--stages"),
    ("--stage_activation_scales=carry", "--stages"),
    ("--signed_init 1", "--activation elastic"),
    ("--unsigned-init 1", "--activation elastic"),
    ("--center_gradient", "--weight_center row or tensor"),
    ("--augmentation_probability 0.2", "--augment N"),
    ("--augmentation_candidates 3", "--augment N"),
    ("--augmentation_model x", "--augment N"),
    ("--balance_value 1e-4", "--balance_rule const"),
    ("--balance_strength 2", "--balance_form decoupled"),
]
OF_LOGITS = [
    ("--lora_learning_rate 1e-3", "--lora"),
    ("--lora_epochs 2", "--lora"),
]


@pytest.mark.parametrize(
    ("parse", "option", "partner"),
    [(parse, *pair) for parse in TEXT for pair in ALONE] + [(parse, *pair) for parse in TEXT[:2] for pair in OF_LOGITS],
)
def test_an_option_without_its_partner_is_refused(parse, option, partner, capsys):
    assert f"{option} does nothing without {partner}" in refusal(parse, option.split(), capsys)


def test_the_mean_over_classes_is_refused_without_soft_cross_entropy(capsys):
    complaint = "--logits_reduction batch does nothing without --logits_loss soft_cross_entropy"
    assert complaint in refusal(parse_glue_arguments, ["--logits_reduction", "batch"], capsys)


@pytest.mark.parametrize("beside", ["", "--logits_loss soft_cross_entropy", "--preset bit"])
@pytest.mark.parametrize("reduction", ["batch", "batch_class"])
def test_the_mean_over_classes_is_refused_where_the_classes_are_tokens(reduction, beside, capsys):
    said = " ".join(refusal(parse_squad_arguments, [*beside.split(), "--logits_reduction", reduction], capsys).split())
    assert f"--logits_reduction {reduction} does nothing without logits of classes" in said
    assert said.endswith("mean over the batch: leave it out")
    assert parse_squad_arguments(beside.split()), "what a preset says of it may be there"


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ("--temperature 2 --logits_loss mse", "--temperature 2 does nothing without --logits_loss kl"),
        ("--preset bit-released --packed_dtype float16", "--packed_dtype float16 does nothing without a packed model"),
        ("--preset bit-released --lora", "--lora does nothing without a packed model"),
        ("--ties released --lora 4", "--lora 4 does nothing without a packed model"),
    ],
)
def test_an_option_beside_one_that_rules_it_out_is_refused(options, complaint, capsys):
    assert complaint in refusal(parse_glue_arguments, options.split(), capsys)


@pytest.mark.parametrize(
    "options",
    [
        "--stage_teacher previous --stages rebnn-bit-w1a2 --preset rebnn-bit-w1a1",
        "--signed_init 1 --activation elastic",
        "--signed_init 1 --stages bwn-w1a32 --preset bit",
        "--signed_init 1 --activation token --activation_bits 8 --attention elastic",
        "--logits_reduction batch --preset bit",
        "--logits_reduction batch --logits_loss soft_cross_entropy",
        "--center_gradient false --weight_center row",
        "--balance_value 1e-4 --preset rebnn-released",
        "--temperature 2",
        "--lora --lora_epochs 1",
        "--preset bit-released --ties up --lora",
    ],
)
def test_an_option_with_its_partner_is_taken(options):
    assert parse_glue_arguments(options.split())


# --------------------------------------------------------------------------------------------------- files of one's own


def test_help_says_what_files_have_to_hold(capsys):
    with pytest.raises(SystemExit):
        parse_glue_arguments(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    for words in ("`sentence1`, `sentence` or `text`, for pairs `sentence2`, and `label`", ".jsonl", "mean regression"):
        assert words in text
