"""The page of `demo.py`: boxes for the text, a card for the float model and one for the 1-bit model.

It asks nothing of the net: no fonts, no scripts, no statistics for Gradio.
"""

from __future__ import annotations

import math
from functools import partial
from html import escape

import gradio as gr
from demo_examples import EXAMPLES
from demo_models import Answer, Comparison, Contest, Contestant, how_measured, who_computes
from glue_tasks import TASKS

TITLE = "Float and 1-bit, side by side"
THEME = gr.themes.Base(
    primary_hue="indigo", neutral_hue="slate", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
)
CSS = """
.card { border: 1px solid var(--border-color-primary); border-radius: 8px; padding: 16px 20px; }
.card h2 { margin: 0; font-size: 1rem; font-weight: 600; opacity: 0.75; }
.card .prediction { margin: 4px 0 12px; font-size: 1.75rem; font-weight: 700; overflow-wrap: anywhere; }
.card table { width: 100%; margin: 0 0 16px; }
.card table, .card tr, .card th, .card td { border: none; }
.card th { padding: 4px 0; font-weight: 400; text-align: left; }
.card td { padding: 4px 0 4px 12px; text-align: right; font-variant-numeric: tabular-nums; }
.card td:nth-child(2) { width: 55%; }
.card .bar { height: 8px; border-radius: 4px; background: var(--border-color-primary); }
.card .bar div { height: 100%; border-radius: 4px; background: var(--color-accent); }
.card dl { display: flex; gap: 40px; margin: 0; }
.card dt { font-size: 0.875rem; opacity: 0.75; }
.card dd { margin: 0; font-size: 1.25rem; font-weight: 600; font-variant-numeric: tabular-nums; }
#verdict { font-size: 1.125rem; }
"""
SERVER = {
    "share": False,
    "ssr_mode": False,  # needs Node
    "mcp_server": False,
    "run_history": False,
    "footer_links": [],
    "theme": THEME,
    "css": CSS,
    "quiet": True,
}
"""Arguments of `launch`: the page alone, without what Gradio adds to it."""

FLOAT, ONE_BIT = "Float teacher", "1-bit model"
UNKNOWN_BOXES = ("Sentence", "Second sentence, if the model reads pairs")
WAITING = "–"


def build_page(contest: Contest, task: str | None = None) -> gr.Blocks:
    """The page; `launch(**SERVER)` shows it.

    Args:
        contest: the models.
        task: of `glue_tasks`, gives the boxes and the examples; None: two boxes and no examples.
    """
    with gr.Blocks(title=TITLE, analytics_enabled=False) as page:
        gr.Markdown(f"# {TITLE}\n\n{introduction(contest, task)}")
        with gr.Row():
            boxes = [gr.Textbox(label=name, lines=2, max_lines=6, min_width=280) for name in box_names(task)]
        if task in EXAMPLES:
            gr.Examples([list(texts) for texts in EXAMPLES[task]], boxes, label="Examples")
        button = gr.Button("Compare", variant="primary")
        with gr.Row():
            cards = [column(FLOAT, contest.teacher), column(ONE_BIT, contest.packed)]
        compared = gr.Markdown(elem_id="verdict")
        gr.Markdown(f"{who_computes(contest.packed.model)} {how_measured()}")
        asked = [button.click, *(box.submit for box in boxes)]
        gr.on(asked, partial(show, contest), boxes, [*cards, compared], api_name=False)
    return page


def introduction(contest: Contest, task: str | None) -> str:
    """What the visitor sees here."""
    kind = type(contest.packed.model).__name__
    about = f"{kind}, fine-tuned on {task}" if task in EXAMPLES else kind
    return (
        f"{about}: the float model, and the 1-bit model that learned from it. Type a text and see what each predicts, "
        "how long it takes and how large its file is."
    )


def box_names(task: str | None) -> tuple[str, ...]:
    """Names of the boxes for the texts of a task."""
    if task not in TASKS:
        return UNKNOWN_BOXES
    sentences = TASKS[task].sentences
    if len(sentences) == 1:
        return ("Sentence",)
    places = {"1": "First {}", "2": "Second {}"}
    return tuple(places.get(name[-1], "{}").format(name.rstrip("12")).capitalize() for name in sentences)


def column(title: str, model: Contestant) -> gr.HTML:
    """A card in a column of its own, which on a narrow screen goes below the other one."""
    with gr.Column(min_width=280):
        return gr.HTML(card(title, model), padding=False)


def show(contest: Contest, *texts: str) -> tuple[str, str, str]:
    """Both cards and the sentence below them for what was typed."""
    try:
        comparison = contest.answer(*texts)
    except ValueError as error:
        raise gr.Error(str(error), print_exception=False) from None
    return (
        card(FLOAT, contest.teacher, comparison.teacher),
        card(ONE_BIT, contest.packed, comparison.packed),
        verdict(contest, comparison),
    )


# Cards


def card(title: str, model: Contestant, answer: Answer | None = None) -> str:
    """What is known of a model, as HTML: its prediction and time, once there are any, and its size."""
    prediction, probabilities, time = WAITING, "", WAITING
    if answer is not None:
        prediction, probabilities, time = predicted(answer), table(answer), f"{digits(answer.milliseconds)} ms"
    return (
        f'<section class="card" aria-label="{title}"><h2>{title}</h2>'
        f'<p class="prediction" role="status">{escape(prediction)}</p>{probabilities}'
        f"<dl><div><dt>time</dt><dd>{time}</dd></div>"
        f"<div><dt>file</dt><dd>{digits(model.bytes / 1e6)} MB</dd></div></dl></section>"
    )


def predicted(answer: Answer) -> str:
    """The likeliest label; in regression the number."""
    label, score = next(iter(answer.scores.items()))
    return label if len(answer.scores) > 1 else f"{score:.2f}"


def table(answer: Answer) -> str:
    """Probabilities of the labels; nothing in regression."""
    if len(answer.scores) == 1:
        return ""
    rows = (
        f'<tr><th scope="row">{escape(label)}</th>'
        f'<td><div class="bar" aria-hidden="true"><div style="width: {score:.1%}"></div></div></td>'
        f"<td>{score:.1%}</td></tr>"
        for label, score in answer.scores.items()
    )
    return f"<table>{''.join(rows)}</table>"


def verdict(contest: Contest, comparison: Comparison) -> str:
    """The comparison in a sentence."""
    faster = comparison.faster
    speed = f"is **{digits(faster)} times as fast**" if faster >= 1 else f"takes **{digits(1 / faster)} times as long**"
    return f"The 1-bit model {speed}, its file is **{digits(contest.smaller)} times smaller**."


def digits(value: float) -> str:
    """Three digits, as many behind the point as that takes."""
    return f"{value:.{max(0, 2 - math.floor(math.log10(value)))}f}"
