"""Fixtures of the fault tests; those that start ranks are shared with tests/distributed."""

from tests.distributed.conftest import lab, zygote

__all__ = ["lab", "zygote"]
