"""What models read, and random examples of it that they really can read."""

import pytest
import torch
import transformers as hf

from rebnn_hf.inputs import example_inputs, image_sides, longest, random_inputs, reads_images

BERT = dict(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=20)
VIT = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=1, intermediate_size=16, patch_size=4)


def bert():
    return hf.BertForSequenceClassification(hf.BertConfig(max_position_embeddings=16, **BERT)).eval()


def vit(**sizes):
    return hf.ViTForImageClassification(hf.ViTConfig(**VIT, **sizes)).eval()


def resnet(**sizes):
    config = hf.ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1], layer_type="basic", **sizes)
    return hf.ResNetForImageClassification(config).eval()


def test_tokens():
    model = bert()
    assert not reads_images(model) and longest(model) == 16
    inputs = random_inputs(model, 3, 16)
    assert inputs["input_ids"].shape == (3, 16) and inputs["input_ids"].dtype == torch.int64
    assert inputs["input_ids"].max() < 50 and inputs["attention_mask"].all()
    for batch, length in ((0, 4), (1, 0), (1, 17)):
        with pytest.raises(ValueError, match=f"{batch} x {length} tokens do not fit.*1 to 16"):
            random_inputs(model, batch, length)


def test_images_fit_the_model():
    for model, sides, channels in (
        (vit(image_size=8), (8, 8), 3),
        (vit(image_size=(8, 12), num_channels=1), (8, 12), 1),
        (resnet(num_channels=2), (224, 224), 2),
        (resnet(pretrained_cfg={"input_size": [3, 32, 40]}), (32, 40), 3),  # where timm's wrapper has it
    ):
        assert reads_images(model) and image_sides(model) == sides
        images = random_inputs(model, 2, image_sides(model))
        assert images["pixel_values"].shape == (2, channels, *sides) and images["pixel_values"].std() > 0.9
        assert example_inputs(model)["pixel_values"].shape == (2, channels, *sides)
        with torch.no_grad():
            assert model(**images).logits.shape == (2, 2)
    assert random_inputs(resnet(), 1, 40)["pixel_values"].shape == (1, 3, 40, 40)
    for batch, side in ((0, 8), (1, 0)):
        with pytest.raises(ValueError, match=f"{batch} images of {side} x {side} do not fit"):
            random_inputs(vit(image_size=8), batch, side)


def test_what_reads_neither():
    sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=1, intermediate_size=16)
    audio = hf.Wav2Vec2Model(hf.Wav2Vec2Config(conv_dim=[8], conv_kernel=[3], conv_stride=[2], **sizes))
    with pytest.raises(ValueError, match="Wav2Vec2Model reads input_values; only models that read text or images"):
        random_inputs(audio, 1, 4)
