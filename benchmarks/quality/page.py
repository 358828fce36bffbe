"""docs/quality.md and its plots, made from docs/quality.json."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.curves_figure import STYLE
from benchmarks.document import wrapped
from benchmarks.quality.tasks import TEXTS
from benchmarks.tables import table
from fastgrad_dsl.plots.panels import Panel, Series
from fastgrad_dsl.plots.panels import render as render_plot
from fastgrad_dsl.plots.svg import COLOURS, RIGHT, TOP, Axis, bottom_axis, key, left_axis, line
from fastgrad_dsl.plots.svg import figure as svg

JSON, PAGE, FIGURE = "docs/quality.json", "docs/quality.md", "docs/quality.svg"
WIDTH, HEIGHT, LEFT, BOTTOM = 720.0, 380.0, 64.0, 44.0  # of a plot of losses
ROW = 16.0  # of its key

INTRODUCTION = """\
# What models of each form learn

Speed is worth nothing if a model does not learn. This page compares forms of attention in models that are alike in
everything else, at equal steps and tokens. Every number is **measured**: on held-out sequences, at the form's best of
the rates that were tried, mean and half the range over seeds. Made from [quality.json](quality.json) by

    python -m benchmarks.quality.run

* **recall**: pairs of keys and values, then every key once again, after which its value must follow (multi-query
  associative recall, arXiv 2312.04927); the share of values that are predicted. Of 64 pairs
  neither softmax nor the mixer learns it in 600 steps (0.03 and 0.02), unless training begins with fewer: in equal
  parts with a quarter and half of the pairs and tokens, then with all (of 128 pairs it begins with an eighth, in models
  of twice the width).
* **chains**: a new random Markov chain of 12 states in each sequence; cross entropy above that of the Bayes prediction.
* **copying**, **needle**: tokens far back must be repeated; the share of tokens that are predicted, at the length of
  training and at longer ones.
* **language**, **scripture**: bytes of the novel that the examples train on (0.9 MB), and of the King James Version
  (4 MB); cross entropy on the last tenth, over the whole sequence and over its last quarter, which has the most to look
  back on, and how much lower the latter is than over the first quarter (fall).
* **state**: bytes that a layer keeps to generate further tokens, at the length of training, in float32 (the mean of all
  layers): the sums of a polynomial, or keys and values.
* **training**: seconds of one thread of the processor that is named below a table; those of two processors are not to
  be compared.

Tasks without a table below have not been run.

`mixer` is `std.mixer`: a short convolution, then the polynomial 1 + s + s^2/2 of the scores, and exp of them within
neighbouring blocks, both times the gates of a head, which forget within a token in one head and after thousands in
another. `bounded` has far logits of limited size, which a polynomial replaces (examples/bounded.tfg).
"""

SUMMARY = {  # form: what it is for, and what it costs
    "mixer": ("text, and recall of anything before", "constant a token"),
    "mixer without gates": ("recall alone, however far, beyond the length of training too", "constant a token"),
    "bounded, gain 1, near, rotary": (
        "a proved error against softmax; the far past as an average", "constant a token"
    ),
    "window of 32, short convolution": ("nothing beyond the window", "constant, and least"),
    "mixer, every second layer softmax": ("copying word for word, too", "grows with the length"),
    "softmax, short convolution": ("short sequences", "grows with the length"),
    "softmax": ("what others use", "grows with the length"),
}  # fmt: skip
SHOWN = ("recall of 32 pairs", "needle", "copying", "language of 2,048 bytes")
FALLS_SHORT = """
## What falls short

* **Copying**: the mixer learns it slowly, with or without gates, probably because a polynomial of degree 2 tells one
  key from many less sharply than exp does. With softmax in every second layer it is learned as well as with softmax
  alone. No form that was tried copies at lengths well beyond those of its training.
* **Needle**: the mixer does not learn it in 600 steps, since its gates forget the needle before they learn to keep it.
  Without gates it finds every needle, at 8 times the length of training too, where softmax loses most of them: the
  mixer's positions serve near tokens alone, those of softmax all, and it has not seen such distances. Every form that
  learns it does so at few of the rates.
* **Gates help softmax, too**: with the same gates and convolution its loss is lower than the mixer's at equal steps.
  The mixer takes less time, and its state does not grow.
* **More context** lowers the loss of the mixer less than that of softmax with the same convolution (the column fall):
  heads that forget quickly predict the beginning of a sequence as well as its end. The mixer's loss is lower in both.
* **One seed and one rate** are all that most rows have: differences of a few per cent may be chance.
"""

Document = Mapping[str, Any]
Run = Mapping[str, Any]


def render(document: Document) -> dict[str, str]:
    """The page and its plots by their paths."""
    tasks = dict.fromkeys(run["task"] for run in document["runs"])
    losses = {path(task): losses_figure(document, task) for task in tasks if is_text(task)}
    return {PAGE: page(document), FIGURE: figure(document), **losses}


def is_text(task: str) -> bool:
    """Whether a task is to foretell bytes."""
    return task.startswith(tuple(TEXTS))


def path(task: str) -> str:
    """The file of a task's own plot."""
    digits = "".join(letter for letter in task if letter.isdigit())
    return f"docs/quality-{task.split()[0]}-{digits}.svg"


def score(task: str, test: Mapping[str, float]) -> float:
    """Nats above the oracle's for chains, nats of text, else the accuracy."""
    if task == "chains":
        return test["loss"] - test["oracle"]
    return test["loss"] if is_text(task) else test["accuracy"]


def best(runs: Sequence[Run], task: str, form: str) -> list[Run]:
    """The runs of all seeds at the form's best rate: that of the best mean at the first length, then at the others."""
    mine = [run for run in runs if (run["task"], run["form"]) == (task, form)]
    if not mine:
        return []
    by_rate = {
        rate: [run for run in mine if run["rate"] == rate] for rate in sorted({r["rate"] for r in mine})
    }
    choose = min if lower_is_better(task) else max
    places = range(len(mine[0]["tests"]))
    return choose(by_rate.values(), key=lambda runs: [mean(task, runs, place) for place in places])


def mean(task: str, runs: Sequence[Run], place: int = 0) -> float:
    """Of their scores at a length, the first by default."""
    return statistics.mean(score(task, run["tests"][place]) for run in runs)


def lower_is_better(task: str) -> bool:
    """Whether a task is scored by its loss."""
    return task == "chains" or is_text(task)


def unit(task: str) -> str:
    """What a score is, in words."""
    if not lower_is_better(task):
        return "accuracy"
    nats = "nats per byte" if is_text(task) else "nats above the oracle's"
    return f"{nats} (lower is better)"


def page(document: Document) -> str:
    """docs/quality.md."""
    runs = document["runs"]
    tasks = list(dict.fromkeys(run["task"] for run in runs))
    parts = [INTRODUCTION]
    if any(task.startswith("recall") for task in tasks):
        parts.append("\n![Recall against bytes of state](quality.svg)\n")
    for task in tasks:
        lengths = [test["n"] for test in next(run for run in runs if run["task"] == task)["tests"]]
        parts.append(f"\n## {task.capitalize()}: {unit(task)}\n")
        if is_text(task):
            parts.append(f"![Loss against seconds]({path(task).removeprefix('docs/')})\n")
        heads = [*(f"{n:,} tokens" for n in lengths), *(["last quarter", "fall"] if is_text(task) else [])]
        forms = dict.fromkeys(run["form"] for run in runs if run["task"] == task)
        rows = [_row(task, form, best(runs, task, form)) for form in forms]
        parts.append(table(["form", *heads, "rate", "seeds", "state", "training"], rows))
        parts.append(_tried(runs, task))
    parts += [FALLS_SHORT, "\n## In short: which form for which need\n", _summary(runs)]
    return "\n".join(parts)


def _summary(runs: Sequence[Run]) -> str:
    """The table for a reader in a hurry."""
    columns = [task for task in SHOWN if any(run["task"] == task for run in runs)]
    rows = []
    for form, words in SUMMARY.items():
        found = [best(runs, task, form) for task in columns]
        if any(found):
            cells = [
                f"{mean(task, mine):.3f}" if mine else "-" for task, mine in zip(columns, found, strict=True)
            ]
            rows.append((form, *words, *cells))
    return table(["form", "for", "cost", *columns], rows, left=3)


def _tried(runs: Sequence[Run], task: str) -> str:
    """The rates that were tried and the processors, and for which forms, where they differ."""
    mine = [run for run in runs if run["task"] == task]
    rates = {
        form: ", ".join(f"{rate:g}" for rate in sorted({run["rate"] for run in mine if run["form"] == form}))
        for form in dict.fromkeys(run["form"] for run in mine)
    }
    processors = {form: best(runs, task, form)[0]["processor"] for form in rates}
    return wrapped(f"Rates tried: {_by_value(rates)}. Trained on {_by_value(processors)}.")


def _by_value(said: Mapping[str, str]) -> str:
    """What is said of all forms, or of which."""
    values = list(dict.fromkeys(said.values()))
    if len(values) == 1:
        return values[0]
    named = [", ".join(f"*{form}*" for form, found in said.items() if found == value) for value in values]
    return "; ".join(f"{value} ({names})" for value, names in zip(values, named, strict=True))


def _row(task: str, form: str, runs: Sequence[Run]) -> list[str]:
    columns = [[score(task, run["tests"][place]) for run in runs] for place in range(len(runs[0]["tests"]))]
    if is_text(task):
        quarters = [run["tests"][0]["quarters"] for run in runs]
        columns += [[each[-1] for each in quarters], [each[0] - each[-1] for each in quarters]]
    cells = []
    for values in columns:
        spread = f" ± {(max(values) - min(values)) / 2:.3f}" if len(values) > 1 else ""
        cells.append(f"{statistics.mean(values):.3f}{spread}")
    seconds = statistics.median(run["seconds"] for run in runs)
    state = f"{runs[0]['state_bytes'] / 1024:,.0f} KB"
    return [form, *cells, f"{runs[0]['rate']:g}", str(len(runs)), state, f"{seconds:,.0f} s"]


def figure(document: Document) -> str:
    """Recall that is missed against the state, one panel for each number of pairs; a point at 1e-3 misses less."""
    runs = document["runs"]
    forms = list(dict.fromkeys(run["form"] for run in runs))
    panels = []
    for task in dict.fromkeys(run["task"] for run in runs if run["task"].startswith("recall")):
        series = []
        for colour, form in enumerate(forms):
            mine = best(runs, task, form)
            if mine:
                missed = max(1e-3, 1 - mean(task, mine))
                series.append(Series(form, ((mine[0]["state_bytes"] / 1024, missed),), colour))
        labels = ("KB of state a layer (lower is better)", "share of values missed (lower is better)")
        panels.append(Panel(task.capitalize(), *labels, tuple(series)))
    return render_plot(panels, "Recall against bytes of state", "See the tables of docs/quality.md.")


def losses_figure(document: Document, task: str) -> str:
    """Loss on held-out text against seconds of training, a line for each form at its best rate.

    Seconds of two processors are not to be compared: forms are left out that were not trained on the one of most.
    """
    runs = document["runs"]
    forms = list(dict.fromkeys(run["form"] for run in runs))
    found = {form: mine[0] for form in forms if (mine := best(runs, task, form))}
    (processor, _), *_ = Counter(run["processor"] for run in found.values()).most_common(1)
    curves = {form: run["curve"] for form, run in found.items() if run["processor"] == processor}
    points = [(seconds, loss) for curve in curves.values() for _, seconds, loss in curve[1:]]
    top = TOP + ROW * len(curves)
    x = Axis(0.0, max(seconds for seconds, _ in points), LEFT, WIDTH - RIGHT)
    y = Axis(min(loss for _, loss in points), max(loss for _, loss in points), HEIGHT - BOTTOM, top)
    parts = bottom_axis(x, HEIGHT - BOTTOM, top, "seconds of training")
    parts += left_axis(y, LEFT, WIDTH - RIGHT, "held out, nats per byte: lower is better")
    for place, (form, curve) in enumerate(curves.items()):
        colour = forms.index(form) % len(COLOURS)
        parts += key(LEFT + 200, TOP + 4 + ROW * place, [(colour, form, form.startswith("softmax"))])
        places = [(x.at(seconds), y.at(loss)) for _, seconds, loss in curve[1:]]
        parts.append(line(places, colour, dashed=form.startswith("softmax")))
    ends = ", ".join(
        f"{form} {curve[-1][2]:.3f} after {curve[-1][1]:.0f} s" for form, curve in curves.items()
    )
    title = f"{task.capitalize()}: loss against time"
    return str(svg("losses", title, f"{title}: {ends}.", HEIGHT, parts, WIDTH, STYLE)) + "\n"
