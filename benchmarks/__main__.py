"""Runs every benchmark: `python -m benchmarks [--quick]`."""

from __future__ import annotations

from benchmarks import save_stall, step_overhead


def main() -> None:
    save_stall.main()
    step_overhead.main()


if __name__ == "__main__":
    main()
