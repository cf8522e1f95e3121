"""1-bit attention: the worked example, an explicit formulation, and what transformers makes of it."""

import copy

import pytest
import torch
import transformers as hf

from rebnn_hf import ReBNNConfig, ReBNNTrainer, ReBNNTrainingArguments, binarize, calibrate, pack
from rebnn_hf.activations import ActivationRule
from rebnn_hf.attention import BoolAttention, ElasticAttention

SIZES = dict(vocab_size=50, hidden_size=20, num_hidden_layers=2, num_attention_heads=2, intermediate_size=36)
MODELS = {
    "bert": lambda: hf.BertForSequenceClassification(hf.BertConfig(**SIZES)),
    "roberta": lambda: hf.RobertaForSequenceClassification(hf.RobertaConfig(**SIZES)),
    "camembert": lambda: hf.CamembertForSequenceClassification(hf.CamembertConfig(**SIZES)),
    "distilbert": lambda: hf.DistilBertForSequenceClassification(
        hf.DistilBertConfig(vocab_size=50, dim=20, n_layers=2, n_heads=2, hidden_dim=36)
    ),
    "electra": lambda: hf.ElectraForSequenceClassification(hf.ElectraConfig(embedding_size=12, **SIZES)),
    "xlm-roberta": lambda: hf.XLMRobertaForSequenceClassification(hf.XLMRobertaConfig(**SIZES)),
}
BATCH = {
    "input_ids": torch.randint(3, 50, (3, 7), generator=torch.Generator().manual_seed(1)),
    "attention_mask": torch.tensor([[1] * 7, [1] * 5 + [0] * 2, [1] * 3 + [0] * 4]),
}


def rows(*values):
    return torch.tensor(values, dtype=torch.float64)[None, None]


@pytest.mark.parametrize(
    "ties, context",
    [("released", [[1, -1, 1, -1], [1, 1, -1, 1]]), ("up", [[0, 0, 2, 0], [0, 2, 0, 2]])],
)
def test_bool_attention_worked_example(ties, context):
    """Oracle B2: two queries, three keys; the score of 0 is a tie, and only it passes a strict window."""
    query = rows([0.5, -1.2, 0.3, 2], [-0.1, 0.4, -0.6, -0.2]).requires_grad_()
    key = rows([0.2, -0.3, 0.9, 0.7], [-1, 0.5, 0.1, 0.2], [0.4, 0.6, -0.8, -0.5]).requires_grad_()
    value = rows([0.3, -2, 0.1, -0.4], [-0.7, 0.2, 0.5, 0.9], [1.5, 0.1, -0.3, 0.8])
    attention = BoolAttention(ActivationRule("sign", 1, ties=ties))
    assert attention.scores(query, key, 0.5)[0, 0].tolist() == [[2, 0, -1], [-2, 0, 1]]
    out, active = attention(query, key, value, None, 0.5, 0.0)
    assert out[0, 0].tolist() == context
    signs = torch.where(value[0, 0] >= 0, 1.0, -1.0).double()
    bamm = 0.5 * ((2 * active[0, 0] - 1) @ signs + signs.sum(0))  # the form XNOR hardware computes
    assert torch.equal(out[0, 0], bamm)
    attention.scores(query, key, 0.5).sum().backward()
    query.grad = key.grad = None
    out.sum().backward()
    by_active = signs.sum(-1).expand(2, 3)  # d(sum of the context) / d(active)
    window = torch.tensor([[0, 1, 0], [0, 1, 0]]) if ties == "released" else torch.tensor([[0, 1, 1], [0, 1, 1]])
    by_score = by_active * window * 0.5
    inside = query[0, 0].abs() < 1 if ties == "released" else query[0, 0].abs() <= 1
    key_signs = torch.where(key[0, 0] >= 0, 1.0, -1.0).double()
    torch.testing.assert_close(query.grad[0, 0], by_score @ key_signs * inside)


def mask_of(lengths, size):
    mask = torch.zeros(len(lengths), 1, size, size, dtype=torch.float64)
    for row, length in enumerate(lengths):
        mask[row, :, :, length:] = torch.finfo(torch.float64).min
    return mask


def heads(seed):
    return [
        torch.randn(2, 3, 6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + i))
        for i in range(3)
    ]


@pytest.mark.parametrize("bits", [1, 2, 8])
def test_elastic_attention_equals_the_formula(bits):
    query, key, value = heads(bits)
    attention = ElasticAttention(ActivationRule("elastic", bits)).double()
    mask = mask_of([6, 4], 6)
    for name, x in (("query", query), ("key", key), ("value", value)):
        attention.get_submodule(name).calibrate(x)
    attention.probabilities.calibrate(torch.full((3, 6), 1 / 6, dtype=torch.float64))

    def few_bits(x, layer):
        if bits == 1 and layer.signed:
            return layer.scale * torch.where(x >= 0, 1.0, -1.0)
        return layer.scale * (x / layer.scale + 0.5).floor().clamp(layer.low, layer.high)

    scores = few_bits(query, attention.query) @ few_bits(key, attention.key).mT / 2 + mask
    probabilities = few_bits(scores.softmax(-1), attention.probabilities)
    context, weights = attention(query, key, value, mask, 0.5, 0.0)
    torch.testing.assert_close(weights, probabilities)
    torch.testing.assert_close(context, probabilities @ few_bits(value, attention.value))
    assert weights[1, ..., 4:].eq(0).all() and 0 < weights.ne(0).double().mean() < 1


@pytest.mark.parametrize("kind", [BoolAttention, ElasticAttention])
def test_padding_is_never_attended_to(kind):
    query, key, value = heads(9)
    attention = kind(ActivationRule("elastic", 1)).double()
    if kind is ElasticAttention:
        for name, x in (("query", query), ("key", key), ("value", value), ("probabilities", torch.full((3,), 0.1))):
            attention.get_submodule(name).calibrate(x)
    mask = mask_of([6, 4], 6)
    expected, _ = attention(query, key, value, mask, 0.5, 0.0)
    key[1, :, 4:] *= -3
    value[1, :, 4:] *= -3
    found, _ = attention(query, key, value, mask, 0.5, 0.0)
    assert torch.equal(found, expected) and expected.abs().sum() > 0


@pytest.mark.parametrize("ties", ["up", "released"])
def test_what_dropout_drops_is_inactive(ties):
    """Dropout acts on the scores (B3): a dropped pair counts as 0, also where a score of 0 is active."""
    torch.manual_seed(0)
    query = torch.ones(4, 2, 32, 8)
    attention = BoolAttention(ActivationRule("sign", 1, ties=ties))
    _, active = attention(query, query, query, None, 8**-0.5, 0.25)
    assert active.mean().item() == pytest.approx(0.75, abs=0.02)
    _, active = attention(query, query, query, None, 8**-0.5, 0.0)
    assert active.all()


@pytest.mark.parametrize("preset", ["rebnn-bibert-w1a1", "rebnn-bit-w1a1"])
@pytest.mark.parametrize("name", MODELS)
def test_architectures_compute_it_and_ignore_padding(name, preset):
    torch.manual_seed(0)
    model = binarize(MODELS[name]().eval(), ReBNNConfig.preset(preset))
    calibrate(model, BATCH)
    with torch.no_grad():
        out = model(**BATCH, output_attentions=True)
        alone = model(BATCH["input_ids"][2:, :3]).logits
    torch.testing.assert_close(out.logits[2:], alone, atol=1e-5, rtol=1e-5)
    assert len(out.attentions) == 2
    for layer, weights in enumerate(out.attentions):
        assert weights.shape == (3, 2, 7, 7) and weights[2, ..., 3:].eq(0).all()
        levels = weights.unique().tolist()
        assert len(levels) <= 2 and levels[0] == 0, f"layer {layer}: {levels}"


def test_a_float_model_with_the_same_config_object_stays_what_it_was():
    torch.manual_seed(0)
    student = MODELS["bert"]().eval()
    teacher = hf.BertForSequenceClassification(student.config).eval()
    with torch.no_grad():
        expected = teacher(**BATCH).logits
        binarize(student, ReBNNConfig.preset("rebnn-bit-w1a1"))
        torch.testing.assert_close(teacher(**BATCH).logits, expected)


def test_unknown_attention_code_is_refused_before_anything_changes():
    model = hf.MPNetForSequenceClassification(hf.MPNetConfig(**SIZES))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(
        ValueError, match=r"attention='bool' must know the modelling code, and 'mpnet' is not among bert,"
    ):
        binarize(model, ReBNNConfig.preset("bibert"))
    assert model.state_dict().keys() == before.keys()
    binarize(model, ReBNNConfig(activation="sign"))  # 1-bit inputs alone work on every architecture
    assert model(BATCH["input_ids"]).logits.isfinite().all()


@pytest.mark.parametrize("preset", ["rebnn-bit-w1a1", "rebnn-bit-w1a4", "reactnet"])
def test_packed_checkpoint_answers_alike_with_any_implementation_asked_for(tmp_path, preset):
    torch.manual_seed(0)
    model = binarize(MODELS["bert"]().eval(), ReBNNConfig.preset(preset, word_embeddings=True, pooler=True))
    calibrate(model, BATCH)
    with torch.no_grad():
        expected = model(**BATCH).logits
        pack(model).save_pretrained(tmp_path)
        for implementation in (None, "eager", "sdpa"):
            loaded = hf.AutoModelForSequenceClassification.from_pretrained(
                tmp_path, **({"attn_implementation": implementation} if implementation else {})
            )
            assert torch.equal(loaded(**BATCH).logits, expected)


def test_gradient_checkpointing_changes_nothing(tmp_path):
    def gradients(checkpointing):
        torch.manual_seed(0)
        model = binarize(MODELS["bert"](), ReBNNConfig.preset("rebnn-bit-w1a1")).train()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        calibrate(model, BATCH)
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(**BATCH, labels=torch.tensor([0, 1, 1])).loss.backward()
        return {name: parameter.grad for name, parameter in model.named_parameters()}

    torch.testing.assert_close(gradients(True), gradients(False))


def test_attention_loss_compares_scores_of_few_bit_queries_and_keys(tmp_path):
    """The student's scores are those its attention uses: of binarized queries and keys."""
    torch.manual_seed(0)
    teacher = MODELS["bert"]().eval()
    student = binarize(copy.deepcopy(teacher), ReBNNConfig.preset("rebnn-bibert-w1a1"))
    data = [{"input_ids": ids, "attention_mask": m} for ids, m in zip(*BATCH.values(), strict=True)]
    arguments = ReBNNTrainingArguments(
        output_dir=str(tmp_path),
        attention_weight=1.0,
        hidden_weight=0.0,
        logits_weight=0.0,
        report_to="none",
        use_cpu=True,
    )
    trainer = ReBNNTrainer(model=student, teacher=teacher, args=arguments, train_dataset=data)
    student.train()
    for module in student.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    loss = trainer.compute_loss(student, BATCH)
    expected, mask = 0.0, BATCH["attention_mask"].bool()
    with torch.no_grad():
        hidden, theirs = (m(**BATCH, output_hidden_states=True).hidden_states for m in (student, teacher))
        for mine_layer, their_layer, h, t in zip(
            student.bert.encoder.layer, teacher.bert.encoder.layer, hidden, theirs, strict=False
        ):
            scores = []
            for block, states, binary in ((mine_layer, h, True), (their_layer, t, False)):
                q, k = (
                    getattr(block.attention.self, n)(states).view(3, 7, 2, 10).transpose(1, 2) for n in ("query", "key")
                )
                q, k = (torch.where(x >= 0, 1.0, -1.0) if binary else x for x in (q, k))
                scores.append(q @ k.mT / 10**0.5)
            pairs = (mask[:, :, None] & mask[:, None, :])[:, None].expand(-1, 2, -1, -1)
            expected += (scores[0] - scores[1])[pairs].square().mean().item()
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    loss.backward()
    assert student.bert.encoder.layer[1].attention.self.query.weight.grad.abs().sum() > 0
