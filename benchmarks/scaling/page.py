"""docs/scaling.md and its plots, made from the section `scaling` of docs/performance.json."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from benchmarks.scaling.rules import rules
from benchmarks.scaling.step import OURS, RING, ULYSSES, WAYS
from benchmarks.tables import table
from fastgrad_dsl.plots.panels import Panel, Series, render

PAGE, FIGURE, FAULTS = "docs/scaling.md", "docs/scaling.svg", "docs/scaling-faults.svg"
TITLE = "A step, what is sent, and the longest sequence, on many ranks, by the model"
FAULTS_TITLE = "Time lost to failures, and the best interval between checkpoints"
SHOWN_RANKS, SHOWN_LENGTHS = (1, 8, 32, 128, 1024), (10**4, 10**5, 10**6, 10**7, 10**8)
COLOURS = {OURS: 0, RING: 4, ULYSSES: 1}
MODEL = "**Model, not measured.**"
SIMULATED = "**Simulated.**"

Section = Mapping[str, Any]
Rows = Sequence[Mapping[str, Any]]

INTRODUCTION = (
    "# Many ranks, on paper\n\n"
    "[Several ranks](distributed.md) at a size that this project has never run at: H100 nodes "
    "of eight, from 1 to 1,024 ranks, one sequence of 10^4 to 10^8 tokens in pieces on all of them. {model} Only "
    "bytes, time and memory of a few processes are measured, [below](#measured-here). Made from "
    "[performance.json](performance.json) by `python -m benchmarks.run --section scaling` and "
    "`python -m benchmarks.document`; the formulas are in `benchmarks/scaling/`.\n\n"
    "**Ours** (attention by a polynomial, of which ranks exchange sums of features, "
    "[distributed](distributed.md)) is compared with:\n\n"
    "* **ring attention** (arXiv 2310.01889): keys and values go round all ranks while each works on those it has. It "
    "is counted with causal work divided equally (arXiv 2311.09431), which flatters it.\n"
    "* **Ulysses** (arXiv 2309.14509): all-to-all exchanges give each rank some heads of the whole sequence, and back. "
    "It cannot have more ranks than heads, and has no numbers beyond.\n\n"
    "Both are softmax attention on FlashAttention, by the same rules as ours: every unit and link at its peak.\n\n"
    "![{title}](scaling.svg)\n"
)


def page(section: Section) -> str:
    """docs/scaling.md."""
    parts = [
        INTRODUCTION.format(title=TITLE, model=MODEL),
        _losses(section),
        rules(),
        _constants(section),
        _decoder(section["decoder"]),
        _times(section),
        _bytes(section),
        _largest(section),
        _break_even(section),
        _here(section["here"]),
        _memory(section["memory"]),
        _faults(section),
    ]
    return "\n".join(parts)


def figures(section: Section) -> dict[str, str]:
    """The plots by their paths."""
    return {FIGURE: _figure(section), FAULTS: _faults_figure(section)}


# ---------------------------------------------------------------- where ours loses


def _losses(section: Section) -> str:
    slower, more, tighter = [], [], []
    weights = section["decoder"]["weights"]
    for place, cells in _by_place(section).items():
        ours = cells[OURS]
        for way, other in cells.items():
            if other["seconds"] < ours["seconds"]:
                slower.append((*place, way, ours["seconds"] / other["seconds"]))
            if other["bytes_per_token"] < ours["bytes_per_token"]:
                more.append((*place, way, ours["bytes_per_token"] / other["bytes_per_token"]))
            if other["memory"] < ours["memory"]:
                tighter.append((*place, way, ours["memory"] / other["memory"]))
    count = sum(len(cells) - 1 for cells in _by_place(section).values())
    told = [
        "## Where ours loses\n",
        f"Of {count} comparisons (every number of ranks and length of the model, with each of the other two):\n",
        f"* **time of a step**: {_told(slower, 'slower')}",
        f"* **bytes sent**: {_told(more, 'more')}",
        f"* **memory**: {_told(tighter, 'more')}",
        f"* **higher degrees**: {_of_degrees(section['break_even'])}",
        "",
        "A state is as large as the keys and values of some hundred tokens, and is sent once for each doubling of the "
        "ranks: if a rank has few tokens, all-to-alls of these tokens are smaller. On the shortest sequences weights "
        "decide, and attention does not matter: ours leads there because its keys are narrower, so that it has "
        f"{1 - weights[OURS] / weights[RING]:.0%} fewer weights.\n",
        "The model has all kernels at their peaks, and real ones are not. The table shows how many times slower than "
        "in the model our attention may be, with the others at their peaks, before the better of them is as fast: if "
        "that number is small, ours may lose on a real machine.\n",
        _margins(section),
    ]
    return "\n".join(told)


def _of_degrees(rows: Rows) -> str:
    told = []
    for degree in sorted({row["degree"] for row in rows} - {2}):
        worst = max(
            (row for row in rows if row["degree"] == degree), key=lambda row: row["n_time"] or float("inf")
        )
        below = "at any length" if worst["n_time"] is None else f"below {worst['n_time']:,} tokens"
        told.append(f"with degree {degree} a step of ours takes longer {below} on {worst['ranks']:,} ranks")
    return (
        f"{'; '.join(told)}: the worst numbers of ranks, of all [from here on](#from-where-on-ours-is-ahead)."
    )


def _margins(section: Section) -> str:
    places, rows = _by_place(section), []
    for ranks in SHOWN_RANKS:
        row = [f"{ranks:,}"]
        for n in SHOWN_LENGTHS:
            cells = places[ranks, n]
            ours, best = cells[OURS], min(cell["seconds"] for way, cell in cells.items() if way != OURS)
            margin = 1 + (best - ours["seconds"]) / ours["attention"]
            row.append(f"{margin:,.0f}" if margin >= 10 else f"{margin:.1f}")
        rows.append(row)
    return table(["ranks", *(f"{n:,}" for n in SHOWN_LENGTHS)], rows, left=0)


def _told(found: Sequence[tuple[int, int, str, float]], how: str) -> str:
    if not found:
        return "ours loses none."
    worst = max(found, key=lambda each: each[-1])
    places = "; ".join(f"{n:,} tokens on {ranks:,} ranks against {way}" for ranks, n, way, _ in found[:8])
    rest = f"; and {len(found) - 8} more" if len(found) > 8 else ""
    by = f"{worst[-1] - 1:.1%} {how}"
    return f"ours loses {len(found)}: {places}{rest}. The worst is {by}, at {worst[1]:,} tokens on {worst[0]:,} ranks."


def _by_place(section: Section) -> dict[tuple[int, int], dict[str, Mapping[str, Any]]]:
    found: dict[tuple[int, int], dict[str, Mapping[str, Any]]] = {}
    for cell in section["cells"]:
        found.setdefault((cell["ranks"], cell["n"]), {})[cell["way"]] = cell
    return found


# ---------------------------------------------------------------- tables


def _constants(section: Section) -> str:
    rows = [
        [each["name"], f"{_number(each['value'])} {each['unit']}".strip(), each["source"]]
        for each in section["constants"]
    ]
    return f"## The constants\n\n{table(['what', 'value', 'source'], rows, left=3)}"


def _decoder(decoder: Mapping[str, Any]) -> str:
    ours, softmax = (decoder["weights"][way] / 1e9 for way in (OURS, RING))
    return (
        f"The decoder is [gpt.tfg](../examples/gpt.tfg) at {decoder['layers']} layers, width {decoder['width']:,}, "
        f"{decoder['heads']} heads, hidden width {decoder['hidden']:,} and {decoder['vocab']:,} tokens: {ours:.2f} "
        f"billion weights. Heads have keys of {decoder['d']}, values of {decoder['dv']}, degree {decoder['degree']}, "
        f"a near field in blocks of {decoder['near']}; the sums of one attention are {_size(decoder['state_bytes'])}. "
        f"With softmax, keys are as wide as values: {softmax:.2f} billion weights.\n"
    )


def _times(section: Section) -> str:
    head = (
        "## The time of a step\n\n"
        f"{MODEL} Seconds of forward and backward pass; in brackets the share spent waiting for data to be sent. The "
        "shortest is bold; `x`: it does not fit into the memory of a rank.\n"
    )
    limit = next(each["value"] for each in section["constants"] if each["name"] == "GPU memory")

    def show(cell: Mapping[str, Any], best: float) -> str:
        text = f"{_seconds(cell['seconds'])} ({cell['exposed'] / cell['seconds']:.0%})"
        text = f"**{text}**" if cell["seconds"] == best else text
        return f"{text} x" if cell["memory"] > limit else text

    return f"{head}\n{_crossed(section, 'seconds', show)}"


def _bytes(section: Section) -> str:
    head = (
        "## Bytes sent for a token\n\n"
        f"{MODEL} What all ranks send for attentions and convolutions in a step, over the tokens of the sequence; the "
        "least is bold. Ours falls with the length, since states do not grow; that of ring attention grows with the "
        "ranks.\n"
    )

    def show(cell: Mapping[str, Any], best: float) -> str:
        text = _size(cell["bytes_per_token"])
        return f"**{text}**" if cell["bytes_per_token"] == best else text

    return f"{head}\n{_crossed(section, 'bytes_per_token', show, above=1)}"


def _crossed(
    section: Section, key: str, show: Callable[[Mapping[str, Any], float], str], above: int = 0
) -> str:
    places, rows = _by_place(section), []
    for ranks in (each for each in SHOWN_RANKS if each > above):
        for way in WAYS:
            row = [f"{ranks:,}", way]
            for n in SHOWN_LENGTHS:
                cells = places[ranks, n]
                best = min(cell[key] for cell in cells.values())
                row.append(show(cells[way], best) if way in cells else "-")
            rows.append(row)
    return table(["ranks", "", *(f"{n:,}" for n in SHOWN_LENGTHS)], rows, left=2)


def _largest(section: Section) -> str:
    rows = []
    for ranks in sorted({row["ranks"] for row in section["largest"]}):
        found = {row["way"]: row for row in section["largest"] if row["ranks"] == ranks}
        rows.append([f"{ranks:,}", *(_length(found[way][key]) for key in ("n", "n_minute") for way in WAYS)])
    heading = ["ranks", *WAYS, *(f"{way}, a minute" for way in WAYS)]
    return (
        "## The longest sequence\n\n"
        f"{MODEL} The most tokens that fit into the memory of all ranks, and the most whose step also takes no more "
        "than a minute. The three differ in time, not in memory: all keep each token's activations once.\n\n"
        f"{table(heading, rows, left=0)}"
    )


def _break_even(section: Section) -> str:
    degrees = sorted({row["degree"] for row in section["break_even"]})
    at = {(row["degree"], row["ranks"]): row for row in section["break_even"]}
    rows = [
        [f"{ranks:,}", *(_length(at[g, ranks][key]) for key in ("n_time", "n_bytes") for g in degrees)]
        for ranks in sorted({row["ranks"] for row in section["break_even"]})
    ]
    heading = ["ranks", *(f"{what}, degree {g}" for what in ("time", "bytes") for g in degrees)]
    tried = "from 1,024 tokens, and from one token a rank"
    return (
        "## From where on ours is ahead\n\n"
        f"{MODEL} The least length (a power of two, {tried}) from which a step of ours always takes less time, or "
        f"sends less, than the better of the other two. -: at no length up to 2^27.\n\n{table(heading, rows, left=0)}"
    )


def _here(here: Mapping[str, Any]) -> str:
    decoder = here["decoder"]
    rows = [
        [
            f"{row['ranks']}",
            f"{row['n']:,}",
            f"{row['modelled_bytes']:,.0f}",
            f"{row['counted_bytes']:,.0f}",
            f"{row['exchanged_bytes']:,}",
            f"{row['calls']}",
            f"{row['modelled_s']:.3f}",
            f"{row['measured_s']:.3f}",
            f"{row['waiting']:.0%}" if row["ranks"] > 1 else "-",
        ]
        for row in here["rows"]
    ]
    latencies = " and ".join(
        f"{1e3 * each['latency']:.1f} ms each with {each['ranks']}"
        for each in here["latencies"]
        if each["ranks"] > 1
    )
    heading = [
        *(
            "processes",
            "tokens",
            "bytes, model",
            "bytes, counted",
            "of it states and halos",
            "collectives of each",
            "s, model",
        ),
        *("s, measured", "in communication"),
    ]
    return (
        "## Measured here\n\n"
        f"gpt.tfg with {decoder['layers']} layers of width {decoder['width']}, {decoder['heads']} heads, near "
        f"{decoder['near']}, float32, on 1, 2 and 4 processes of this machine with weights sharded over all of them, "
        f"without recomputing blocks; medians of {here['steps']} steps, the slowest process. Bytes are what the "
        "collectives of all processes send in a step: `model` is the formulas of `benchmarks/scaling/sizes.py`, "
        "`counted` adds up the tensors that they were given. They agree **exactly**, which a test asserts. At all of "
        "these lengths attention sends the same number of bytes.\n\n"
        f"{table(heading, rows, left=0)}\n"
        "Time by the model: what one process takes (fitted: "
        f"{1e3 * here['fixed_s']:.0f} ms and {1e6 * here['token_s']:.0f} µs a token), divided by the processes that "
        f"have a core of their own; the collectives of a step, {latencies}; and the bytes at "
        f"{_size(here['bandwidth'])}/s, both measured. "
        "Other work ran on the same two cores, several times as much as they can do: times are longer, and only "
        f"their ratios mean something. From the shortest to the longest sequence they grow: {_growth(here)}. Most of "
        "the time in communication is waiting for the slowest process.\n"
    )


def _growth(here: Mapping[str, Any]) -> str:
    told = []
    for ranks in sorted({row["ranks"] for row in here["rows"]}):
        rows = sorted((row for row in here["rows"] if row["ranks"] == ranks), key=lambda row: int(row["n"]))
        measured, modelled = (rows[-1][key] / rows[0][key] for key in ("measured_s", "modelled_s"))
        told.append(f"{measured:.1f} times ({modelled:.1f} by the model) with {ranks}")
    return ", ".join(told)


def _memory(rows: Rows) -> str:
    at = {(row["ranks"], row["n"]): row for row in rows if row["peak_bytes"] is not None}
    shown, shares = [], []
    for (ranks, n), row in at.items():
        whole = row["base_bytes"] + row["peak_bytes"]
        shown.append([f"{n:,}", f"{ranks}", _size(row["base_bytes"]), _size(row["peak_bytes"]), _size(whole)])
        if ranks == 4 and (1, n) in at:
            alone = at[1, n]
            over = row["peak_bytes"] / alone["peak_bytes"]
            all_ = whole / (alone["base_bytes"] + alone["peak_bytes"])
            shares.append(f"{over:.0%} over the base and {all_:.0%} with it at {n:,} tokens")
    return (
        "Memory of a process, for a model of width 96, depth 4 (float32, 4 heads, near 64), the first step: "
        "`base` is the resident set after PyTorch is imported and the model is made, `peak` is what the step adds.\n\n"
        f"{table(['tokens', 'processes', 'base', 'peak over it', 'together'], shown, left=0)}\n"
        f"The share that each of four processes takes of what one takes: {'; '.join(shares)}.\n"
    )


def _faults(section: Section) -> str:
    rows = [
        [
            f"{row['weights'] / 1e9:g} billion",
            f"{row['ranks']:,}",
            f"{row['between'] / 3600:,.0f} h",
            "stops training" if row["blocks"] else "in the background",
            _seconds(row["copy"]),
            _seconds(row["write"]) if row["write"] else "-",
            _seconds(row["interval"]),
            f"{100 * row['lost']:.2f} %",
            f"{_seconds(row['young'])}, {_seconds(row['daly'])}",
            "-" if row["lost_by_formula"] is None else f"{100 * row['lost_by_formula']:.2f} %",
            f"{100 * row['lost_in_groups']:.2f} %",
        ]
        for row in section["faults"]
        if row["ranks"] in (8, 64, 256, 1024)
    ]
    most = max(section["faults"], key=lambda row: row["ranks"])
    heading = [
        *(
            "weights",
            "ranks",
            "a failure every",
            "checkpoint",
            "stops for",
            "written in",
            "best interval",
            "lost",
        ),
        *("Young, Daly", "lost by Daly", "lost, in groups"),
    ]
    return (
        "## Failures\n\n"
        f"{SIMULATED} Any failure ends all ranks; they restart from the last complete checkpoint. Failures "
        "come at the rate per GPU of the training of Llama 3; a checkpoint is 12 bytes per weight, copied to the host "
        "and then written at a GPU's share of that run's storage; a restart takes five minutes, which is an "
        "assumption. 20,000 failures each, event by event (`benchmarks/scaling/faults.py`).\n\n"
        f"![{FAULTS_TITLE}](scaling-faults.svg)\n\n"
        f"{table(heading, rows, left=4)}\n"
        "* `stops training`: training waits until the checkpoint is written, as Young (1974) and Daly (2006) assume. "
        "The simulation agrees with Daly's expectation, which a test asserts.\n"
        "* `in the background`: training stops only for the copy, and a checkpoint that is still being written is lost "
        "when a rank fails, as with `torch.distributed.checkpoint.async_save`, which `fastgrad train` uses. The "
        "formulas ignore the writing, which is short compared with the interval here, so Young's is still near the "
        "best.\n"
        "* `in groups`: the same mean time between failures by Weibull's distribution of shape 0.7 (Schroeder and "
        "Gibson 2006 found 0.7 to 0.8), with a best interval of its own.\n"
        "* The optimum is flat: with twice or half the best interval, checkpoints and repeated work cost a "
        f"quarter more. Restarts cost {100 * most['restart'] / most['between']:.2f} % on {most['ranks']:,} "
        "ranks, whatever the interval: where checkpoints are written in the background, that is most of what is lost.\n"
    )


def _seconds(value: float) -> str:
    if value >= 7200:
        return f"{value / 3600:,.1f} h"
    if value >= 120:
        return f"{value / 60:,.1f} min"
    return f"{value:.3g} s" if value >= 1 else f"{1e3 * value:.3g} ms"


def _size(value: float) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.3g} B"


def _number(value: float) -> str:
    return f"{value:,.0f}" if 1 <= value < 1e4 else f"{value:.4g}"


def _length(n: int | None) -> str:
    return "-" if n is None else f"{n:,}"


# ---------------------------------------------------------------- plots


def _figure(section: Section) -> str:
    cells = section["cells"]
    ranks = {64, 1024}
    steps = [
        Series(
            f"{way}, {count:,} ranks",
            _pairs(cells, "n", "seconds", way=way, ranks=count),
            COLOURS[way],
            True,
            True,
        )
        for count in sorted(ranks)
        for way in WAYS
        if any(cell["way"] == way and cell["ranks"] == count for cell in cells)
    ]
    megabytes = [{**cell, "megabytes": cell["bytes_per_token"] / 1e6} for cell in cells]
    sent = [
        Series(way, _pairs(megabytes, "ranks", "megabytes", way=way, n=10**6), COLOURS[way], True, True)
        for way in WAYS
    ]
    longest = [
        Series(way, _pairs(section["largest"], "ranks", "n_minute", way=way), COLOURS[way], True, True)
        for way in WAYS
    ]
    panels = [
        Panel("time of a step (model)", "tokens of the sequence", "seconds (lower is better)", tuple(steps)),
        Panel("sent at 1,000,000 tokens (model)", "ranks", "MB for a token (lower is better)", tuple(sent)),
        Panel("longest sequence in a minute (model)", "ranks", "tokens (higher is better)", tuple(longest)),
    ]
    told = "; ".join(
        f"{cell['way']}: {cell['seconds']:.3g} s"
        for cell in cells
        if (cell["ranks"], cell["n"]) == (1024, 10**7)
    )
    return render(panels, TITLE, f"A step of ten million tokens on 1,024 ranks, by the model: {told}.")


def _faults_figure(section: Section) -> str:
    names = {True: "stops training", False: "in the background"}
    weights = max(row["weights"] for row in section["faults"])
    tried = [
        Series(
            name, _pairs(section["intervals"], "interval", "lost", blocks=blocks), 0 if blocks else 1, True
        )
        for blocks, name in names.items()
    ]
    formula = Series(
        "Daly", _pairs(section["intervals"], "interval", "lost_by_formula", blocks=True), 4, True, True
    )
    best = [
        Series(
            f"{name}, {each / 1e9:g} billion weights",
            _pairs(section["faults"], "ranks", "lost", blocks=blocks, weights=each),
            (0 if blocks else 1) + (0 if each == weights else 2),
            True,
        )
        for each in sorted({row["weights"] for row in section["faults"]})
        for blocks, name in names.items()
    ]
    panels = [
        Panel(
            f"{weights / 1e9:g} billion weights, 1,024 ranks",
            "seconds between checkpoints",
            "share of time lost (lower is better)",
            (*tried, formula),
        ),
        Panel("at the best interval", "ranks", "share of time lost (lower is better)", tuple(best)),
    ]
    told = "; ".join(
        f"{names[row['blocks']]}, {row['weights'] / 1e9:g} billion weights: {100 * row['lost']:.2f} %"
        for row in section["faults"]
        if row["ranks"] == 1024
    )
    return render(panels, FAULTS_TITLE, f"Share of time lost at 1,024 ranks at the best interval: {told}.")


def _pairs(
    rows: Iterable[Mapping[str, Any]], x: str, y: str, **fixed: object
) -> tuple[tuple[float, float], ...]:
    return tuple(
        (float(row[x]), float(row[y]))
        for row in rows
        if row[y] and all(row[key] == value for key, value in fixed.items())
    )
