"""The models of cost that a target has, and from which length on a polynomial pays there."""

from __future__ import annotations

from dataclasses import replace

from fastgrad_compiler.planning.cost import EQUAL, PACE, Cost, Shape, Way, break_even
from fastgrad_compiler.planning.roofline import Roofline
from fastgrad_compiler.runtime.triton_schedule import DEVICES

GPU = Roofline(DEVICES["sm_90"])  # modelled, not measured
ON_GPU: dict[str, Cost] = {"torch": EQUAL, "cpp": EQUAL, "triton": GPU, "auto": GPU}
"""By target, of its models on a GPU, where PyTorch serves what Triton does not."""


def cost_of(target: str, shape: Shape, way: Way, *, on_gpu: bool = False) -> Cost:
    """The model by which a polynomial is compared with exact attention, on the device that a target is for.

    That is a CPU for `auto`. Where there is no Triton kernel, PyTorch serves the polynomial, and flops are compared.
    """
    if not on_gpu and target != "triton":
        return PACE[target]
    cost = ON_GPU[target]
    return EQUAL if isinstance(cost, Roofline) and not cost.serves(shape, way) else cost


def target_break_even(target: str, shape: Shape, way: Way, *, on_gpu: bool = False) -> int:
    """`break_even` on a target, of one document as long as the sequence."""
    return break_even(cost_of(target, shape, way, on_gpu=on_gpu), shape, way)


def dense_break_even(target: str, shape: Shape, way: Way, *, on_gpu: bool = False) -> int:
    """Least n from which on the states of a polynomial take no longer than all pairs; 0 where they never do."""
    cost = cost_of(target, shape, way, on_gpu=on_gpu)
    found = break_even(cost, shape, way, replace(way, dense=True), least=1)
    return found if found > 1 else 0
