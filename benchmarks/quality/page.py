"""docs/quality.md and its plots, made from docs/quality.json."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from fastgrad_dsl.plots.panels import Panel, Series
from fastgrad_dsl.plots.panels import render as render_plot

JSON, PAGE, FIGURE = "docs/quality.json", "docs/quality.md", "docs/quality.svg"

INTRODUCTION = """\
# What models of each form learn

Speed is worth nothing if a model does not learn. This page compares forms of attention in models that are alike in
everything else, at equal steps and tokens. Every number is **measured**: on held-out sequences, at the best of three
rates for each form, mean and spread (largest less smallest) over seeds. Made from [quality.json](quality.json) by

    python -m benchmarks.quality.run

* **recall**: pairs of keys and values, then every key once again, at which its value is asked for (multi-query
  associative recall, arXiv 2312.04927); the share of values that are foretold.
* **chains**: a new random Markov chain of 12 states in each sequence; cross entropy above that of the Bayes prediction.
* **copying**, **needle**: what is far is to be written again; the share of tokens that are foretold, at the length of
  training and at longer ones.
* **state**: bytes that a layer keeps to go on, for the length of training, in float32: the sums of a polynomial, or
  keys and values.
"""

Document = Mapping[str, Any]
Run = Mapping[str, Any]


def render(document: Document) -> dict[str, str]:
    """The page and its plot by their paths."""
    return {PAGE: page(document), FIGURE: figure(document)}


def score(task: str, test: Mapping[str, float]) -> float:
    """Nats above the oracle's for chains, else the accuracy."""
    return test["loss"] - test["oracle"] if task == "chains" else test["accuracy"]


def best(runs: Sequence[Run], task: str, form: str) -> list[Run]:
    """The runs of all seeds at the form's best rate: that of the best mean on the tests at the first length."""
    mine = [run for run in runs if (run["task"], run["form"]) == (task, form)]
    if not mine:
        return []
    sign = -1 if task == "chains" else 1

    def mean(rate: float) -> float:
        return sign * statistics.mean(score(task, run["tests"][0]) for run in mine if run["rate"] == rate)

    rate = max(sorted({run["rate"] for run in mine}), key=mean)
    return [run for run in mine if run["rate"] == rate]


def page(document: Document) -> str:
    """docs/quality.md."""
    runs = document["runs"]
    tasks = list(dict.fromkeys(run["task"] for run in runs))
    parts = [INTRODUCTION, "\n![Recall against bytes of state](quality.svg)\n"]
    for task in tasks:
        lengths = [test["n"] for test in next(run for run in runs if run["task"] == task)["tests"]]
        heads = " | ".join(f"{n:,} tokens" for n in lengths)
        what = "nats above the oracle's (lower is better)" if task == "chains" else "accuracy"
        parts.append(f"\n## {task.capitalize()}: {what}\n")
        parts.append(f"| form | {heads} | rate | seeds | state | training |")
        parts.append("| --- |" + " ---: |" * (len(lengths) + 4))
        for form in dict.fromkeys(run["form"] for run in runs if run["task"] == task):
            parts.append(_row(task, form, best(runs, task, form)))
    return "\n".join(parts) + "\n"


def _row(task: str, form: str, runs: Sequence[Run]) -> str:
    cells = []
    for place in range(len(runs[0]["tests"])):
        values = [score(task, run["tests"][place]) for run in runs]
        spread = f" +- {(max(values) - min(values)) / 2:.3f}" if len(values) > 1 else ""
        cells.append(f"{statistics.mean(values):.3f}{spread}")
    seconds = statistics.median(run["seconds"] for run in runs)
    state = f"{runs[0]['state_bytes'] / 1024:,.0f} KB"
    return (
        f"| {form} | {' | '.join(cells)} | {runs[0]['rate']:g} | {len(runs)} | {state} | {seconds:,.0f} s |"
    )


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
                missed = max(1e-3, 1 - statistics.mean(score(task, run["tests"][0]) for run in mine))
                series.append(Series(form, ((mine[0]["state_bytes"] / 1024, missed),), colour))
        labels = ("KB of state a layer (lower is better)", "share of values missed (lower is better)")
        panels.append(Panel(task.capitalize(), *labels, tuple(series)))
    return render_plot(panels, "Recall against bytes of state", "See the tables of docs/quality.md.")
