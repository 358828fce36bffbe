"""The parts of docs/performance.md that are about GPUs: the model, and what benchmarks/gpu.py measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from benchmarks.tables import Columns, Section, mebibytes, ratio, table, table_of

MODEL = "Model, not measured."
HEADS = "heads times batch"


def gpu_model(section: Section) -> str:
    """Devices, kernels, times beside FlashAttention, break-even."""
    shape = section["shape"]
    lengths = list(dict.fromkeys(row["n"] for row in section["kernels"]))
    parts = [
        "## The Triton kernels on paper\n",
        f"**{MODEL}** `{section['command']}`; no GPU was used. {shape['heads']} heads, batch {shape['batch']}, "
        f"{'causal' if shape['causal'] else 'no mask'}, {shape['dtype']}.\n",
        "A kernel takes max(bytes / bandwidth, matrix flops / their peak, vector flops / their peak), divided by the "
        "share of the device that its programs fill, min(1, programs / multiprocessors): each unit works at its peak, "
        "and launches, instruction issue and exp beyond one flop cost nothing. FlashAttention is counted by the same "
        "rule: forward 2 (d + dv) flops per pair, for half of the pairs, backward 2.5 times that. Its kernels have "
        "one width for q, k and v, to which they are padded; `ideal` counts exactly d and dv. Real kernels reach a "
        "part of this: FlashAttention, according to its papers, half to three quarters at great lengths; what these "
        "kernels reach, only a GPU can tell. Formulas: compiler/fastgrad_compiler/runtime/triton_schedule.py and "
        "compiler/fastgrad_compiler/planning/roofline.py.\n",
        f"Devices, from data sheets. {MODEL}\n",
        _devices(section),
        *(
            part
            for n in lengths
            for part in (
                f"The kernels at n = {n:,}, in the order in which they run; those for the states of keys run again in "
                "the backward pass. A time is followed by what limits it (memory, matrix or vector units), and by * if "
                "there are fewer programs than multiprocessors; registers per thread and occupancy are from "
                f"ahead-of-time compilation, where known. {MODEL}\n",
                _kernels(section, n),
            )
        ),
        "Forward and backward, milliseconds; in brackets: times faster than FlashAttention. `fused` is one program "
        f"per head, `parallel` works on chunks of the sequence; the chosen one is bold. {MODEL}\n",
        _times(section),
        "Least n from which both passes together take no longer than FlashAttention (ideal). At such short lengths "
        "the dozen launches, which take some microseconds each and are not counted, matter as much as the kernels. "
        f"{MODEL}\n",
        _break_even(section),
        _fused_from(section),
    ]
    return "\n".join(part for part in parts if part)


def _case(row: Mapping[str, Any]) -> str:
    return f"d = {row['d']}, dv = {row['dv']}, degree {row['degree']}"


def _names(section: Section) -> dict[str, str]:
    return {device["architecture"]: device["name"] for device in section["devices"]}


def _devices(section: Section) -> str:
    columns: Columns = (
        ("device", lambda d: f"{d['name']} ({d['architecture']})"),
        ("bf16, fp16 Tflop/s", lambda d: f"{d['half'] / 1e12:,.1f}"),
        ("tf32 Tflop/s", lambda d: f"{d['tf32'] / 1e12:,.1f}"),
        ("fp32 products Tflop/s", lambda d: f"{d['single'] / 1e12:,.1f}"),
        ("fp32 vector Tflop/s", lambda d: f"{d['vector'] / 1e12:,.1f}"),
        ("TB/s", lambda d: f"{d['bandwidth'] / 1e12:.2f}"),
        ("cache MiB", lambda d: f"{d['cache'] / 2**20:,.0f}"),
        ("multiprocessors", lambda d: f"{d['multiprocessors']}"),
    )
    return table_of(columns, section["devices"])


def _kernels(section: Section, n: int) -> str:
    names = _names(section)
    multiprocessors = {device["architecture"]: device["multiprocessors"] for device in section["devices"]}
    rows = []
    for row in section["kernels"]:
        if row["n"] != n:
            continue
        chunk = "" if row["chunk"] is None else f", chunk {row['chunk']:,}"
        rows.append(
            [
                f"{_case(row)}{chunk}",
                f"{row['kernel']}" + ("" if row["of"] is None else f" ({row['of']})"),
                f"{row['bytes'] / 1e6:,.0f}",
                f"{row['matrix_flops'] / 1e9:,.1f}",
                f"{row['programs']:,}",
                *(
                    f"{1e6 * on['seconds']:,.0f} {on['limit']}"
                    + ("*" if row["programs"] < multiprocessors[name] else "")
                    for name, on in row["on"].items()
                ),
                " ".join(map(_resources, row["on"].values())),
            ]
        )
    headings = [f"{name} µs" for name in names.values()]
    registers = f"registers / occupancy on {', '.join(names.values())}"
    return table(["attention", "kernel", "MB", "Gflop", "programs", *headings, registers], rows, left=2)


def _resources(on: Mapping[str, Any]) -> str:
    if on["registers"] is None or on["occupancy"] is None:
        return "-"
    return f"{on['registers']}/{on['occupancy']:.0%}"


def _times(section: Section) -> str:
    names = _names(section)
    columns: Columns = (
        ("attention", _case),
        ("device", lambda row: names[row["architecture"]]),
        ("n", lambda row: f"{row['n']:,}"),
        ("chunk", lambda row: f"{row['chunk']:,}"),
        ("parallel", partial(_schedule, "parallel")),
        ("fused", partial(_schedule, "fused")),
        ("FlashAttention", lambda row: _milliseconds(row["flash_total_s"])),
        ("ideal", lambda row: _milliseconds(row["flash_ideal_total_s"])),
    )
    return table_of(columns, section["times"], left=2)


def _schedule(schedule: str, row: Mapping[str, Any]) -> str:
    seconds = row[f"{schedule}_total_s"]
    if seconds is None:
        return "-"
    text = f"{_milliseconds(seconds)} ({ratio(row['flash_total_s'], seconds)})"
    return f"**{text}**" if row["schedule"] == schedule else text


def _milliseconds(seconds: float) -> str:
    milliseconds = 1e3 * seconds
    return f"{milliseconds:,.2f}" if milliseconds < 100 else f"{milliseconds:,.0f}"


def _break_even(section: Section) -> str:
    names = _names(section)
    rows = _by_case(
        section["break_even"], lambda row: f"{_length(row['padded_n'])} ({_length(row['ideal_n'])})"
    )
    return table(["attention", *names.values()], rows)


def _fused_from(section: Section) -> str:
    rows = _by_case(section["fused_from"], lambda row: _length(row["heads"]))
    if not rows:
        return ""
    n = section["fused_from"][0]["n"]
    said = f"{HEADS.capitalize()} (a power of two) from which `fused` is chosen, at n = {n:,}. {MODEL}\n"
    return f"{said}\n{table(['attention', *_names(section).values()], rows)}"


def _by_case(
    entries: Sequence[Mapping[str, Any]], show: Callable[[Mapping[str, Any]], str]
) -> list[list[str]]:
    """A row for each attention, a column for each device."""
    rows: dict[str, list[str]] = {}
    for entry in entries:
        rows.setdefault(_case(entry), []).append(show(entry))
    return [[case, *cells] for case, cells in rows.items()]


def _length(n: int | None) -> str:
    return "never" if n is None else f"{n:,}"


ATTENTION: Columns = (
    ("attention", lambda c: f"d = {c['d']}, dv = {c['dv']}, {c['name']}"),
    ("dtype", lambda c: str(c["dtype"])),
    ("n", lambda c: f"{c['n']:,}"),
)
ERRORS: Columns = (
    *ATTENTION,
    ("output error", lambda c: f"{c['output_error']:.1e}"),
    ("gradient error", lambda c: f"{c['gradient_error']:.1e}"),
)


def gpu(section: Section) -> str:
    """Errors on the device, then times and memory by length."""
    shape, machine = section["shape"], section["machine"]
    quick = " **A quick run with tiny sizes: these numbers mean nothing.**" if section["quick"] else ""
    parts = [
        "## On a GPU\n",
        f"`{section['command']}`, {machine['date']}: {section['device']['name']}, PyTorch {machine['torch']}, Triton "
        f"{section['device']['triton']}.{quick}\n",
        "The Triton kernels against the same polynomial in float64, relative (L2); of the gradients the largest:\n",
        table_of([*ERRORS, ("allowed", lambda c: f"{c['allowed']:.1e}")], section["checks"], left=2),
        "All contenders against softmax attention in float64, in the same way:\n",
        table_of(ERRORS, section["errors"], left=2),
        f"{shape['heads']} heads, batch 1, causal; medians of interleaved passes, milliseconds by the device's clock; "
        "in brackets: times faster than SDPA. Peak MiB of both passes, beyond inputs. Lower is better.\n",
        _gpu_times(section),
    ]  # fmt: skip
    skipped = [
        f"* {s['name']}, d = {s['d']}, {s['dtype']}, n = {s['n']:,} is left out: {s['reason']}"
        for s in section["skipped"]
    ]
    return "\n".join([*parts, *skipped, *([""] if skipped else [])])


def _gpu_times(section: Section) -> str:
    exact = {(c["d"], c["dv"], c["dtype"], c["n"]): c for c in section["cells"] if c["name"] == "SDPA"}

    def both(c: Mapping[str, Any]) -> str:
        softmax = exact.get((c["d"], c["dv"], c["dtype"], c["n"]))
        faster = "" if softmax is None else f" ({ratio(softmax['total_s'], c['total_s'])})"
        return f"{_milliseconds(c['total_s'])}{faster}"

    columns: Columns = (
        *ATTENTION,
        ("forward", lambda c: _milliseconds(c["forward_s"])),
        ("forward and backward", both),
        ("peak MiB", lambda c: mebibytes(c["peak_bytes"])),
    )
    return table_of(columns, section["cells"], left=2)


SECTIONS: dict[str, Callable[[Section], str]] = {"gpu_model": gpu_model, "gpu": gpu}
"""One writer for each section of the JSON that is about GPUs."""
