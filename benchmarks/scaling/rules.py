"""What the page says of the rules of the model: each formula with its source."""

from __future__ import annotations

from benchmarks.tables import table

_RULES = (
    ("a message", "latency + bytes / bandwidth", "Hockney 1994"),
    (
        "between two ranks",
        "NVLink where all ranks are in one node; otherwise the network, which some of them need, by one link each",
        "-",
    ),
    (
        "a collective",
        "latency × ceil(log2 P) + (P - 1) / P × bytes / bandwidth; between nodes by the links of all their GPUs",
        "Thakur et al. 2005; PERFORMANCE.md of nccl-tests",
    ),
    (
        "products with weights",
        "2 N flops a token forward, 4 N backward, 2 N to make blocks again",
        "arXiv 2001.08361, 2205.05198",
    ),
    (
        "weights (FSDP)",
        "a layer is gathered for each pass in 2 bytes a weight, its gradient scattered in 4; a pass of a layer takes "
        "max(its work and attention's sending, its weights' way)",
        "arXiv 2304.11277",
    ),
    (
        "attention, ours",
        "the kernels of [performance](performance.md#the-triton-kernels-on-paper) on t tokens",
        "`runtime/triton_schedule.py`",
    ),
    (
        "its own sums, and reading those of earlier ranks",
        "PyTorch's operations: r features a token and head, written and read in float32 for the sums and in float64 "
        "for reading, and 2 r (dv + 1) flops; max(memory, flops), backward twice that",
        "`runtime/piece_attention.py`",
    ),
    (
        "what it sends of them",
        "ceil(log2 P) messages of 8 H (r (dv + 1) + 1) bytes, one after another, forward twice and backward once; "
        "nothing overlaps them",
        "Hillis and Steele 1986; `distributed/exchange.py`",
    ),
    (
        "its halo",
        "w tokens of k, rotary k, v and gates, and 3 of the convolution, to the next rank; nothing overlaps it",
        "`distributed/exchange.py`",
    ),
    (
        "ring attention",
        "P rotations of FlashAttention on t queries and t keys, half of the pairs. Keys and values, 4 t d bytes, "
        "travel meanwhile, backward with their gradients, 8 t d: the longer of work and message counts",
        "arXiv 2310.01889, 2311.09431",
    ),
    (
        "Ulysses",
        "4 all-to-alls a pass of 2 t d bytes, over NVLink and network at once; FlashAttention on n tokens of "
        "H / P heads",
        "arXiv 2309.14509",
    ),
    (
        "FlashAttention",
        "2 (d + dv) flops a pair forward, 2.5 times that backward",
        "`planning/roofline.py`",
    ),
    (
        "memory of a rank",
        "16 N / P bytes; two copies of a layer's weights and its gradient; 2 d bytes a token and layer; what one block "
        "keeps; buffers of exchanges; states of chunks",
        "`benchmarks/scaling/step.py`",
    ),
)
_HEAD = (
    "## The rules\n\n"
    "One sequence, P ranks, t = n / P tokens on each, N weights in parts on all ranks; bfloat16, sums of features in "
    "float64; each block is recomputed in the backward pass. In this table d is the width of the model.\n"
)
_LEFT_OUT = (
    "Left out are logits and their memory, the optimiser's step, launches, and all that keeps real kernels and "
    "networks from their peaks: FlashAttention reaches half to three quarters of its peak, according to its papers. A "
    "step here is a lower limit for all three alike. Also, a polynomial computes **another function** than softmax: "
    "[quality](quality.md), not this page, says what that costs.\n"
)


def rules() -> str:
    """The section of the page."""
    return f"{_HEAD}\n{table(['what', 'formula', 'source'], [list(rule) for rule in _RULES], left=3)}\n{_LEFT_OUT}"
