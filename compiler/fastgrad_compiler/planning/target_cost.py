"""The models of cost that a target has, and from which length on a polynomial pays there."""

from __future__ import annotations

from fastgrad_compiler.planning.cost import EQUAL, PACE, Cost, Shape, Way, break_even
from fastgrad_compiler.planning.roofline import DEVICES, Roofline

GPU = Roofline(DEVICES["sm_90"])  # modelled, not measured


def cost_of(target: str, shape: Shape, way: Way) -> Cost:
    """The model by which a polynomial is compared with exact attention.

    Where there is no Triton kernel for it, PyTorch's operations serve it: their flops are compared.
    """
    if target != "triton":
        return PACE[target]
    return GPU if GPU.serves(shape, way) else EQUAL


def target_break_even(target: str, shape: Shape, way: Way) -> int:
    """`break_even` on a target, of one document as long as the sequence."""
    return break_even(cost_of(target, shape, way), shape, way)
