"""What all processes write together covers every byte of a checkpoint once, and is read back at any other size."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from launcher.base import files
from launcher.base.block_io import BLOCK_BYTES
from launcher.base.errors import DamagedCheckpointError
from launcher.base.stored import StoredTensor
from launcher.checkpoint import snapshot
from launcher.checkpoint.load import TensorFiles, load_trained_state
from launcher.checkpoint.segments import (
    ParamInfo,
    Segment,
    TrainedState,
    collect,
    cut_all,
    row_extents,
)
from launcher.checkpoint.snapshot import OPTIMIZER_STEM, TORCH_DTYPES, SnapshotPlan, plan_snapshot

_EXPERTS = "experts.gate_up_proj"
_SHAPES = {"embed.weight": (64, 128), _EXPERTS: (3, 8, 5), "norm.weight": (2,), "head.weight": (7, 11)}
_STORED = {
    _EXPERTS: tuple(
        StoredTensor(f"experts.{e}.{name}.weight", (4, 5), e * 40 + i * 20)
        for e in range(3)
        for i, name in enumerate(("gate_proj", "up_proj"))
    ),
    "bias": (StoredTensor("bias", (3,), 0, "F32"),),
    "counts": (StoredTensor("counts", (2,), 0),),
}
_SAVED = {"groups": [{"group": g, "params": [], "scalars": {}, "settings": {}} for g in (0, 1)]}


class _Module(torch.nn.Module):
    def __init__(self, values: dict[str, Tensor]) -> None:
        super().__init__()
        for name, value in values.items():
            module = self
            *path, last = name.split(".")
            for part in path:
                if not hasattr(module, part):
                    module.add_module(part, torch.nn.Module())
                module = getattr(module, part)
            module.register_parameter(last, torch.nn.Parameter(value))
        self.register_parameter("bias", torch.nn.Parameter(torch.arange(3.0) + 0.1, requires_grad=False))
        self.register_buffer("counts", torch.tensor([3, 4]))


@dataclass
class _Process:
    state: TrainedState
    module: _Module
    rank: int

    def plan(self) -> SnapshotPlan:
        return plan_snapshot(
            self.state, self.module, dtype=torch.bfloat16, weights_stem="model", stored=_STORED, only_model=False,
            rank=self.rank,
        )  # fmt: skip


def _values(slot: str) -> dict[str, Tensor]:
    """The whole tensors of a state; no two elements alike."""
    seed = {"master": 0.5, "exp_avg": 1000.5, "exp_avg_sq": 3000.5}[slot]
    found, start = {}, 0
    for name, shape in _SHAPES.items():
        found[name] = torch.arange(start, start + math.prod(shape)).view(shape) / 7 + seed
        start += math.prod(shape)
    return found


def _replicated(rank: int, world_size: int, fill: bool = True) -> _Process:
    module = _Module({n: v if fill else torch.zeros_like(v) for n, v in _values("master").items()})
    params = dict(module.named_parameters())
    groups = [[params[n] for n in _SHAPES if (n == "norm.weight") == is_norm] for is_norm in (False, True)]
    optimizer = torch.optim.AdamW([{"params": g} for g in groups])
    if fill:
        for slot in ("exp_avg", "exp_avg_sq"):
            for name, value in _values(slot).items():
                optimizer.state[params[name]][slot] = value
    return _Process(collect(module, optimizer, rank=rank, world_size=world_size), module, rank)


def _zero3(rank: int, world_size: int, fill: bool = True) -> _Process:
    """As under DeepSpeed, with memory that nobody has set in the padding."""
    module = _Module({n: torch.zeros(shape) for n, shape in _SHAPES.items()})
    optimizer = torch.optim.AdamW([{"params": [torch.nn.Parameter(torch.zeros(1))]} for _ in range(2)])
    infos = [ParamInfo(n, shape, int(n == "norm.weight")) for n, shape in _SHAPES.items()]
    segments = []
    for i, names in enumerate((["embed.weight", _EXPERTS], ["head.weight"], ["norm.weight"])):
        found = [(p, -(-p.numel // world_size)) for p in infos if p.name in names]
        partition = cut_all(str(i), found, world_size)
        extents = row_extents(partition, rank)
        flats = {}
        for slot in ("master", "exp_avg", "exp_avg_sq"):
            flats[slot] = torch.full((sum(width for _, width in found),), math.nan)
            for e in extents if fill else ():
                flats[slot][e.offset : e.offset + e.numel] = _values(slot)[e.param].view(-1)[
                    e.start : e.start + e.numel
                ]
        master = flats.pop("master")
        if fill:
            optimizer.state[master] = flats
        segments.append(Segment(master, optimizer, int(i == 2), extents, extents, master, partition))
    whole = collect(
        module, torch.optim.SGD([p for p in module.parameters() if p.requires_grad]), rank=rank, world_size=world_size
    )
    return _Process(TrainedState(tuple(infos), tuple(segments), optimizer, "zero3", frozen=whole.frozen), module, rank)


_MAKERS = {"replicated": _replicated, "zero3": _zero3}


def _save(folder: Path, kind: str, world_size: int) -> list[SnapshotPlan]:
    """As the writers do, and checks that every byte is written once."""
    (folder / "state").mkdir(parents=True)
    plans = []
    written: dict[str, Tensor] = {}
    for rank in range(world_size):
        plan = _MAKERS[kind](rank, world_size).plan()
        plans.append(plan)
        buffer = torch.full((plan.buffer_bytes,), 255, dtype=torch.uint8)
        snapshot.take(plan.copies, buffer)
        for layout in plan.files:
            counts = written.setdefault(layout.path, torch.zeros(layout.num_bytes, dtype=torch.uint8))
            path = folder / layout.path
            with path.open("r+b" if path.exists() else "w+b") as file:
                parts = [(o, bytes(buffer[b : b + n].numpy())) for p, o, b, n in plan.ranges if p == layout.path]
                for offset, data in [*parts, *([(0, layout.header)] if layout.path in plan.heads else [])]:
                    file.seek(offset)
                    file.write(data)
                    counts[offset : offset + len(data)] += 1
        for name, text in plan.texts.items():
            (folder / name).write_text(text)
    assert all(bool((counts == 1).all()) for counts in written.values())
    assert all(plan.files == plans[0].files for plan in plans)
    return plans


@pytest.mark.parametrize("kind", _MAKERS)
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_checkpoint_is_whole_when_written_by_any_number_of_processes(
    tmp_path: Path, kind: str, world_size: int
) -> None:
    _save(tmp_path, kind, world_size)
    weights = load_file(tmp_path / "model.safetensors")
    expected = {n: v.bfloat16() for n, v in _values("master").items()}
    for part in _STORED[_EXPERTS]:
        flat = expected[_EXPERTS].view(-1)
        expected[part.name] = flat[part.start : part.start + part.numel].view(part.shape)
    del expected[_EXPERTS]
    expected |= {"bias": torch.arange(3.0) + 0.1, "counts": torch.tensor([3, 4])}
    assert {n: (t.dtype, t.shape) for n, t in weights.items()} == {n: (t.dtype, t.shape) for n, t in expected.items()}
    assert [n for n in expected if not weights[n].equal(expected[n])] == []
    assert all(t.isfinite().all() for t in load_file(tmp_path / "state/optimizer.safetensors").values())
    stored = TensorFiles(tmp_path, OPTIMIZER_STEM)
    for slot in ("master", "exp_avg", "exp_avg_sq"):
        for name, value in _values(slot).items():
            found = torch.empty(value.shape)
            stored.read_into(f"{slot}.{name}", 0, found.view(-1))
            assert found.equal(value)
    assert len(stored.specs) == 12


def test_state_loads_into_the_masters_of_a_device(tmp_path: Path) -> None:
    """DeepSpeed's masters are leaves that want gradients; on a device they are copied to, not read into."""
    _save(tmp_path, "zero3", 2)
    process = _zero3(0, 1, False)
    segments = []
    for segment in process.state.segments:
        master = torch.empty(segment.master.shape, device="meta", requires_grad=True)
        segments.append(replace(segment, master=master, key=master))
    state = replace(process.state, segments=tuple(segments))
    load_trained_state(state, process.module, tmp_path, _SAVED, weights_stem="model", stored=_STORED)
    assert all(s.master.is_leaf and s.master.requires_grad and len(s.elementwise()) == 2 for s in segments)
    assert not any(t.requires_grad for s in segments for t in s.elementwise().values())


@pytest.mark.parametrize("source", [("replicated", 3), ("zero3", 1), ("zero3", 3), ("zero3", 4)])
@pytest.mark.parametrize("target", [("replicated", 1), ("zero3", 2), ("zero3", 3), ("zero3", 5)])
def test_state_is_the_same_when_loaded_at_another_size(
    tmp_path: Path, source: tuple[str, int], target: tuple[str, int]
) -> None:
    _save(tmp_path / "first", *source)
    for rank in range(target[1]):
        process = _MAKERS[target[0]](rank, target[1], False)
        with torch.no_grad():
            process.module.bias.zero_()  # type: ignore[operator]
        load_trained_state(
            process.state, process.module, tmp_path / "first", _SAVED, weights_stem="model", stored=_STORED
        )
        for segment in process.state.segments:
            for slot, flat in {"master": segment.master, **segment.elementwise()}.items():
                for e in segment.extents:
                    part = _values(slot)[e.param].view(-1)[e.start : e.start + e.numel]
                    assert flat[e.offset : e.offset + e.numel].equal(part)
            assert len(segment.elementwise()) == 2
        assert process.module.bias.tolist() == pytest.approx([0.1, 1.1, 2.1])


def test_process_writes_one_run_of_whole_blocks_of_the_states_when_under_zero3(tmp_path: Path) -> None:
    for plan in _save(tmp_path, "zero3", 4):
        ranges = [r for r in plan.ranges if r[0].startswith("state/")]
        assert len(ranges) == 1
        assert ranges[0][1] % BLOCK_BYTES == ranges[0][2] % BLOCK_BYTES == ranges[0][3] % BLOCK_BYTES == 0
    assert sum(len(plan.heads) for plan in _save(tmp_path / "again", "zero3", 4)) == 2


@pytest.mark.parametrize("kind", ["replicated", "zero3"])
def test_only_files_of_the_manifest_are_read_when_others_lie_beside_them(tmp_path: Path, kind: str) -> None:
    """Files of other values under names that are looked for first, shards and an index."""
    folder, other = tmp_path / "checkpoint", tmp_path / "other"
    for target in (folder, other):
        _save(target, kind, 3)
    for old, new in {"model": "model-00001-of-00001", "state/optimizer": "state/optimizer-00001-of-00001"}.items():
        (folder / f"{old}.safetensors").rename(folder / f"{new}.safetensors")
    index = folder / f"{OPTIMIZER_STEM}.safetensors.index.json"
    if index.is_file():
        index.write_text(index.read_text().replace('"optimizer.safetensors"', '"optimizer-00001-of-00001.safetensors"'))
    listed = set(files.list_files(folder))
    expected = {name: _read(TensorFiles(folder, stem, listed), name) for stem, name in _ONE_OF_EACH.items()}

    for name in ("model.safetensors", "state/optimizer.safetensors"):
        zeros = {key: torch.zeros_like(value) for key, value in load_file(other / name).items()}
        save_file(zeros, folder / name)
        save_file(zeros, folder / name.replace(".safetensors", "-00000-of-00001.safetensors"))
    if not index.is_file():
        index.write_text('{"weight_map": {}, "partitions": {"p": 7}}')
    found = {name: _read(TensorFiles(folder, stem, listed), name) for stem, name in _ONE_OF_EACH.items()}
    assert all(found[name].equal(expected[name]) for name in expected)
    assert all(tensor.any() for tensor in found.values())


@pytest.mark.parametrize("listed", [None, {"model.safetensors"}])
def test_a_link_is_refused_when_it_takes_the_place_of_a_file_that_is_loaded(
    tmp_path: Path, listed: set[str] | None
) -> None:
    _save(tmp_path / "checkpoint", "replicated", 1)
    path = tmp_path / "checkpoint/model.safetensors"
    stored = TensorFiles(path.parent, "model", listed)
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DamagedCheckpointError, match="is a link"):
        _read(stored, "bias")  # checked when it was opened for its header, and swapped before its data was read
    with pytest.raises(DamagedCheckpointError, match="is a link"):
        TensorFiles(path.parent, "model", listed)
    assert _read(TensorFiles(path.parent, "model", follow_links=True), "bias").numel() == 3  # the user's own folder


_ONE_OF_EACH = {"model": "bias", OPTIMIZER_STEM: "exp_avg.embed.weight"}


def _read(stored: TensorFiles, name: str) -> torch.Tensor:
    spec = stored.specs[name]
    found = torch.empty(spec.shape, dtype=TORCH_DTYPES[spec.dtype])
    stored.read_into(name, 0, found.view(-1))
    stored.close()
    return found
