"""What the model of many ranks takes as given: each number once, with where it is from."""

from __future__ import annotations

from dataclasses import dataclass

from fastgrad_compiler.runtime.triton_schedule import DEVICES, Device


@dataclass(frozen=True)
class Constant:
    """A number of the model, in `unit`; source: where it is published, or that it is assumed."""

    name: str
    value: float
    unit: str
    source: str


GPU: Device = DEVICES["sm_90"]
NCCL = "NCCL, src/graph/tuning.cc, hwLatencies, ring, protocol Simple"
LLAMA = "The Llama 3 Herd of Models (arXiv 2407.21783)"

MATRIX = Constant(
    "matrix products in bfloat16",
    GPU.half,
    "flop/s",
    "data sheet H100 SXM: 1,979 Tflop/s with sparsity, half",
)
VECTOR = Constant("vector units", GPU.vector, "flop/s", "data sheet H100 SXM")
DOUBLE = Constant(
    "matrix products in float64, products in float32",
    GPU.vector,
    "flop/s",
    "data sheet H100 SXM: 67 Tflop/s, both",
)
BANDWIDTH = Constant("GPU memory, bandwidth", GPU.bandwidth, "byte/s", "data sheet H100 SXM")
MEMORY = Constant("GPU memory", 80e9, "byte", "data sheet H100 SXM")
NODE = Constant("GPUs of a node", 8, "", "data sheet DGX H100")
NVLINK = Constant(
    "NVLink, one way",
    450e9,
    "byte/s",
    "data sheet H100 SXM: 900 GB/s, both ways together; all to all by NVSwitch",
)
NETWORK = Constant(
    "network of a GPU, one way", 50e9, "byte/s", "data sheet DGX H100: one 400 Gb/s ConnectX-7 a GPU"
)
NVLINK_LATENCY = Constant("a message on NVLink", 3.4e-6, "s", NCCL)
NETWORK_LATENCY = Constant("a message on the network", 14e-6, "s", NCCL)
HOST_LINK = Constant(
    "GPU to host, one way", 64e9, "byte/s", "data sheet H100 SXM: PCIe Gen5, 128 GB/s both ways"
)
FAILURES = Constant(
    "failures of a GPU", 419 / (54 * 86_400 * 16_384), "1/s",
    f"{LLAMA}, section 3.3.4: 419 unexpected interruptions in 54 days on 16,384 GPUs",
)  # fmt: skip
STORAGE = Constant(
    "storage of a GPU",
    2e12 / 16_384,
    "byte/s",
    f"{LLAMA}, section 3.3.1: 2 TB/s sustained, here for 16,384 GPUs",
)
RESTART = Constant("from a failure to training again", 300.0, "s", "assumed: nothing is published")

CONSTANTS = (
    *(MATRIX, VECTOR, DOUBLE, BANDWIDTH, MEMORY, NODE, NVLINK, NETWORK, NVLINK_LATENCY, NETWORK_LATENCY),
    *(HOST_LINK, FAILURES, STORAGE, RESTART),
)
