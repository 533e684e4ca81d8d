"""What a forward and backward pass holds beside parameters and gradients: run on tensors without memory, for one layer
of each kind and one more, and extrapolated to all of them.

Everything is linear in the number of layers and, but for the chunked head, in the micro-batch: layers are alike, and
rows do not meet. What is counted are the bytes of all storages that are alive at once, as an allocator would.
"""

from __future__ import annotations

import contextlib
import logging
import math
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from launcher.base.errors import UserError
from launcher.base.targets import Targets
from launcher.model._transformers import plain_experts
from launcher.model.fused_head import AfterHead, chunk_positions, chunks_of, maybe_fuse_head
from launcher.model.loss import summed_loss


@dataclass(frozen=True)
class Pass:
    """Bytes at their highest, gradients of parameters left out: until the first of those is there, after it, while the
    last ones are made, and in the forward pass of the layers, before the head."""

    before: float
    after: float
    end: float
    layers: float

    def __add__(self, other: Pass) -> Pass:
        return Pass(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def __sub__(self, other: Pass) -> Pass:
        return self + other * -1

    def __mul__(self, factor: float) -> Pass:
        return Pass(*(value * factor for value in astuple(self)))


class _Tracker(TorchDispatchMode):
    """Follows the storages that operations make."""

    def __init__(self, known: Sequence[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._alive: dict[int, int] = {}
        self._known = {_key(tensor) for tensor in known}
        self._watched: list[Any] = []
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor):
                self._see(value)
        return result

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = _key(tensor)
        if key in self._alive or key in self._known:
            return
        self._alive[key] = storage.nbytes()
        self.now += self._alive[key]
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, key)

    def _gone(self, key: int) -> None:
        self.now -= self._alive.pop(key, 0)

    def forget(self, tensor: Tensor) -> None:
        """Counts it no longer: it is somebody else's."""
        self._gone(_key(tensor))

    def restart(self) -> int:
        """The peak so far; the next one begins now."""
        peak, self.peak = self.peak, self.now
        return peak


def _key(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


class _StaticShapes(TorchFunctionMode):
    """Operations whose result's size depends on values give the largest: every position is labelled."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__getitem__ and isinstance(args[1], Tensor) and args[1].dtype == torch.bool:
            mask, tensor = args[1], args[0]
            count = mask.numel()
            flat = tensor.reshape(count, *tensor.shape[mask.dim() :])
            return flat.index_select(0, torch.zeros(count, dtype=torch.long, device=tensor.device))
        return func(*args, **(kwargs or {}))


class ActivationModel:
    """The passes of one model in one precision. Several of these may share a model: each casts it as it needs it.

    Args:
        model: without memory. All but the layers that are looked at are taken out of it, for good.
        trained_dtype, frozen_dtype: of the parameters in memory; None: as they are stored.
        autocast: the dtype of Accelerate's mixed precision, or None. Under it the outputs are widened to fp32.
        is_packed: the batch has positions and no padding.
    """

    def __init__(
        self, model: SampledLayers, *, trained_dtype: torch.dtype, frozen_dtype: torch.dtype | None,
        autocast: torch.dtype | None, is_packed: bool, num_tokens: int,
    ) -> None:  # fmt: skip
        self._layers, self._model = model, model.module
        self._trained_dtype, self._frozen_dtype = trained_dtype, frozen_dtype
        self._autocast, self._is_packed, self._num_tokens = autocast, is_packed, num_tokens
        # Up to one chunk of the head the logits grow with the batch, from there on they do not: two lines, run at their
        # ends, so that an answer does not depend on what was asked before.
        self._bend = max(2, math.ceil(chunk_positions(model.kind) / num_tokens))
        self._passes: dict[int, Pass] = {}

    def at(self, batch: int) -> Pass:
        """For a micro-batch of so many rows."""
        first, second = (1, self._bend) if batch <= self._bend else (self._bend, 2 * self._bend)
        if batch in (first, second):
            return self._run_once(batch)
        slope = (self._run_once(second) - self._run_once(first)) * (1 / (second - first))
        return self._run_once(first) + slope * (batch - first)

    def _run_once(self, batch: int) -> Pass:
        if batch not in self._passes:
            self._passes[batch] = self._all_layers(batch)
        return self._passes[batch]

    def _all_layers(self, batch: int) -> Pass:
        with self._layers.fake:
            self._cast()
        base = total = self._run(self._layers.firsts, batch)
        for second, count in self._layers.repeated:
            total = total + (self._run(sorted([*self._layers.firsts, second]), batch) - base) * count
        return total

    def _cast(self) -> None:
        for param in self._model.parameters():
            wanted = self._trained_dtype if param.requires_grad else self._frozen_dtype
            if wanted is not None and param.dtype != wanted and param.is_floating_point():
                param.data = torch.empty(param.shape, dtype=wanted)

    def _run(self, layers: Sequence[int], batch: int) -> Pass:
        log = logging.getLogger("torch._subclasses.fake_tensor")
        before, log.disabled = log.disabled, True  # it writes a traceback of its own
        try:
            with self._layers.only(layers), self._layers.fake:
                return self._measured(batch)
        except (RuntimeError, NotImplementedError, TypeError, ValueError, AttributeError) as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise UserError(
                f"{self._model.config.model_type} cannot be planned: its forward pass does not run without values "
                f"({reason:.200}). Train one step to see what it needs: launcher train train.max_steps=1 …"
            ) from error
        finally:
            log.disabled = before

    def _measured(self, batch: int) -> Pass:
        model = self._model
        trained = [param for param in model.parameters() if param.requires_grad]
        inputs = self._batch(batch)
        tracker = _Tracker([*model.parameters(), *model.buffers(), *tree_leaves(inputs)])
        peaks: list[int] = []

        def took(param: Tensor) -> None:
            peaks.append(tracker.restart())
            assert param.grad is not None
            tracker.forget(param.grad)
            param.grad = None

        in_layers = [0]
        hooks = [param.register_post_accumulate_grad_hook(took) for param in trained]
        if (owner := self._layers.owner) is not None:
            hooks.append(owner.register_forward_hook(lambda *_: in_layers.append(tracker.peak)))
        try:
            with tracker, _StaticShapes(), self._precision(), chunks_of(self._layers.kind), plain_experts():
                loss = summed_loss(self._called, inputs, is_fused=self._layers.is_fused).loss_sum
                loss.backward()
                del loss
        finally:
            for hook in hooks:
                hook.remove()
        last = tracker.restart()
        after = max([*peaks[1:], last])
        return Pass(peaks[0], after, max([*peaks[-1:], last]) if len(peaks) > 1 else last, in_layers[-1])

    @property
    def _called(self) -> Any:
        if self._autocast is None:
            return self._model
        from accelerate.utils.operations import convert_to_fp32

        return lambda **inputs: convert_to_fp32(self._model(**inputs))

    @contextlib.contextmanager
    def _precision(self) -> Iterator[None]:
        if self._autocast is None:
            yield
            return
        with torch.autocast("cpu", dtype=self._autocast):
            yield

    def _batch(self, batch: int) -> dict[str, Any]:
        """Every position is labelled."""
        shape = (1, batch * self._num_tokens) if self._is_packed else (batch, self._num_tokens)
        ids, labelled = torch.zeros(shape, dtype=torch.long), torch.zeros(shape[0] * (shape[1] - 1), dtype=torch.long)
        found = {"input_ids": ids, "targets": Targets(labelled, labelled)}
        if self._is_packed:
            return {**found, "position_ids": torch.zeros(shape, dtype=torch.long)}
        return {**found, "attention_mask": torch.ones(shape, dtype=torch.long)}


class SampledLayers:
    """A model on the meta device that keeps one or two layers of each kind, made one of tensors without memory.

    Args:
        is_fused: head and loss are one operation.
        kind: of the device that is planned for.
    """

    def __init__(self, model: Any, *, is_fused: bool, kind: str) -> None:
        from torch._subclasses.fake_tensor import FakeTensorMode

        self.module, self.fake, self.kind = model, FakeTensorMode(allow_non_fake_inputs=True), kind
        self._config = model.config.get_text_config()
        self._types = getattr(self._config, "layer_types", None)
        self.owner, self._name, layers = self._find()
        """The module that calls the layers."""
        kinds: dict[object, list[int]] = {}
        for i, layer in enumerate(layers):
            kinds.setdefault(self._kind(i, layer), []).append(i)
        self.firsts = sorted(kind[0] for kind in kinds.values())
        """One layer of each kind."""
        self.repeated = [(kind[1], len(kind) - 1) for kind in kinds.values() if len(kind) > 1]
        """(a second one, how many there are beside the first) of each kind that has several."""
        self._kept = {i: layers[i] for i in [*self.firsts, *(second for second, _ in self.repeated)]}
        if self.owner is not None:
            setattr(self.owner, self._name, nn.ModuleList(self._kept.values()))
        with self.fake:
            model.to_empty(device="cpu")
            base = (
                model.get_base_model() if hasattr(model, "peft_config") and hasattr(model, "get_base_model") else model
            )
            self.is_fused = is_fused and maybe_fuse_head(base, torch.device("cpu"), AfterHead())
        model.train()

    def _find(self) -> tuple[nn.Module | None, str, nn.ModuleList]:
        """The module that has the list of layers, its name there, and the list."""
        found = [
            (module, name, child) for module in self.module.modules() for name, child in module.named_children()
            if isinstance(child, nn.ModuleList)
        ]  # fmt: skip
        wanted = getattr(self._config, "num_hidden_layers", None)
        fitting = [entry for entry in found if len(entry[2]) == wanted] or found
        nothing = (None, "", nn.ModuleList())
        return max(fitting, key=lambda entry: sum(p.numel() for p in entry[2].parameters()), default=nothing)

    def _kind(self, index: int, layer: nn.Module) -> object:
        layer_type = self._types[index] if isinstance(self._types, list) and index < len(self._types) else None
        shapes = tuple((name, tuple(p.shape), p.dtype, p.requires_grad) for name, p in layer.named_parameters())
        return layer_type, tuple(type(module).__name__ for module in layer.modules()), shapes

    @contextlib.contextmanager
    def only(self, chosen: Sequence[int]) -> Iterator[None]:
        """The model has these layers alone, and its config says so."""
        if self.owner is None:
            yield
            return
        before = {"num_hidden_layers": len(chosen)}
        if isinstance(self._types, list):
            before["layer_types"] = [self._types[i] for i in chosen]  # type: ignore[assignment]
        before = {name: value for name, value in before.items() if hasattr(self._config, name)}
        restored = {name: getattr(self._config, name) for name in before}
        setattr(self.owner, self._name, nn.ModuleList([self._kept[i] for i in chosen]))
        for name, value in before.items():
            setattr(self._config, name, value)
        try:
            yield
        finally:
            for name, value in restored.items():
                setattr(self._config, name, value)
