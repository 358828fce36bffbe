"""The sections of docs/performance.md, and the sentences of the README, from those of the JSON."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from math import sqrt
from statistics import fmean, stdev
from typing import Any

from benchmarks.curves_figure import TITLE as CURVES_TITLE
from fastgrad_dsl.bench.peak import error_of_shares

Section = Mapping[str, Any]
MEBIBYTE = 2**20
SHARE_AT = 16_384


def machine_line(section: Section) -> str:
    """Processor, threads and versions, as a phrase."""
    machine = section["machine"]
    threads = f"{machine['threads']} thread{'' if machine['threads'] == 1 else 's'}"
    return f"{processor(machine)}, {threads}, PyTorch {machine['torch']}, float32"


def processor(machine: Mapping[str, Any]) -> str:
    """Its name and its vectors."""
    return f"{machine['cpu']} ({machine['vectors']})" if machine["vectors"] else str(machine["cpu"])


def table(heading: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """A Markdown table whose first `left` columns are aligned to the left, the others to the right."""
    rules = [" --- " if index < left else " ---: " for index in range(len(heading))]
    lines = [f"|{'|'.join(rules)}|", *(f"| {' | '.join(row)} |" for row in rows)]
    return "\n".join([f"| {' | '.join(heading)} |", *lines]) + "\n"


Columns = Sequence[tuple[str, Callable[[Mapping[str, Any]], str]]]
"""Headings, and what stands below them for an entry of the JSON."""


def table_of(columns: Columns, entries: Iterable[Mapping[str, Any]], left: int = 1) -> str:
    """A table with a row for each entry."""
    rows = [[show(entry) for _, show in columns] for entry in entries]
    return table([heading for heading, _ in columns], rows, left)


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
        heading_of("Attention", section),
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
    return _about(cell) + (f"{milliseconds:,.1f}" if milliseconds < 1000 else f"{milliseconds:,.0f}")


def _with_ratio(cell: Mapping[str, Any] | None, exact: Mapping[str, Any] | None, key: str) -> str:
    if cell is None:
        return "-"
    text = _milliseconds(cell, key)
    return text if exact is None else f"{text} ({_about(exact)}{ratio(exact[key], cell[key])})"


def ratio(slow: float, fast: float) -> str:
    """How many times faster, with one decimal below 100."""
    times = slow / fast
    return f"{times:.1f}" if times < 100 else f"{times:.0f}"


def _break_even(section: Section) -> str:
    """The least measured length from which the polynomial is faster at every measured length."""
    measured = [cell for cell in section["cells"] if cell["measured"]]
    exact = {cell["n"]: cell["total_s"] for cell in measured if cell["degree"] is None}
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
    said = "Least measured length from which it is faster, forward and backward:"
    return f"{said}\n\n{table(['attention', 'n'], found)}"


def _slopes(section: Section) -> str:
    columns: Columns = (
        ("attention", lambda s: f"d = {s['d']}, {s['name']}"),
        ("slope", lambda s: f"{s['slope']:.3f}"),
        ("n", lambda s: f"{s['from']:,} to {s['to']:,}"),
    )
    said, slopes = "Slope of log time on log n (1: linear, 2: quadratic):", section["slopes"]
    return f"{said}\n\n{table_of(columns, slopes)}" if slopes else ""


def _shares(section: Section) -> str:
    cells = [c for c in section["cells"] if c["n"] == SHARE_AT and c["peak_share_total"] is not None]
    if not cells:
        return ""
    peak = section["peak_flops"] / 1e9
    columns: Columns = (
        ("attention", lambda c: f"d = {c['d']}, {c['name']}"),
        ("forward", lambda c: f"{c['peak_share_forward']:.0%}"),
        ("forward and backward", lambda c: f"{c['peak_share_total']:.0%}"),
    )
    error = error_of_shares(c[key] for c in cells for key in ("peak_share_forward", "peak_share_total"))
    return (
        f"Share of the peak of multiply-adds, {peak:,.0f} GFLOP/s (measured in the same run by a loop that touches "
        f"only registers), at n = {SHARE_AT:,}; flops by [mathematics.md](mathematics.md), section 4:\n\n"
        + table_of(columns, cells)
        + (f"\n\n{error[0].upper()}{error[1:]}." if error else "")
    )


def _memory(section: Section) -> str:
    columns: Columns = (
        ("n", lambda m: f"{m['n']:,}"),
        ("attention", lambda m: str(m["name"])),
        ("forward", lambda m: mebibytes(m["forward"])),
        ("forward and backward", lambda m: mebibytes(m["total"])),
    )
    said = "Peak memory beyond inputs, outputs and gradients, MiB, d = 16, each in a separate process:"
    return f"{said}\n\n{table_of(columns, section['memory'], left=2)}" if section["memory"] else ""


def mebibytes(number: float | None) -> str:
    return "-" if number is None else f"{number / MEBIBYTE:,.1f}"


def peers(section: Section) -> str:
    """Everyone's time and error."""
    shape = section["shape"]
    best = best_of_each(section)
    columns: Columns = (
        ("attention", lambda entry: str(entry["name"])),
        ("package", lambda entry: " ".join(filter(None, (entry["package"], entry["version"])))),
        ("fastest setting", lambda entry: str(entry["setting"])),
        ("forward ms", lambda entry: f"{1e3 * entry['forward_s']:,.1f}"),
        ("with backward ms", lambda entry: f"{1e3 * entry['total_s']:,.1f}"),
        ("output error", lambda entry: f"{entry['output_error']:.1e}"),
        ("gradient error", lambda entry: f"{entry['gradient_error']:.1e}"),
    )
    missing = [
        f"* {e['name']} ({e['setting']}), {e['package']}: not available: {e['reason']}"
        for e in section["not_available"]
    ]
    return "\n".join(
        [
            heading_of("Beside other libraries", section),
            f"n = {shape['n']:,}, {shape['heads']} heads, d = {shape['d']}, dv = {shape['dv']}, causal; the same "
            f"inputs for all, logits within {section['largest_logit']:g}; errors are relative (L2), against softmax in "
            "float64; the gradient error is the largest of those of q, k and v. Lower is better.\n",
            table_of(columns, best, left=3),
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
        allowed = 1.001 * entry["output_error"]
        as_good = [o for o in best if o["package"] != "fastgrad-dsl" and o["output_error"] <= allowed]
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

    def faster(row: Mapping[str, Any]) -> str:
        softmax = exact.get(row["n"])
        return "-" if softmax is None else _about(softmax) + ratio(softmax["seconds"], row["seconds"])

    columns: Columns = (
        ("model", lambda row: str(section["models"][row["model"]])),
        ("n", lambda row: f"{row['n']:,}"),
        ("seconds", lambda row: f"{_about(row)}{row['seconds']:,.2f}"),
        ("faster than SDPA", faster),
        ("peak MiB", lambda row: mebibytes(row["peak_bytes"])),
    )
    return "\n".join(
        [
            heading_of("A training step", section),
            f"examples/bounded.tfg, {section['layers']} layers of width {section['width']}, batch {section['batch']}: "
            "forward, backward and AdamW; time and peak memory in separate processes. Lower is better. `~`: "
            "extrapolated as a n + b n².\n",
            table_of(columns, sorted(section["rows"], key=lambda row: row["n"])),
        ]
    )


def anatomy(section: Section) -> str:
    """What a step's time goes to."""
    parts = section["parts"]

    def of(part: str) -> Callable[[Mapping[str, Any]], str]:
        def cell(row: Mapping[str, Any]) -> str:
            floor = row["floors"].get(part)
            beside = "" if floor is None else f" ({floor:.2f})"
            return f"{row['seconds'] * row['shares'][part]:.2f}{beside}"

        return cell

    columns: Columns = (
        ("n", lambda row: f"{row['n']:,}"),
        ("classes", lambda row: f"{row['classes']:,}"),
        ("a step", lambda row: f"{row['seconds']:.2f}"),
        *((said, of(part)) for part, said in parts.items()),
        ("a step / its products", lambda row: f"{1 / row['shares']['products']:.2f}"),
        ("with inductor", lambda row: f"{row['inductor_seconds']:.2f}"),
    )
    return "\n".join(
        [
            heading_of("The anatomy of a step", section),
            "examples/gpt.tfg, batch 1, forward and backward, in seconds; in brackets the floor: products at the peak, "
            "all else, operation by operation, at the speed of memory. A step is timed by itself, its parts are shares "
            "of a profile. With inductor: torch.compile in place of the pass `fuse`, in turns with the step.\n",
            table_of(columns, section["rows"], left=0),
        ]
    )


def _about(entry: Mapping[str, Any]) -> str:
    """A mark before what was extrapolated."""
    return "" if entry["measured"] else "~"


def compiler(section: Section) -> str:
    """Compile times."""
    what = {
        "a 96-layer bounded.tfg to the text of all its files, after imports": "compile_96_layers_s",
        "the same with 1 layer": "compile_1_layer_s",
        "`fastgrad check examples/bounded.tfg`, the whole process": "check_process_s",
    }
    rows = [[said, f"{section[key]:.3f}"] for said, key in what.items()]
    heading = heading_of("The compiler", section)
    return f"{heading}\nMedians of {section['runs']}.\n\n{table(['what', 'seconds'], rows)}"


def budget(section: Section) -> str:
    """Calibration, planning, guards, and degrees picked by hand."""
    tokens, planning, guards = section["tokens"], section["planning"], section["guards"]
    planned, verified = section["planned"]["planned"], section["planned"]["verification"]
    rows = [
        [f"calibration, planning and verification of bounded.tfg without its pin, at {tokens['calibrated']:,} tokens",
         f"{section['calibration_s']:.1f} s"],
        [f"planning {planning['layers']} layers of {planning['heads']} heads, once calibrated",
         f"{planning['plan_s']:.3f} s"],
        ["the same and all passes of the compiler", f"{planning['total_s']:.2f} s"],
        [f"guards of {guards['attentions']} attentions, share of a training step at {tokens['measured']:,} tokens",
         f"{100 * (guards['guarded_s'] / guards['bare_s'] - 1):.1f} %"],
    ]  # fmt: skip
    columns: Columns = (
        ("all attentions", lambda entry: str(entry["name"])),
        ("seconds", lambda entry: f"{entry['step_s']:.3f}"),
        ("output error", lambda entry: f"{entry['output']:.2e}"),
        ("gradient error", lambda entry: f"{entry['gradient']:.2e}"),
        ("keeps the budget", lambda entry: "yes" if entry["keeps"] else "no"),
    )
    kinds = ", ".join(section["planned"]["attentions"])
    return "\n".join(
        [
            heading_of("Budgets", section),
            table(["what", "measured"], rows),
            f"The plan, layer by layer: {kinds}. Its errors: output {planned['output']:.2g} (estimate), "
            f"{verified['output']:.2g} (measured, held out); gradient {planned['gradient']:.2g} (estimate), "
            f"{verified['gradient']:.2g} (measured).\n",
            f"A training step at {tokens['measured']:,} tokens, against every single family and degree picked by hand, "
            "in turns; errors measured on held-out text against the exact model:\n",
            table_of(columns, sorted(section["picked"], key=lambda entry: entry["step_s"])),
        ]
    )


def curves(section: Section) -> str:
    """Losses of training from many seeds, what changes them, and what the planner found before and after."""
    sizes = ", ".join(f"{name} = {size}" for name, size in section["model"].items())
    columns: Columns = (
        ("family", lambda entry: entry["family"]),
        ("degree", lambda entry: str(entry["degree"])),
        ("its own queries and keys", lambda entry: f"{100 * entry['scores']:.1f} %"),
        ("all queries, keys and values", lambda entry: f"{100 * entry['gradient']:.1f} %"),
    )
    local = sorted(section["local"], key=lambda entry: (entry["degree"], -entry["scores"]))
    causes = [name for name in section["losses"] if name.startswith("degree")]
    others = [name for name in section["losses"] if name not in causes]
    rows = [
        [name, before["path"], *_found(before), *_found(after)]
        for name, plans in section["plans"].items()
        for before, after in zip(plans["initial"], plans["trained"], strict=True)
    ]
    plan = [
        "run",
        "attention",
        "initial plan",
        "largest logit",
        "gain",
        "trained plan",
        "largest logit",
        "gain",
    ]
    return "\n".join(
        [
            heading_of("Training curves", section),
            f"![{CURVES_TITLE}](curves.svg)\n",
            f"bounded.tfg without its pin, with {sizes}, {section['steps']} steps at {section['tokens']:,} tokens, "
            f"from {len(section['losses']['exact'])} seeds, each of which draws weights and batches; the plot has the "
            "first. Losses are on held-out text at the end, in nats per byte. `planned` keeps the budget; `planned for "
            "training` is what `fastgrad train --calibrate` plans, whose gradients of queries and keys are off by at "
            f"most {100 * section['scores']:g} % ([training](training.md#the-budget)); `exact again` starts from "
            f"weights moved by {100 * section['chance']:g} % of themselves, and shows the effect of chance:\n",
            _losses(section, others, "exact"),
            "What it is that changes the loss, in steps whose forward and backward passes have different degrees, or "
            "with an error added to the gradient of each weight; beside degree 3, which stands in for exact "
            "attention:\n",
            _losses(section, causes, "degree 3"),
            "Relative errors of gradients at initial weights, the largest of the attentions. The first are of the "
            "queries and keys of the far pairs that a polynomial serves, the second of near pairs too:\n",
            table_of(columns, local),
            "What the planner finds with initial and with trained weights of the first seed; gains on the output are "
            "estimates:\n",
            table(plan, rows, left=3),
        ]
    )


def _losses(found: Section, names: Sequence[str], base: str) -> str:
    """A table of final losses beside those of the same seeds of another run."""
    rows = []
    for name in names:
        each, beside = found["losses"][name], found["losses"][base]
        shares = [100 * (one / other - 1) for one, other in zip(each, beside, strict=True)]
        error = f"{stdev(shares) / sqrt(len(shares)):.2f} %"
        single = f"{min(shares):+.2f} to {max(shares):+.2f} %"
        curve = found["curves"].get(name)
        seconds = [f"{curve['seconds']:.0f}"] if curve else []
        rows.append([name, f"{fmean(each):.4f}", f"{fmean(shares):+.2f} %", error, single, *seconds])
    columns = ["run", "mean loss", f"beside {base}", "standard error", "single seeds"]
    return table([*columns, *(["seconds of the first"] if base in found["curves"] else [])], rows)


def _found(entry: Mapping[str, Any]) -> tuple[str, str, str]:
    """What a plan has for an attention: what serves it, the largest logit, the gain on the output."""
    gain = entry["gains"]["output"]
    return entry["chosen"], f"{entry['seen']:.2f}", "-" if gain is None else f"{gain:.2f}"


def demo(section: Section) -> str:
    """What `make demo` measured."""
    columns: Columns = (
        ("model", lambda entry: entry["name"]),
        ("steps", lambda entry: str(entry["steps"])),
        ("nats per byte", lambda entry: f"{entry['validation_loss']:.3f}"),
        ("forward and backward", lambda entry: f"{entry['seconds']:.2f} s"),
        ("peak MiB", lambda entry: mebibytes(entry["peak_bytes"])),
        ("recall", lambda entry: "-" if entry["accuracy"] is None else f"{entry['accuracy']:.0%}"),
    )
    entries = [
        {"name": name, **entry, "accuracy": section["recall"].get(name, {}).get("accuracy")}
        for name, entry in section["models"].items()
    ]
    return "\n".join(
        [
            heading_of("The demonstration", section),
            f"examples/gpt.tfg, and the same with softmax: {section['minutes']:g} minutes of training each at "
            f"{section['tokens']:,} tokens, loss on held-out text; and the share of 32 pairs that a model of two "
            "layers recalls.\n",
            table_of(columns, entries),
        ]
    )


def heading_of(title: str, section: Section) -> str:
    """The title of a section, and how it was measured."""
    quick = " **A quick run with tiny sizes: these numbers mean nothing.**" if section["quick"] else ""
    target = f", target {section['target']}" if title != "The compiler" else ""
    made = f"`{section['command']}`, {section['machine']['date']}: {machine_line(section)}{target}.{quick}"
    return f"## {title}\n\n{made}\n"


SECTIONS: dict[str, Callable[[Section], str]] = {
    "attention": attention,
    "peers": peers,
    "training": training,
    "anatomy": anatomy,
    "compiler": compiler,
    "budget": budget,
    "curves": curves,
    "demo": demo,
}
"""One writer for each section of the JSON."""
