"""Everything that is used of DeepSpeed and is not its public interface: partitions, masters, the CPU's collectives.

Seen with deepspeed 0.19.8. tests/unit/test_private_names.py fails where an upgrade has moved or changed something.
DeepSpeed is imported only where a function needs it.
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from launcher.base.errors import UserError

# ------------------------------------------------------------------ ZeRO-3's parameters


@contextlib.contextmanager
def partition_without_broadcast() -> Iterator[None]:
    """Parameters made inside are partitioned as soon as they are made, without a broadcast of what they hold."""
    from deepspeed.runtime.zero.partition_parameters import Init

    def partition_only(self: Any, param: nn.Parameter) -> None:
        self._convert_to_deepspeed_param(param)
        param.partition()  # type: ignore[attr-defined]

    broadcast_and_partition = Init._zero_init_param
    Init._zero_init_param = partition_only
    try:
        yield
    finally:
        Init._zero_init_param = broadcast_and_partition


def is_partitioned(param: nn.Parameter) -> bool:
    return hasattr(param, "ds_id")


def full_shape(param: nn.Parameter) -> tuple[int, ...]:
    """Of a parameter, also where this process holds a part of it."""
    return tuple(getattr(param, "ds_shape", param.shape))


def shard_numel(param: nn.Parameter) -> int:
    """Elements of a partitioned parameter that each process holds; the last ones may be padding."""
    return int(param.ds_tensor.ds_numel)  # type: ignore[attr-defined]


def flat_shard(param: nn.Parameter) -> Tensor:
    """This process's elements of a partitioned parameter, in forward's dtype."""
    shard: Tensor = param.ds_tensor  # type: ignore[attr-defined]
    return shard.detach().view(-1)


def gathered(params: Sequence[nn.Parameter]) -> contextlib.AbstractContextManager[None]:
    """Parameters whole inside, and afterwards as the main process left them. Collective where they are partitioned."""
    partitioned = [param for param in params if is_partitioned(param)]
    if not partitioned:
        return contextlib.nullcontext()
    from deepspeed import zero

    context: contextlib.AbstractContextManager[None] = zero.GatheredParameters(partitioned, modifier_rank=0)
    return context


def partition_in_model_order(module: nn.Module) -> None:
    """Partitions what is not partitioned yet beside what is, and numbers all in the order of `named_parameters`.

    By these numbers DeepSpeed orders the gradients that it sums together, and where one lies decides in which order the
    processes' parts of it are added. A model that DeepSpeed partitions itself is numbered in this very order; without
    this, a resumed run would add in another order than its first start. Collective.
    """
    params: list[Any] = list(module.parameters())
    partitioned = [param for param in params if is_partitioned(param)]
    if not partitioned:
        return
    partitioned[0].convert_to_zero_parameters(param_list=[param for param in params if not is_partitioned(param)])
    for param, number in zip(params, sorted(param.ds_id for param in params), strict=True):
        param.ds_id = number


# ------------------------------------------------------------------ the optimizers


@dataclass(frozen=True)
class FlatMaster:
    """A flat fp32 master tensor of this process.

    ZeRO 1 and 2: a part of all parameters of `group` laid end to end, each at its offset there. ZeRO-3: this process's
    shards of some parameters, one after the other.
    """

    master: Tensor
    group: int
    """In the optimizer's param_groups."""
    params: tuple[nn.Parameter, ...]
    offsets: tuple[int, ...] = ()
    """Of the parameters, under ZeRO 1 and 2."""


def flat_masters(optimizer: Any) -> tuple[int, list[FlatMaster]]:
    """What a prepared optimizer holds: the ZeRO stage (2 stands for 1 as well), or 0 where it is not DeepSpeed's."""
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):
        found = zip(optimizer.fp32_partitioned_groups_flat, optimizer.fp16_groups, strict=True)
        return 3, [
            FlatMaster(master, optimizer.sub_group_to_group_id[i], tuple(params))
            for i, (master, params) in enumerate(found)
        ]
    if hasattr(optimizer, "single_partition_of_fp32_groups"):
        params, offsets = optimizer.round_robin_bit16_groups, optimizer.round_robin_bit16_offsets
        return 2, [
            FlatMaster(master, i, tuple(params[i]), tuple(offsets[i]))
            for i, master in enumerate(optimizer.single_partition_of_fp32_groups)
        ]
    return 0, []


def torch_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    """The optimizer that DeepSpeed's steps."""
    inner: torch.optim.Optimizer = optimizer.optimizer
    return inner


@torch.no_grad()
def refresh_forward_weights(optimizer: Any) -> None:
    """Brings ZeRO-3's partitions of the forward weights up to masters that were loaded. Collective."""
    if not hasattr(optimizer, "fp32_partitioned_groups_flat"):
        return
    for i in range(len(optimizer.fp32_partitioned_groups_flat)):
        optimizer._reassign_or_swap_out_partitioned_parameters(i)
    if optimizer.persistent_parameters:
        optimizer.persistent_parameters[0].partition(optimizer.persistent_parameters)
        optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)


def forget_powers(optimizer: Any) -> None:
    """Has DeepSpeed's CPU Adam correct its moments by the step alone, so that a resumed run ends with the same bits.

    For the powers of its betas it multiplies those of the step before, where it has made that step itself, and takes
    `pow` elsewhere, as after a resume (csrc/includes/cpu_adam.h, IncrementStep). In fp32 they differ in the last bits.
    A step 0 of nothing before every step leaves it none to go on from.

    Args:
        optimizer: the innermost; any other stays as it is.
    """
    if type(optimizer).__name__ != "DeepSpeedCPUAdam":
        return

    def forget(adam: Any, args: Any, kwargs: Any) -> None:
        nothing = torch.empty(0)
        group = adam.param_groups[0]
        adam.ds_opt_adam.adam_update(
            adam.opt_id, 0, group["lr"], *group["betas"], group["eps"], group["weight_decay"],
            group["bias_correction"], nothing, nothing, nothing, nothing,
        )  # fmt: skip

    optimizer.register_step_pre_hook(forget)


def loss_scaler(optimizer: Any) -> Any:
    """fp16's, or None."""
    return getattr(optimizer, "loss_scaler", None)


# ------------------------------------------------------------------ on the CPU


def build_cpu_collectives() -> None:
    """Has DeepSpeed compile (once per machine) and load its shared-memory collectives, safe against kills.

    A process killed while it compiles or loads leaves a `lock` file on which torch waits without a word and without
    end (torch/utils/file_baton.py). Every load takes that file, also of what is compiled already, so all of ours happen
    under a kernel lock, which dies with its holder: a `lock` found under it is stale. Later loads in this process take
    neither.

    Raises:
        UserError: it may not be written where torch keeps such operators.
    """
    from torch.utils.cpp_extension import _get_build_directory

    name = "deepspeed_shm_comm"
    try:
        folder = Path(_get_build_directory(name, False))
        with (folder.parent / f".{name}.launcher-lock").open("w") as own_lock:
            fcntl.flock(own_lock, fcntl.LOCK_EX)
            (folder / "lock").unlink(missing_ok=True)
            from deepspeed.comm.torch import build_shm_op

            if not (folder / f"{name}.so").is_file():
                print("DeepSpeed compiles an operator, once on this machine: about 30 s", file=sys.stderr, flush=True)
            with contextlib.redirect_stdout(io.StringIO()):  # it prints that an operator was built
                build_shm_op()
    except OSError as error:
        raise UserError(
            f"ZeRO on a CPU needs an operator that DeepSpeed compiles, and there is no place for it: {error}. Set "
            "TORCH_EXTENSIONS_DIR=FOLDER, or train with strategy=ddp"
        ) from error
