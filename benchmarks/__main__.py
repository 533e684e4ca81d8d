"""Runs every benchmark that needs nothing but this repository: `python -m benchmarks [--quick]`."""

from __future__ import annotations

import argparse

from benchmarks import goodput, hub_overhead, kills, large, safety, save_stall, start, step_overhead


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks", description="Runs every benchmark.")
    parser.add_argument("--quick", action="store_true", help="few repetitions")
    is_quick = parser.parse_args().quick
    arguments, one_pair = (["--quick"], ["--pairs", "1"]) if is_quick else ([], [])
    save_stall.main(arguments)
    step_overhead.main(arguments)
    hub_overhead.main(arguments)
    for one in (start, safety, large, kills):
        one.main(one_pair)
    goodput.main([])


if __name__ == "__main__":
    main()
