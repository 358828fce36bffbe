"""What rounding adds to the errors of a polynomial attention, proved from the evaluation as the kernels do it.

Every way from the inputs of a kernel to an entry of its result is a chain of operations, each with a factor 1 + t,
|t| <= u. So the computed result is that of weights p^ in place of p, with (docs/mathematics.md, section 10)

    |p^(s)  - p(s)|  e^-s <= e^R sum_j   |c_j| rho^j       gamma_(K_j)      `weights`
    |p'^(s) - p'(s)| e^-s <= e^R sum_j j |c_j| rho^(j - 1) gamma_(K'_j)     `slopes`

for |s| <= R, |scale| sum_a |q_a k_a| <= rho and gamma_K = K u / (1 - K u). K_j counts the operations of the longest way
of a term of degree j; sums that a library makes count as if in the worst order. Nothing may overflow or underflow.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from math import ceil, inf, prod

from fastgrad_compiler.approximation.elementary import exp
from fastgrad_compiler.approximation.kernel_tiles import has_triton, is_fused, token_chunks
from fastgrad_compiler.ir.masks import LEAST_LOG_GATE
from fastgrad_compiler.runtime.kernel_spec import KernelSpec, choose_chunk, rounds_operands
from fastgrad_compiler.runtime.monomials import rank
from fastgrad_compiler.runtime.triton_schedule import CHUNKS
from fastgrad_compiler.targets import Backends

UNITS = {"float64": 2.0**-53, "float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
"""The unit roundoff of each dtype: half the distance from 1 to the next number."""

USUAL_LENGTH = 65_536  # tokens, where a file declares no longest sequence
LONGEST = 2**40
WIDEST_NEAR = 256  # width of near queries and keys of their own, where it is not known

_SLACK = 1 + 1e-9  # for the float64 arithmetic of this file
_FACTORS = 24  # coefficients, W, u~, a division, decays: operations on every way, generously counted
_FEATURES = 128  # features of a state that the C++ kernels add up before they add to a row
_STEP = 8  # products that a GPU's matrix instruction adds up at least
# additions of a vector of 128 entries, whose rounding is a quarter of that of a matrix instruction
_VECTOR = 32
_GPU_UNIT = 4 * UNITS["float32"]  # of a matrix instruction, which may cut sums off where others round
_LEAST_ROWS = 16  # tokens of a step of a fused kernel
_PASSES = 3  # instructions that make one product of float32 numbers out of tf32 ones
# roundings of operands on the way to a weight and to its slope: features, states, values or u~, gradients
_OPERANDS = (4, 6)
_SEGMENTS = 1.25  # of the chunks: the C++ kernels cut a row of four chunks or more for a thread
# units of roundoff in e^x that come of x, for near weights and gates: |x| is below that
_EXPONENTS = {"float64": 1024, "float32": 128}
_GATE = 4  # operations for the factor of a pair by a gate, of a state in each chunk too: a difference, e^x, a product
_LEAST = {"float64": 2.0**-1022, "float32": 2.0**-126}  # what is below it may be rounded to 0


@dataclass(frozen=True, slots=True)
class Rounding:
    """Bounds, each relative to what exp gives.

    Args:
        weights: of what rounding makes of a weight before normalisation, in the forward pass or for dV.
        slopes: of what it makes of a weight's derivative, for dQ and dK.
        products: of a product of dO and O, and of a division.
        stored: unit roundoff of the dtype in which output and gradients are stored.
    """

    weights: float
    slopes: float
    products: float
    stored: float


EXACT = Rounding(0.0, 0.0, 0.0, 0.0)
"""Real arithmetic."""


@dataclass(frozen=True, slots=True)
class Run:
    """Where and in which dtype a model runs: device is "cpu" or "gpu", dtype a key of UNITS, that of q, k and v.

    On a CPU arithmetic is float32, or float64 for float64, whatever the dtype; but C++ kernels may round the operands
    of products to bfloat16 where inputs are (`rounds_operands`). On a GPU whose kernels Triton serves, the operands of
    products are bfloat16 or tf32 where inputs are bfloat16 or float16; float32 inputs have the accuracy of
    `torch.get_float32_matmul_precision() == "highest"`, which is a premise on a CPU as well.
    """

    device: str = "cpu"
    dtype: str = "float32"


@dataclass(frozen=True, slots=True)
class Sizes:
    """Of one call: queries, keys, and the query heads that share a key head."""

    queries: int
    keys: int
    groups: int = 1


@dataclass(frozen=True, slots=True)
class _Ways:
    """Operations on the longest way: (to a weight, to its slope) apart from the power of s, and `power` for each power.

    `operands`, `operand_power`: in the same way, roundings of the operands of products.
    """

    fixed: tuple[int, int]
    power: int
    operands: tuple[int, int] = (0, 0)
    operand_power: int = 0


@dataclass(frozen=True, slots=True)
class _Arithmetic:
    """The relative error of one operation, and of an operand that is rounded for a product, or of a gate's sum."""

    unit: float
    operand: float = 0.0


@lru_cache(maxsize=4096)  # a search for a plan asks for each candidate several times
def rounding(
    spec: KernelSpec, sizes: Sizes, bound: float, reach: float, backends: Backends, run: Run
) -> Rounding:
    """What rounding adds to an attention, of the worst of the kernels that may serve it.

    Args:
        spec: of the kernel; `precision` is that of its arithmetic at least.
        sizes: of the call.
        bound: R, |s| <= R for every pair that the polynomial serves.
        reach: rho, |scale| sum_a |q_a k_a| <= rho for those pairs; at least R.
        backends: what may serve the kernel beside PyTorch.
        run: device and dtype.

    Infinite where there is no bound.
    """
    arithmetic = _arithmetic(spec, sizes, run)
    served = [(arithmetic, _torch(spec, sizes))]
    if run.device == "cpu" and backends.cpp:
        served.append(_cpp(spec, sizes, run))
    if run.device == "gpu" and is_triton(spec, backends) and run.dtype != "float64":
        arithmetic = _gpu_arithmetic(run)
        served = [(arithmetic, _triton(spec, sizes, run))]
    found = [_amplified(spec.coefficients, bound, max(reach, bound), *each) for each in served]
    # a kernel in float64 keeps denominators in float32 for its backward pass
    saved = 4 * UNITS["float32"] if spec.precision == "float64" and run.dtype != "float64" else 0.0
    vanished = _vanished(spec, sizes, bound, max(reach, bound)) if spec.forget else (0.0, 0.0)
    return Rounding(
        weights=max(each[0] for each in found) + saved + vanished[0],
        slopes=max(each[1] for each in found) + vanished[1],
        products=_gamma(arithmetic, spec.dv + 4, 0),
        stored=UNITS[run.dtype],
    )


def is_triton(spec: KernelSpec, backends: Backends) -> bool:
    """Whether Triton kernels serve a specification on a GPU."""
    return backends.triton and has_triton(spec)


def runs(spec: KernelSpec, backends: Backends) -> tuple[Run, ...]:
    """The runs for which a plan states its rounding; a GPU's where its kernels' arithmetic differs from a CPU's."""
    devices = ("cpu", "gpu") if is_triton(spec, backends) else ("cpu",)
    return tuple(Run(device, dtype) for device in devices for dtype in ("float32", "bfloat16", "float16"))


# ---------------------------------------------------------------- amplification


def _amplified(
    coefficients: Sequence[float], bound: float, reach: float, arithmetic: _Arithmetic, ways: _Ways
) -> tuple[float, float]:
    """(weights, slopes), from sums over the powers of s."""

    def gamma(which: int, j: int) -> float:
        operands = ways.operands[which] + j * ways.operand_power
        return _gamma(arithmetic, ways.fixed[which] + j * ways.power, operands)

    sizes = [abs(c) for c in coefficients]
    weights = _horner([size * gamma(0, j) for j, size in enumerate(sizes)], reach)
    slopes = _horner([j * size * gamma(1, j) for j, size in enumerate(sizes) if j], reach)
    return _SLACK * exp(bound) * weights, _SLACK * exp(bound) * slopes


def _vanished(spec: KernelSpec, sizes: Sizes, bound: float, reach: float) -> tuple[float, float]:
    """(weights, slopes) of all keys of a row whose gates lead below the least number, as shares of the row's sum.

    That is e^-R at least: the last key that a row sees has the factor 1.
    """
    terms = [abs(c) for c in spec.coefficients]
    share = sizes.keys * exp(bound) * _LEAST[spec.precision]
    slopes = [j * size for j, size in enumerate(terms) if j]
    return share * _horner(terms, reach), share * _horner(slopes, reach)


def _horner(coefficients: Sequence[float], x: float) -> float:
    """A polynomial by products and sums alone: powers of a float may differ between C libraries."""
    value = 0.0
    for coefficient in reversed(coefficients):
        value = value * x + coefficient
    return value


def _gamma(arithmetic: _Arithmetic, operations: int, operands: int) -> float:
    """Bound of |(1 + t_1) .. (1 + t_K) (1 + r_1) .. (1 + r_M) - 1|, |t| <= unit, |r| <= operand."""
    parts = (operations * arithmetic.unit, operands * arithmetic.operand)
    if max(parts) >= 1:
        return inf
    return prod(1 / (1 - part) for part in parts) - 1


def _arithmetic(spec: KernelSpec, sizes: Sizes, run: Run) -> _Arithmetic:
    unit = UNITS["float64" if "float64" in (spec.precision, run.dtype) else "float32"]
    return _Arithmetic(unit, _drift(sizes) if spec.forget else 0.0)


def _drift(sizes: Sizes) -> float:
    """Error of a difference of two running sums G of log gates of at least -1000 (`runtime/decay.py`), in float64.

    G is the sum of multiples of 2^-10, which is exact, and of rests of at most 2^-11 in size, which takes n additions.
    """
    n, unit = sizes.keys, UNITS["float64"]
    return 2 * unit * -LEAST_LOG_GATE * n + n * unit * (n * 2.0**-11)


def _gpu_arithmetic(run: Run) -> _Arithmetic:
    """Of tensor cores, which may cut sums off where others round; a float32 operand is a sum of tf32 ones."""
    return _Arithmetic(_GPU_UNIT, {"bfloat16": 2.0**-8, "float16": 2.0**-10}.get(run.dtype, 2.0**-21))


# ---------------------------------------------------------------- ways


def _power(spec: KernelSpec) -> int:
    """For each power of s: q.k of d products and Horner's two steps; or features, and what reaches their factors."""
    return spec.d + 6


def _fixed(spec: KernelSpec, window: int) -> int:
    """On every way, apart from sums over tokens and features."""
    near = 0 if spec.near is None else _EXPONENTS[spec.precision] + window // 16
    gate = _EXPONENTS[spec.precision] + _GATE if spec.forget else 0
    return _FACTORS + spec.degree + near + gate


def _gates(spec: KernelSpec) -> tuple[int, int]:
    """Differences of running sums on every way: those of a state's chunks add up to one."""
    return (1, 1) if spec.forget else (0, 0)


def _of_state(spec: KernelSpec) -> int:
    """Operations of a state in each chunk: an addition, and the factor of a gate."""
    return 1 + _GATE if spec.forget else 1


def _window(spec: KernelSpec, tile: int) -> int:
    """Keys that a tile of queries meets one by one, at most."""
    if spec.near is not None:
        return tile + (2 if spec.causal else 3) * spec.near
    return tile if spec.causal or spec.documents else 0


def _torch(spec: KernelSpec, sizes: Sizes) -> _Ways:
    """A library's products: within a tile, and over features, in any order; states take one addition per tile."""
    tile, least = choose_chunk(spec), torch_tile(spec, sizes.groups)
    r, window = rank(spec.d, spec.degree), _window(spec, tile)
    tiles = ceil(max(sizes.queries, sizes.keys) / least) + 2
    common = _fixed(spec, window) + sizes.groups * tile + tiles * _of_state(spec) + r + window
    return _Ways((common, common + spec.dv), _power(spec), operands=_gates(spec))


def _cpp(spec: KernelSpec, sizes: Sizes, run: Run) -> tuple[_Arithmetic, _Ways]:
    """Sums over a chunk in registers, states and rows take one addition a chunk; a part of the features at a time.

    bfloat16 inputs may be met by a processor's own products of bfloat16.
    """
    block, pieces, tile = token_chunks(spec)
    r, window = rank(spec.d, spec.degree), _window(spec, max(block, tile))
    least = min(tile, block // pieces)
    chunks = ceil(_SEGMENTS * sizes.groups * (max(sizes.queries, sizes.keys) / least + 2)) + 2
    common = _fixed(spec, window) + tile + chunks * _of_state(spec) + window
    features = min(r, _FEATURES) + ceil(r / _FEATURES)
    arithmetic, rounded = _arithmetic(spec, sizes, run), _gates(spec)
    if run.dtype == "bfloat16" and rounds_operands(spec):
        arithmetic = replace(arithmetic, operand=max(UNITS["bfloat16"], arithmetic.operand))
        rounded = (rounded[0] + _OPERANDS[0], rounded[1] + _OPERANDS[1])
    return arithmetic, _Ways((common + features, common + r + spec.dv), _power(spec), operands=rounded)


def _triton(spec: KernelSpec, sizes: Sizes, run: Run) -> _Ways:
    """Sums of matrix instructions in a chunk of tokens, or over a whole sequence, and over the chunks and features."""
    tokens = max(sizes.queries, sizes.keys)
    near = spec.near or 1
    chunks = [near * ceil(chunk / near) for chunk in CHUNKS]
    most = max(_summed(sizes.groups * chunk) + ceil(tokens / chunk) * _of_state(spec) for chunk in chunks)
    if is_fused(spec):
        walked = ceil(tokens / _LEAST_ROWS) * _GATE if spec.forget else 0
        most = max(most, _summed(sizes.groups * tokens) + walked)
    if spec.forget:
        most += _sums_of_gates(sizes)
    window = _window(spec, max(chunks))
    common = _fixed(spec, window) + most + _summed(rank(spec.d, spec.degree)) + _summed(window)
    power = 0 if run.dtype == "bfloat16" else 2  # factors that are chosen by a product, and scores
    return _Ways((common, common + _summed(spec.dv)), _power(spec), operands=_OPERANDS, operand_power=power)


def _sums_of_gates(sizes: Sizes) -> int:
    """Operations that err as much as a difference of running sums that kernels get as two float32 numbers each."""
    n = max(sizes.queries, sizes.keys)
    return ceil((_drift(Sizes(n, n)) + 2 * -LEAST_LOG_GATE * n * 2.0**-48) / _GPU_UNIT)


def _summed(terms: int) -> int:
    """Additions on the way of a term through a product: of matrix instructions, and of a vector's entries."""
    return _PASSES * ceil(terms / _STEP) + _STEP + _VECTOR


# ---------------------------------------------------------------- PyTorch's tiles

_WORK_BYTES, _LEAST_TILE, _SCORE_BUFFERS = 20 * 2**20, 16, 4  # of runtime/attention_op.py


def torch_tile(spec: KernelSpec, groups: int) -> int:
    """The least tile that PyTorch's kernel may take, whose work buffers are limited (`plan_tiles`)."""
    tile, r, d, dv = choose_chunk(spec), rank(spec.d, spec.degree), spec.d, spec.dv
    largest = rank(d, spec.degree - 1) - rank(d, spec.degree - 2) if spec.degree > 1 else 0
    columns = (4 + spec.documents + spec.forget) * (dv + 1)
    per_query = (3 if spec.forget else 2) * r + largest + spec.degree * d + columns + 2 * (spec.near_d or 0)
    states = 5 if not spec.causal and (spec.near is not None or spec.documents) else 3
    window = (2 if spec.forget else 1) * _window(spec, tile)
    while True:
        size = 8 * (groups * tile * (per_query + _SCORE_BUFFERS * window) + states * r * (dv + 1))
        if size <= _WORK_BYTES or tile % 2 or tile <= _LEAST_TILE:
            return tile
        tile //= 2
