"""The devices that a run has, as far as its memory goes."""

from __future__ import annotations

from dataclasses import dataclass

from launcher.base.device_memory import gpu_bytes, host_bytes

_CUDA_RUNTIME_BYTES = 800 * 10**6
"""A CUDA context with its kernels, and the buffers of NCCL: beside what torch allocates."""
_CPU_RUNTIME_BYTES = 700 * 10**6
"""Python and the libraries of a rank and its writer."""
_USABLE = 0.94
"""The rest is lost between blocks of different sizes."""


@dataclass(frozen=True)
class Device:
    """`num_bytes` for each process; `kind` cuda or cpu."""

    kind: str
    num_bytes: int
    source: str
    """Where the number comes from, for people."""

    @property
    def is_cuda(self) -> bool:
        return self.kind == "cuda"

    @property
    def runtime_bytes(self) -> int:
        """What a process holds before there is anything of the run."""
        return _CUDA_RUNTIME_BYTES if self.is_cuda else _CPU_RUNTIME_BYTES

    @property
    def usable_bytes(self) -> float:
        """For what the plan counts."""
        return max(0.0, self.num_bytes * _USABLE - self.runtime_bytes)


def find_device(num_processes: int, num_machines: int, given: int | None = None) -> Device:
    """That of each process: as given, the smallest visible GPU, or a share of this host's memory.

    Args:
        given: bytes of a GPU that need not be here.
    """
    if given is not None:
        return Device("cuda", given, "as given")
    on_gpu = gpu_bytes()
    if on_gpu is not None:
        return Device("cuda", on_gpu, "the smallest visible GPU")
    local = max(1, num_processes // max(1, num_machines))
    return Device("cpu", host_bytes() // local, f"this host's memory for {local} process{'es' if local > 1 else ''}")
