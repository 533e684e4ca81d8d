"""The ranks' fixtures, for the reports of real runs."""

from __future__ import annotations

from tests.distributed.conftest import lab, zygote

__all__ = ["lab", "zygote"]
