"""Runs every benchmark: `python -m benchmarks [--quick]`."""

from __future__ import annotations

import argparse

from benchmarks import hub_overhead, save_stall, step_overhead


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks", description="Runs every benchmark.")
    parser.add_argument("--quick", action="store_true", help="few repetitions")
    arguments = ["--quick"] if parser.parse_args().quick else []
    save_stall.main(arguments)
    step_overhead.main(arguments)
    hub_overhead.main(arguments)


if __name__ == "__main__":
    main()
