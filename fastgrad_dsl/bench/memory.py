"""Peak memory, in a process of its own for each measurement.

The high-water mark of the resident set sees every allocator, the buffers of the matrix library included, which a
profiler of PyTorch's allocator does not. What the allocator holds unused is given back first, and the mark is reset.
Linux only: elsewhere there is no number.

    python -m fastgrad_dsl.bench.memory '{"contender": {...}, "n": 1024, "threads": 2}'

prints the peaks of one pass as JSON, beyond what was there before: inputs, code and libraries.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastgrad_compiler.runtime.in_turn import give_back
from fastgrad_dsl.bench.contenders import Contender

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def run_child(module: str, request: Mapping[str, object]) -> dict[str, Any]:
    """The JSON that `python -m module REQUEST` prints last. Raises RuntimeError with its words where it fails."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (os.getcwd(), *sys.path)))}
    command = [sys.executable, "-m", module, json.dumps(request)]
    ended = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if ended.returncode:
        raise RuntimeError(f"{module} ended with {ended.returncode}: {ended.stderr.strip()[-500:]}")
    result: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
    return result


def peak_of(action: Callable[[], object]) -> int | None:
    """Bytes by which the resident set rises above its present size while `action` runs; None where unknown."""
    if not CLEAR.exists():
        action()
        return None
    give_back()
    CLEAR.write_text("5")  # forget the high-water mark
    before = resident("VmRSS")
    action()
    return resident("VmHWM") - before


def resident(field: str = "VmRSS") -> int:
    """Bytes of this process, now or with VmHWM at most."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(f"{field}:"))
    return 1024 * int(line.split()[1])


def attention_peaks(contender: Contender, n: int, threads: int) -> dict[str, int | None]:
    """`forward`: of a pass without gradients, beyond inputs and output; `total`: forward and backward, beyond inputs,
    output and gradients. Bytes, each in a process of its own."""
    request = {"contender": asdict(contender), "n": n, "threads": threads}
    return {
        what: run_child("fastgrad_dsl.bench.memory", {**request, "backward": backward})["peak"]
        for what, backward in (("forward", False), ("total", True))
    }


def _pass(contender: Contender, n: int, backward: bool) -> tuple[int | None, int]:
    """Peak of one pass, and the bytes of its results."""
    attention, inputs = contender.function(), contender.inputs(n)
    results: list[Tensor] = []

    def action() -> None:
        with torch.set_grad_enabled(backward):
            results.append(attention(inputs.q, inputs.k, inputs.v))
        if backward:
            results.extend(torch.autograd.grad(results[0], (inputs.q, inputs.k, inputs.v), inputs.cotangent))

    peak = peak_of(action)
    return peak, sum(x.numel() * x.element_size() for x in results)


def main() -> None:
    """The child's side."""
    request = json.loads(sys.argv[1])
    torch.set_num_threads(request["threads"])
    contender = Contender(**request["contender"])
    _pass(contender, 2, request["backward"])  # loads the code; leaves no buffers of a size to speak of
    peak, results = _pass(contender, request["n"], request["backward"])
    print(json.dumps({"peak": None if peak is None else max(0, peak - results)}))


if __name__ == "__main__":
    main()
