"""`launcher export`: a checkpoint for serving, or for transformers' Trainer. `--help` and mistakes need no torch."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from launcher.base.errors import EXIT_DONE, UserError
from launcher.cli.arguments import hush_libraries
from launcher.config.settings import DTYPES
from launcher.saving.interop.target import refuse_missing

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}

_EXAMPLES = """examples:
  launcher export outputs/run served --format safetensors --dtype bfloat16      the best (else the newest) model
  launcher export outputs/run/checkpoint-500 served --format safetensors        this one, in the dtype it is stored in
  launcher export outputs/run merged --format safetensors --merge               a LoRA adapter merged into its base
  launcher export outputs/run for-trainer --format trainer                      the newest, with its training state

DIR must not exist, or be empty; it appears complete or not at all."""


def main(argv: list[str]) -> int:
    """Exports one checkpoint; returns the exit code.

    Raises:
        UserError: the input is wrong. DamagedCheckpointError: the checkpoint is not whole.
    """
    parser = argparse.ArgumentParser(
        prog="launcher export", description="Write a checkpoint for serving, or for transformers' Trainer.",
        epilog=_EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="a checkpoint-N folder, or a run")
    parser.add_argument("target", type=Path, metavar="DIR", help="a new or empty folder")
    parser.add_argument("--format", required=True, choices=("safetensors", "trainer"), help="the model, or all state")
    parser.add_argument("--dtype", choices=DTYPES, help="of the weights; default: as stored; float32 for trainer")
    parser.add_argument("--merge", action="store_true", help="a LoRA adapter merged into its base (safetensors)")
    parser.add_argument(
        "--base", metavar="MODEL", help="with --merge: the base, where it is not what the adapter names"
    )
    parser.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="of one weight file (default: 5GB)")
    parser.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the model")
    options = parser.parse_args(argv)
    hush_libraries()
    checkpoint, target = options.checkpoint.expanduser(), options.target.expanduser()
    size = _num_bytes(options.max_shard_size)
    refuse_missing(checkpoint)
    if options.base and not options.merge:
        raise UserError("--base is of --merge. Add --merge, or leave it out")
    if options.format == "trainer" and options.merge:
        raise UserError("--merge gives a model without training state: use --format safetensors")
    if options.merge:
        from launcher.saving.interop.serving import export_merged

        print(export_merged(checkpoint, target, base=options.base, dtype=options.dtype, max_shard_bytes=size,
                            trust_remote_code=options.trust_remote_code))  # fmt: skip
    elif options.format == "trainer":
        from launcher.saving.interop.trainer_export import export_trainer

        print(
            export_trainer(
                checkpoint,
                target,
                dtype=options.dtype,
                max_shard_bytes=size,
                trust_remote_code=options.trust_remote_code,
            )
        )
    else:
        from launcher.saving.interop.serving import export_safetensors

        print(export_safetensors(checkpoint, target, dtype=options.dtype, max_shard_bytes=size))
    return EXIT_DONE


def _num_bytes(text: str) -> int:
    match = re.fullmatch(r"(\d+)\s*([A-Za-z]*)", text.strip())
    if match is None or match[2].upper() not in _UNITS or not int(match[1]):
        raise UserError(
            f"--max-shard-size {text} is no size. Valid: a whole number with B, KB, MB, GB, MiB or GiB (5GB)"
        )
    return int(match[1]) * _UNITS[match[2].upper()]
