"""The sections of docs/performance.md, and the sentences of the README, from those of the JSON."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from benchmarks.curves_figure import TITLE as CURVES_TITLE
from benchmarks.curves_figure import final

Section = Mapping[str, Any]
MEBIBYTE = 2**20
SHARE_AT = 16_384


def machine_line(section: Section) -> str:
    """Processor, threads and versions, as a phrase."""
    machine = section["machine"]
    vectors = f" ({machine['vectors']})" if machine["vectors"] else ""
    return f"{machine['cpu']}{vectors}, {machine['threads']} threads, PyTorch {machine['torch']}, float32"


def table(heading: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """A Markdown table whose first `left` columns are aligned to the left, the others to the right."""
    rules = [" --- " if index < left else " ---: " for index in range(len(heading))]
    lines = [f"|{'|'.join(rules)}|", *(f"| {' | '.join(row)} |" for row in rows)]
    return "\n".join([f"| {' | '.join(heading)} |", *lines]) + "\n"


def cell_groups(section: Section) -> dict[tuple[str, int], list[Mapping[str, Any]]]:
    """The cells of each (name, d), by length."""
    groups: dict[tuple[str, int], list[Mapping[str, Any]]] = {}
    for cell in sorted(section["cells"], key=lambda cell: cell["n"]):
        groups.setdefault((cell["name"], cell["d"]), []).append(cell)
    return groups


def best_of_each(section: Section) -> list[Mapping[str, Any]]:
    """Of the peers' settings that compute the same function, the fastest; by time."""
    best: dict[str, Mapping[str, Any]] = {}
    for entry in section["measured"]:
        if entry["name"] not in best or entry["total_s"] < best[entry["name"]]["total_s"]:
            best[entry["name"]] = entry
    return sorted(best.values(), key=lambda entry: float(entry["total_s"]))


def attention(section: Section) -> str:
    """Times by length and width, slopes, break-even, share of the peak, memory."""
    shape = section["shape"]
    parts = [
        _heading("Attention", section),
        f"{shape['heads']} heads, dv = {shape['dv']}, causal, batch 1; medians of interleaved passes, milliseconds; in "
        "brackets: times faster than SDPA, PyTorch's scaled_dot_product_attention on its fast path. Lower is better.\n",
    ]
    for title, key in (("Forward and backward", "total_s"), ("Forward", "forward_s")):
        for d in sorted({cell["d"] for cell in section["cells"] if cell["degree"] is not None}):
            parts += [f"{title}, d = {d}:\n", _times(section, d, key)]
    if any(not cell["measured"] for cell in section["cells"]):
        parts.append(
            "`~`: extrapolated by n² from the longest measured length. -: not measured, a pass would take minutes.\n"
        )
    parts += [f"d = {s['d']}, degree {s['degree']} is left out: {s['reason']}.\n" for s in section["skipped"]]
    parts += [_break_even(section), _slopes(section), _shares(section), _memory(section)]
    return "\n".join(part for part in parts if part)


def _times(section: Section, d: int, key: str) -> str:
    groups = {
        name: cells for (name, width), cells in cell_groups(section).items() if width == d and name != "SDPA"
    }
    exact = {cell["n"]: cell for cell in section["cells"] if cell["degree"] is None}
    by_length = {name: {cell["n"]: cell for cell in cells} for name, cells in groups.items()}
    lengths = sorted({n for cells in by_length.values() for n in cells})
    ranks = {name: cells[0]["rank"] for name, cells in groups.items()}
    rows = []
    for n in lengths:
        softmax = exact.get(n)
        row = [f"{n:,}", "-" if softmax is None else _milliseconds(softmax, key)]
        row += [_with_ratio(cells.get(n), softmax, key) for cells in by_length.values()]
        rows.append(row)
    headings = [f"{name} (rank {ranks[name]:,})" for name in by_length]
    return table(["n", "SDPA", *headings], rows, left=0)


def _milliseconds(cell: Mapping[str, Any], key: str) -> str:
    milliseconds = 1e3 * cell[key]
    digits = f"{milliseconds:,.1f}" if milliseconds < 1000 else f"{milliseconds:,.0f}"
    return digits if cell["measured"] else f"~{digits}"


def _with_ratio(cell: Mapping[str, Any] | None, exact: Mapping[str, Any] | None, key: str) -> str:
    if cell is None:
        return "-"
    text = _milliseconds(cell, key)
    if exact is None:
        return text
    mark = "" if exact["measured"] else "~"
    return f"{text} ({mark}{ratio(exact[key], cell[key])})"


def ratio(slow: float, fast: float) -> str:
    """How many times faster, with one decimal below 100."""
    times = slow / fast
    return f"{times:.1f}" if times < 100 else f"{times:.0f}"


def _break_even(section: Section) -> str:
    """The least measured length from which the polynomial is faster at every measured length."""
    exact = {
        cell["n"]: cell["total_s"] for cell in section["cells"] if cell["degree"] is None and cell["measured"]
    }
    found = []
    for (name, d), cells in cell_groups(section).items():
        common = [cell for cell in cells if cell["degree"] is not None and cell["n"] in exact]
        faster: int | None = None
        for cell in reversed(common):
            if cell["total_s"] >= exact[cell["n"]]:
                break
            faster = cell["n"]
        if len(common) > 1:
            found.append([f"d = {d}, {name}", "beyond the measured" if faster is None else f"{faster:,}"])
    if not found:
        return ""
    return "Least measured length from which it is faster, forward and backward:\n\n" + table(
        ["attention", "n"], found
    )


def _slopes(section: Section) -> str:
    rows = [
        [f"d = {s['d']}, {s['name']}", f"{s['slope']:.3f}", f"{s['from']:,} to {s['to']:,}"]
        for s in section["slopes"]
    ]
    if not rows:
        return ""
    return "Slope of log time on log n (1: linear, 2: quadratic):\n\n" + table(
        ["attention", "slope", "n"], rows
    )


def _shares(section: Section) -> str:
    cells = [c for c in section["cells"] if c["n"] == SHARE_AT and c["peak_share_total"] is not None]
    if not cells:
        return ""
    peak = section["peak_flops"] / 1e9
    rows = [
        [f"d = {c['d']}, {c['name']}", f"{c['peak_share_forward']:.0%}", f"{c['peak_share_total']:.0%}"]
        for c in cells
    ]
    return (
        f"Share of the peak of multiply-adds, {peak:,.0f} GFLOP/s (measured in the same run by a loop that touches "
        f"only registers), at n = {SHARE_AT:,}; flops by [mathematics.md](mathematics.md), section 4:\n\n"
        + table(["attention", "forward", "forward and backward"], rows)
    )


def _memory(section: Section) -> str:
    rows = [
        [f"{m['n']:,}", m["name"], mebibytes(m["forward"]), mebibytes(m["total"])] for m in section["memory"]
    ]
    if not rows:
        return ""
    return (
        "Peak memory beyond inputs, outputs and gradients, MiB, d = 16, each in a separate process:\n\n"
        + table(["n", "attention", "forward", "forward and backward"], rows, left=2)
    )


def mebibytes(number: float | None) -> str:
    return "-" if number is None else f"{number / MEBIBYTE:,.1f}"


def peers(section: Section) -> str:
    """Everyone's time and error."""
    shape = section["shape"]
    best = best_of_each(section)
    rows = [
        [
            entry["name"],
            " ".join(filter(None, (entry["package"], entry["version"]))),
            entry["setting"],
            f"{1e3 * entry['forward_s']:,.1f}",
            f"{1e3 * entry['total_s']:,.1f}",
            f"{entry['output_error']:.1e}",
            f"{entry['gradient_error']:.1e}",
        ]
        for entry in best
    ]
    missing = [
        f"* {e['name']} ({e['setting']}), {e['package']}: not available: {e['reason']}"
        for e in section["not_available"]
    ]
    headings = [
        "attention",
        "package",
        "fastest setting",
        "forward ms",
        "with backward ms",
        "output error",
        "gradient error",
    ]
    return "\n".join(
        [
            _heading("Beside other libraries", section),
            f"n = {shape['n']:,}, {shape['heads']} heads, d = {shape['d']}, dv = {shape['dv']}, causal; the same "
            f"inputs for all, logits within {section['largest_logit']:g}; errors are relative (L2), against softmax in "
            "float64; the gradient error is the largest of those of q, k and v. Lower is better.\n",
            table(headings, rows, left=3),
            *_comparisons(best),
            "\n".join([*missing, ""]) if missing else "",
        ]
    )


def _comparisons(best: Sequence[Mapping[str, Any]]) -> list[str]:
    """For each of ours, the fastest other of equal or smaller output error. A part in a thousand counts as equal."""
    lines = []
    for entry in best:
        if entry["package"] != "fastgrad-dsl":
            continue
        as_good = [
            o
            for o in best
            if o["package"] != "fastgrad-dsl" and o["output_error"] <= 1.001 * entry["output_error"]
        ]
        if as_good:
            other = min(as_good, key=lambda o: float(o["total_s"]))
            times = ratio(other["total_s"], entry["total_s"])
            lines.append(
                f"* {entry['name']}: {times} times faster than the fastest other with no larger error, {other['name']}"
            )
    return ["\n".join([*lines, ""])] if lines else []


def training(section: Section) -> str:
    """A step of the whole model."""
    exact = {row["n"]: row for row in section["rows"] if row["model"] == "sdpa"}
    rows = []
    for row in sorted(section["rows"], key=lambda row: row["n"]):
        softmax = exact.get(row["n"])
        rows.append(
            [
                section["models"][row["model"]],
                f"{row['n']:,}",
                f"{'' if row['measured'] else '~'}{row['seconds']:,.2f}",
                "-"
                if softmax is None
                else f"{'' if softmax['measured'] else '~'}{ratio(softmax['seconds'], row['seconds'])}",
                mebibytes(row["peak_bytes"]),
            ]
        )
    return "\n".join(
        [
            _heading("A training step", section),
            f"examples/gpt.tfg, {section['layers']} layers of width {section['width']}, batch {section['batch']}: "
            "forward, backward and AdamW; time and peak memory in separate processes. Lower is better. `~`: "
            "extrapolated as a n + b n².\n",
            table(["model", "n", "seconds", "faster than SDPA", "peak MiB"], rows),
        ]
    )


def compiler(section: Section) -> str:
    """Compile times."""
    rows = [
        [
            "a 96-layer gpt.tfg to the text of all its files, after imports",
            f"{section['compile_96_layers_s']:.3f}",
        ],
        ["the same with 1 layer", f"{section['compile_1_layer_s']:.3f}"],
        ["`fastgrad check examples/gpt.tfg`, the whole process", f"{section['check_process_s']:.3f}"],
    ]
    heading = _heading("The compiler", section)
    return f"{heading}\nMedians of {section['runs']}.\n\n{table(['what', 'seconds'], rows)}"


def budget(section: Section) -> str:
    """Calibration, planning, guards, and degrees picked by hand."""
    tokens, planning, guards = section["tokens"], section["planning"], section["guards"]
    planned, verified = section["planned"]["planned"], section["planned"]["verification"]
    rows = [
        [f"calibration, planning and verification of gpt.tfg without its pin, at {tokens['calibrated']:,} tokens",
         f"{section['calibration_s']:.1f} s"],
        [f"planning {planning['layers']} layers of {planning['heads']} heads, once calibrated",
         f"{planning['plan_s']:.3f} s"],
        ["the same and all passes of the compiler", f"{planning['total_s']:.2f} s"],
        [f"guards of {guards['attentions']} attentions, share of a training step at {tokens['measured']:,} tokens",
         f"{100 * (guards['guarded_s'] / guards['bare_s'] - 1):.1f} %"],
    ]  # fmt: skip
    picked = [
        [
            entry["name"],
            f"{entry['step_s']:.3f}",
            f"{entry['output']:.2e}",
            f"{entry['gradient']:.2e}",
            "yes" if entry["keeps"] else "no",
        ]
        for entry in sorted(section["picked"], key=lambda entry: entry["step_s"])
    ]
    kinds = ", ".join(section["planned"]["attentions"])
    return "\n".join(
        [
            _heading("Budgets", section),
            table(["what", "measured"], rows),
            f"The plan, layer by layer: {kinds}. Its errors: output {planned['output']:.2g} (estimate), "
            f"{verified['output']:.2g} (measured, held out); gradient {planned['gradient']:.2g} (estimate), "
            f"{verified['gradient']:.2g} (measured).\n",
            f"A training step at {tokens['measured']:,} tokens, against every single family and degree picked by hand, "
            "in turns; errors measured on held-out text against the exact model:\n",
            table(
                ["all attentions", "seconds", "output error", "gradient error", "keeps the budget"], picked
            ),
        ]
    )


def curves(section: Section) -> str:
    """Training runs, and what the planner found before and after."""
    ends = {name: final(curve["points"]) for name, curve in section["curves"].items()}
    losses = [
        [
            name,
            ", ".join(f"{limit:g}" for limit in section["budgets"].get(name, ())) or "-",
            f"{ends[name]:.4f}",
            f"{100 * (ends[name] / ends['exact'] - 1):+.2f} %",
            f"{curve['seconds']:.0f}",
        ]
        for name, curve in section["curves"].items()
    ]
    rows = [
        [
            name,
            before["path"],
            before["chosen"],
            f"{before['seen']:.2f}",
            _number(before["gains"]["output"]),
            after["chosen"],
            f"{after['seen']:.2f}",
            _number(after["gains"]["output"]),
        ]
        for name, plans in section["plans"].items()
        for before, after in zip(plans["initial"], plans["trained"], strict=True)
    ]
    heading = ["run", "attention", "initial plan", "largest logit", "gain"]
    return "\n".join(
        [
            _heading("Training curves", section),
            f"![{CURVES_TITLE}](curves.svg)\n",
            f"gpt.tfg without its pin, {section['steps']} steps at {section['tokens']:,} tokens, with the same data, "
            "seed and initial weights, from which the plans are made. Losses are on held-out text, in nats per byte. "
            "`exact again` starts from weights moved by a millionth: it shows the effect of chance alone.\n",
            table(["run", "limits (output, gradient)", "final loss", "beside exact", "seconds"], losses),
            "What the planner finds with initial and with trained weights; gains on the output are estimates:\n",
            table([*heading, "trained plan", "largest logit", "gain"], rows, left=3),
        ]
    )


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def demo(section: Section) -> str:
    """What `make demo` measured."""
    models = section["models"]
    rows = [
        [
            f"{name} model, forward and backward",
            f"{models[name]['seconds']:.2f} s",
            mebibytes(models[name]["peak_bytes"]),
        ]
        for name in ("compiled", "exact")
    ]
    return "\n".join(
        [
            _heading("The demonstration", section),
            f"{section['minutes']:g} minutes of training at {section['tokens']:,} tokens: {section['steps']} steps, "
            f"validation loss {section['validation_loss']:.3f} nats per byte. On held-out text, against exact "
            f"attention with the trained weights, the output is off by {section['output_error']:.1e} and the gradient "
            f"by {section['gradient_error']:.1e} (relative, L2).\n",
            table(["step", "time", "peak MiB"], rows),
        ]
    )


def _heading(title: str, section: Section) -> str:
    quick = " **A quick run with tiny sizes: these numbers mean nothing.**" if section["quick"] else ""
    target = f", target {section['target']}" if title not in ("The compiler",) else ""
    made = f"`{section['command']}`, {section['machine']['date']}: {machine_line(section)}{target}.{quick}"
    return f"## {title}\n\n{made}\n"


SECTIONS: dict[str, Callable[[Section], str]] = {
    "attention": attention,
    "peers": peers,
    "training": training,
    "compiler": compiler,
    "budget": budget,
    "curves": curves,
    "demo": demo,
}
"""One writer for each section of the JSON."""
