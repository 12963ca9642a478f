"""Kinds of GPUs, and what limits training on them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """What a kind of GPU can do; bandwidths are those of one direction, in 1e9 bytes a second.

    Attributes:
        memory_gib: its memory, as nvidia-smi shows it.
        tflops: 1e12 operations a second in bfloat16, dense.
        memory_gbs: between its memory and its cores.
        link_gbs: to another GPU of the same node.
        host_gbs: to the CPU's memory.
        network_gbs: its share of what goes to other nodes.
    """

    memory_gib: float
    tflops: float
    memory_gbs: float
    link_gbs: float
    host_gbs: float
    network_gbs: float


# From NVIDIA's data sheets (H100, H200 and A100 as SXM modules, L40S; for the RTX 4090 the white
# paper of the Ada architecture). NVLink's and PCIe's figures, which count both directions, are
# halved, and so are operations with sparsity. The network is that of a DGX H100 or H200 (400 Gb/s
# a GPU) and of a DGX A100 (200 Gb/s), each GPU having an adapter of its own; for the L40S 100 Gb/s
# a GPU is assumed, for the RTX 4090 10 Gb/s a node of eight. These two have no NVLink but PCIe 4.0.
GPUS = {
    "h100": Gpu(80, 989, 3350, 450, 64, 50),
    "h200": Gpu(140, 989, 4800, 450, 64, 50),
    "a100-80gb": Gpu(80, 312, 2039, 300, 32, 25),
    "a100-40gb": Gpu(40, 312, 1555, 300, 32, 25),
    "l40s": Gpu(45, 362, 864, 32, 32, 12.5),
    "rtx4090": Gpu(24, 165, 1008, 32, 32, 0.16),
}
