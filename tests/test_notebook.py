"""Reports in a notebook: the HTML holds what the printed table holds."""

import re
from html import unescape

import transformers as hf

import rebnn_hf
from rebnn_hf.notebook import html_table


def cells(html):
    return [unescape(cell) for cell in re.findall(r"<t[dh] [^>]*>([^<]*)</t[dh]>", html)]


def bert():
    return hf.BertForSequenceClassification(
        hf.BertConfig(vocab_size=50, hidden_size=36, num_hidden_layers=3, num_attention_heads=2, intermediate_size=52)
    )


def test_table():
    html = html_table(("name", "MB"), [("<b> & co", "1.5")], words=(0,), notes=["a < b"])
    assert cells(html) == ["name", "MB", "<b> & co", "1.5"] and html.endswith("</table><p>a &lt; b</p>")
    assert html.count('style="text-align: left"') == html.count('style="text-align: right"') == 2


def test_summary_and_operations():
    model = rebnn_hf.binarize(bert())
    for report in (rebnn_hf.summary(model), rebnn_hf.operations(model, tokens=16)):
        html, text = report._repr_html_(), str(report)
        words = [word for cell in cells(html) for word in cell.split()]
        notes = [unescape(note) for note in re.findall("<p>([^<]*)</p>", html)]
        assert words + " ".join(notes).split() == text.split()
        assert "encoder.layer.0-2.attention.self.query" in html or "products of attention" in html
