"""What a kernel is called where it is read."""

from __future__ import annotations

from fastgrad_compiler.runtime.kernel_spec import KernelSpec


def kernel_title(spec: KernelSpec) -> str:
    """One line that says what a kernel computes."""
    parts = [f"Polynomial attention, degree {spec.degree}"]
    if spec.window is not None:
        parts = ["Softmax attention" + (f" within {spec.reach} tokens" if spec.reach else "")]
    if spec.causal:
        parts.append("causal")
    if spec.forget:
        parts.append("forget gates")
    if spec.padding:
        parts.append("with a padding mask")
    if spec.documents:
        parts.append("packed")
    if spec.near is not None:
        parts.append(f"exact in blocks of {spec.near} tokens")
    if spec.precision == "float64":
        parts.append("computed in float64")
    return ", ".join(parts)


def near_formulas(spec: KernelSpec, score: str) -> list[str]:
    """What the weights are with a near field, whose logits are `score` or near_q.near_k; nothing without one."""
    if spec.near is None:
        return []
    t = "near_q.near_k" if spec.near_d else score
    return [
        f"weight of a pair: exp(t - m) in blocks of {spec.near} tokens that are one or touch, e^-m p(s) beyond",
        f"t = {t}; m: the row's greatest t, and at least 0 if it sees a far key",
    ]
