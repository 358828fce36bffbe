"""Time and memory of the attention kernels against PyTorch's scaled_dot_product_attention.

    python benchmarks/attention.py [--json FILE] [--repeats 5] [--quick] [--long]

--quick leaves out n = 16,384 and the break-even lengths; --long also looks for that of degree 4, which takes some
ten minutes.

Time: forward and backward, both contenders interleaved in one process, medians. SDPA gets its fast path: is_causal,
and q and k zero-padded to the width of v, without which it falls back to a kernel that is far slower; the padding
is timed.

Memory: the peak of the resident set in a fresh process for each length (Linux: what the allocator holds unused is
given back and the high-water mark is reset just before the pass), minus what was resident before, minus output and
gradients. It sees every allocator, the buffers of the matrix library included, which a profiler of PyTorch's
allocator does not. A pass at length 2 has loaded the code before; it leaves no buffers of a size to speak of.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import normalize, pad, scaled_dot_product_attention

from fastgrad_compiler.codegen.kernel import KernelSpec, choose_chunk, load_kernel

COEFFICIENTS = {2: (1.0, 1.0, 0.5), 3: (1.0, 1.0, 0.5, 1 / 6), 4: (1.0, 1.0, 0.5, 1 / 6, 1 / 24)}
HEADS, D, DV = 8, 16, 64
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
Inputs = tuple[Tensor, Tensor, Tensor, Tensor]


def make_inputs(n: int) -> Inputs:
    """q, k of unit rows, v, and the gradient of the output; float32, batch 1."""
    generator = torch.Generator().manual_seed(0)

    def random(width: int) -> Tensor:
        return torch.randn(1, HEADS, n, width, generator=generator)

    q, k = normalize(random(D), dim=-1), normalize(random(D), dim=-1)
    return q.requires_grad_(), k.requires_grad_(), random(DV).requires_grad_(), random(DV)


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention by the fused kernel, which needs one width."""
    wide = (0, DV - D)
    return scaled_dot_product_attention(pad(q, wide), pad(k, wide), v, is_causal=True, scale=1.0)


def kernel(degree: int, near: int | None = None) -> Attention:
    """The causal kernel of one degree."""
    return load_kernel(KernelSpec(D, DV, COEFFICIENTS[degree], causal=True, near=near))


def seconds(attention: Attention, inputs: Inputs) -> tuple[float, float]:
    """Of one forward and one backward pass."""
    q, k, v, cotangent = inputs
    start = time.perf_counter()
    out = attention(q, k, v)
    middle = time.perf_counter()
    torch.autograd.grad(out, (q, k, v), cotangent)
    return middle - start, time.perf_counter() - middle


def compare(contenders: dict[str, Attention], n: int, repeats: int) -> dict[str, dict[str, float]]:
    """Median milliseconds of each contender, interleaved, after one pass to warm up."""
    inputs = make_inputs(n)
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in contenders}
    for repeat in range(repeats + 1):
        for name, attention in contenders.items():
            result = seconds(attention, inputs)
            if repeat:
                taken[name].append(result)
    return {
        name: {
            "forward_ms": 1e3 * statistics.median(forward for forward, _ in times),
            "backward_ms": 1e3 * statistics.median(backward for _, backward in times),
            "total_ms": 1e3 * statistics.median(map(sum, times)),
        }
        for name, times in taken.items()
    }


def break_even(degree: int, lengths: list[int], repeats: int) -> int | None:
    """The first of two neighbouring lengths at which the kernel is faster than SDPA, forward and backward."""
    found = None
    for n in lengths:
        result = compare({"kernel": kernel(degree), "sdpa": sdpa}, n, repeats)
        faster = result["kernel"]["total_ms"] < result["sdpa"]["total_ms"]
        if faster and found is not None:
            return found
        found = n if faster else None
    return None


def resident(field: str) -> int:
    """VmRSS (now) or VmHWM (peak) of this process, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def peak_memory(n: int) -> int:
    """Bytes of one pass beyond inputs, output and gradients, in this process; run it in a fresh one."""
    attention = kernel(2)
    seconds(attention, make_inputs(2))
    q, k, v, cotangent = make_inputs(n)
    ctypes.CDLL(None).malloc_trim(0)
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    out = attention(q, k, v)
    gradients = torch.autograd.grad(out, (q, k, v), cotangent)
    results = sum(x.numel() * x.element_size() for x in (out, *gradients))
    return resident("VmHWM") - before - results


def peak_memory_of_fresh_process(n: int, threads: int) -> int:
    """The same, in a process of its own."""
    command = [sys.executable, __file__, "--memory-of", str(n), "--threads", str(threads)]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def measure(repeats: int, threads: int, quick: bool, long: bool) -> dict[str, object]:
    """All numbers, with what they were measured on."""
    lengths = [4096] if quick else [4096, 16384]
    memory_lengths = [4096, 16384] if quick else [4096, 16384, 65536]
    contenders = {"degree 2": kernel(2), "degree 2, near 64": kernel(2, near=64), "sdpa": sdpa}
    time_table = {n: compare(contenders, n, repeats) for n in lengths}
    scales = {2: 128, 3: 1024}  # where to look for the break-even, in steps of a quarter octave
    if long:
        scales[4] = 6144
    even = {}
    for degree, first in scales.items():
        candidates = [round(first * 2 ** (step / 4)) for step in range(2, 16)]
        even[degree] = (
            None
            if quick
            else break_even(degree, candidates, max(1, 3 * repeats if degree == 2 else repeats // 2))
        )
    return {
        "command": shlex.join(["python", *sys.argv]),
        "machine": platform.processor() or platform.machine(),
        "cpu": cpu_model(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": threads,
        "shape": {"batch": 1, "heads": HEADS, "d": D, "dv": DV, "dtype": "float32", "causal": True},
        "chunk": {
            degree: choose_chunk(KernelSpec(D, DV, c, causal=True)) for degree, c in COEFFICIENTS.items()
        },
        "time": time_table,
        "break_even": even,
        "memory_bytes": {n: peak_memory_of_fresh_process(n, threads) for n in memory_lengths},
    }


def cpu_model() -> str:
    """As the kernel names it; empty where it does not."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")


def table(results: dict[str, object]) -> str:
    """For people."""
    lines = [f"{results['cpu']}, torch {results['torch']}, {results['threads']} threads", ""]
    lines.append(f"{'n':>7}  {'':20}{'forward':>10}{'backward':>10}{'total':>10}  ms{'SDPA takes':>14}")
    times = results["time"]
    assert isinstance(times, dict)
    for n, row in times.items():
        for name, cell in row.items():
            ratio = row["sdpa"]["total_ms"] / cell["total_ms"]
            numbers = "".join(f"{cell[key]:10.1f}" for key in ("forward_ms", "backward_ms", "total_ms"))
            lines.append(f"{n:>7}  {name:20}{numbers}    {ratio:12.1f} x")
    even, memory = results["break_even"], results["memory_bytes"]
    assert isinstance(even, dict)
    assert isinstance(memory, dict)
    lines.append("")
    lines += [f"break-even in time, degree {degree}: n = {n}" for degree, n in even.items() if n]
    lines += [
        f"peak memory beyond inputs and results, n = {n}: {b / 2**20:.1f} MiB" for n, b in memory.items()
    ]
    return "\n".join(lines)


def main() -> None:
    """Measure, print a table and, where asked, write JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write the numbers there")
    parser.add_argument("--long", action="store_true", help="also find the break-even length of degree 4")
    parser.add_argument("--repeats", type=int, default=5, help="passes of which the median is taken")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--quick", action="store_true", help="short lengths and no break-even")
    parser.add_argument(
        "--memory-of", type=int, help="print the peak memory in bytes at this length, and stop"
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.memory_of:
        print(peak_memory(options.memory_of))
        return
    results = measure(options.repeats, options.threads, options.quick, options.long)
    print(table(results))
    if options.json:
        options.json.write_text(json.dumps(results, indent=2, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
