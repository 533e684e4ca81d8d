"""Compiles the layers of a model, each in its place, before the first step."""

from __future__ import annotations

import contextlib
import time
from typing import Any

import torch
import torch._dynamo
from torch import nn

from launcher.base.errors import ConfigError
from launcher.config.settings import RunConfig
from launcher.model.attention import unwrapped
from launcher.model.packing_check import borders_of

_LENGTH = 96
"""Tokens of a row that is compiled for. The compiler takes its choices by the first lengths that it sees, so they must
be the same at every start, or a continued run would round in another order."""
_GRAPHS_OF_A_LAYER = 4
"""Compilations that one may need: its first inputs want no gradient, rows have padding or none. The compiler gives up
after eight of a function, in silence, and a model whose layers all differ has one for each of them."""


def check_compiler(device: torch.device) -> None:
    """
    Raises:
        ConfigError: there is nothing to compile with.
    """
    if device.type != "cpu":
        return
    from torch._inductor import cpp_builder, exc

    try:
        cpp_builder.get_cpp_compiler()
    except (exc.InvalidCxxCompiler, RuntimeError, OSError) as error:
        raise ConfigError(
            [
                "train.torch_compile=true needs a C++ compiler on a CPU, and there is none (g++, or what CXX names). "
                "Install one (apt-get install g++), or set train.torch_compile=false"
            ]
        ) from error


def repeated_layers(base: Any) -> list[nn.Module]:
    """The blocks that a model is made of, by the classes that transformers never splits over devices."""
    names = set(base._no_split_modules or ())
    found = [module for module in base.modules() if type(module).__name__ in names]
    inner = {id(child) for module in found for child in module.modules() if child is not module}
    return [module for module in found if id(module) not in inner and any(True for _ in module.parameters())]


def compile_layers(config: RunConfig, model: Any, accelerator: Any, *, is_flat: bool) -> str:
    """Compiles each layer in place, for any length and as the training calls it. Every process must call it.

    The names of parameters stay, and so do checkpoints. Passes without gradients run `uncompiled`.

    Args:
        model: the prepared one.
        is_flat: as `Attention` has it.

    Returns:
        What was compiled, in words.

    Raises:
        ConfigError: there is no compiler, the model has no repeated layers, or its weights are gathered inside of them.
    """
    if config.strategy.zero_stage == 3:  # chosen by strategy=auto
        raise ConfigError([f"train.torch_compile=true is not for strategy={config.strategy.name}, which auto chose"])
    check_compiler(accelerator.device)
    inner, was_training, started = accelerator.unwrap_model(model), model.training, time.monotonic()
    base = unwrapped(inner)
    layers = repeated_layers(base)
    if not layers:
        raise ConfigError(
            [f"train.torch_compile=true: {base.config.model_type} names no layers. Set train.torch_compile=false"]
        )
    limit, before = _GRAPHS_OF_A_LAYER * len(layers), _num_graphs()
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, limit)
    torch._dynamo.config.accumulated_recompile_limit = max(torch._dynamo.config.accumulated_recompile_limit, limit)
    for layer in layers:
        layer.compile(dynamic=True)
    model.train()
    for lengths in [(_LENGTH, _LENGTH // 2)] if is_flat else _padded_shapes(config.train.micro_batch_size):
        with accelerator.autocast():
            inner(**_inputs(lengths, accelerator.device, is_flat=is_flat), use_cache=False)
    model.train(was_training)
    kinds = ", ".join(sorted({type(layer).__name__ for layer in layers}))
    num_graphs, took_s = _num_graphs() - before, time.monotonic() - started
    graphs = f"{num_graphs} graph{'s' if num_graphs != 1 else ''}"
    return f"compiled {len(layers)} layers ({kinds}) as {graphs} in {took_s:.0f} s; later starts use the cache"


def _num_graphs() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def uncompiled(config: RunConfig) -> contextlib.AbstractContextManager[None]:
    """For passes without gradients: a cache of keys has another length for every token, and each would compile."""
    if not config.train.torch_compile:
        return contextlib.nullcontext()
    stance: contextlib.AbstractContextManager[None] = torch.compiler.set_stance("force_eager")
    return stance


def _padded_shapes(micro_batch_size: int) -> list[tuple[int, ...]]:
    """What differs for the compiler: one row or several, with padding or without."""
    several = [(_LENGTH, _LENGTH // 2), (_LENGTH, _LENGTH)] if micro_batch_size > 1 else []
    return [*several, (_LENGTH,)]


def _inputs(lengths: tuple[int, ...], device: torch.device, *, is_flat: bool) -> dict[str, Any]:
    if is_flat:
        positions = torch.cat([torch.arange(length) for length in lengths])[None]
        ids = torch.zeros((1, sum(lengths)), dtype=torch.long)
        return {"input_ids": ids.to(device), "position_ids": positions.to(device), **borders_of(lengths, device)}
    mask = torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]
    ids = torch.zeros(mask.shape, dtype=torch.long)
    return {"input_ids": ids.to(device), "attention_mask": mask.long().to(device)}
