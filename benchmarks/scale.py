"""What a save of a large model makes each process write, by simulation: no process, no GPU and no memory for weights.

    python benchmarks/scale.py

The plan of a process is made from the shapes of Llama models under ZeRO-3 in bfloat16 with AdamW, as `plan_snapshot`
makes it in a run. A block written by more than one process is one that two machines may fight over; an edge is a part
of a range that does not fill its block.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch

from launcher.base.block_io import BLOCK_BYTES
from launcher.checkpoint.segments import ParamInfo, Segment, TrainedState, cut_all, row_extents
from launcher.checkpoint.snapshot import SnapshotPlan, plan_snapshot

_SUB_GROUP_NUMEL = 10**9
"""DeepSpeed's default sub_group_size: elements of one process."""


@dataclass(frozen=True)
class Llama:
    name: str
    num_processes: int
    hidden: int
    intermediate: int
    num_layers: int
    num_kv_heads: int
    vocab: int

    def params(self) -> list[ParamInfo]:
        """In the optimizer's two groups: matrices with weight decay, norms without."""
        kv = self.num_kv_heads * 128
        found = [ParamInfo("model.embed_tokens.weight", (self.vocab, self.hidden), 0)]
        for i in range(self.num_layers):
            for name, rows, columns in (
                ("self_attn.q_proj", self.hidden, self.hidden), ("self_attn.k_proj", kv, self.hidden),
                ("self_attn.v_proj", kv, self.hidden), ("self_attn.o_proj", self.hidden, self.hidden),
                ("mlp.gate_proj", self.intermediate, self.hidden), ("mlp.up_proj", self.intermediate, self.hidden),
                ("mlp.down_proj", self.hidden, self.intermediate),
            ):  # fmt: skip
                found.append(ParamInfo(f"model.layers.{i}.{name}.weight", (rows, columns), 0))
            for name in ("input_layernorm", "post_attention_layernorm"):
                found.append(ParamInfo(f"model.layers.{i}.{name}.weight", (self.hidden,), 1))
        found.append(ParamInfo("model.norm.weight", (self.hidden,), 1))
        found.append(ParamInfo("lm_head.weight", (self.vocab, self.hidden), 0))
        return found


MODELS = (
    Llama("7B", 8, 4096, 11008, 32, 32, 32000),
    Llama("70B", 64, 8192, 28672, 80, 8, 128256),
    Llama("405B", 512, 16384, 53248, 126, 8, 128256),
)


def state_of(model: Llama, rank: int) -> TrainedState:
    """What `segments.collect` finds in a process under ZeRO-3, with tensors that have a shape only."""
    params, segments, count = model.params(), [], 0
    optimizer = torch.optim.AdamW([{"params": [torch.nn.Parameter(torch.empty(1, device="meta"))]} for _ in range(2)])
    for group in (0, 1):
        sub_groups: list[list[tuple[ParamInfo, int]]] = [[]]
        for info in (p for p in params if p.group == group):
            if sum(width for _, width in sub_groups[-1]) >= _SUB_GROUP_NUMEL:
                sub_groups.append([])
            sub_groups[-1].append((info, -(-info.numel // model.num_processes)))
        for found in sub_groups:
            partition = cut_all(str(count), found, model.num_processes)
            master = torch.empty(sum(width for _, width in found), device="meta")
            optimizer.state[master] = {"exp_avg": torch.empty_like(master), "exp_avg_sq": torch.empty_like(master)}
            extents = row_extents(partition, rank)
            segments.append(Segment(master, optimizer, group, extents, extents, master, partition))
            count += 1
    return TrainedState(tuple(params), tuple(segments), optimizer, f"zero3 x {model.num_processes}")


def plan_of(model: Llama, rank: int) -> SnapshotPlan:
    return plan_snapshot(
        state_of(model, rank), torch.nn.Module(), dtype=torch.bfloat16, weights_stem="model", stored={},
        only_model=False, rank=rank,
    )  # fmt: skip


def num_edges(plan: SnapshotPlan) -> int:
    found = 0
    for _, offset, _, num_bytes in plan.ranges:
        found += (offset % BLOCK_BYTES != 0) + ((offset + num_bytes) % BLOCK_BYTES != 0)
    return found


def num_shared_blocks(model: Llama, ranks: list[int]) -> int:
    """Blocks that the first of these processes and another of them both write into."""
    blocks = [
        {
            (path, block)
            for path, offset, _, num_bytes in plan_of(model, rank).ranges
            for block in (offset // BLOCK_BYTES, (offset + num_bytes - 1) // BLOCK_BYTES)
        }
        for rank in ranks
    ]
    return len(blocks[0] & set().union(*blocks[1:]))


def measure(model: Llama) -> dict[str, Any]:
    rank = model.num_processes // 2
    started = time.perf_counter()
    plan = plan_of(model, rank)
    seconds = time.perf_counter() - started
    sizes = sorted(num_bytes for *_, num_bytes in plan.ranges)
    kinds = Counter("state" if path.startswith("state/") else "model" for path, *_ in plan.ranges)
    command = json.dumps({"files": {f.path: f.num_bytes for f in plan.files}, "ranges": plan.ranges})
    return {
        "model": model.name,
        "processes": model.num_processes,
        "files": len(plan.files),
        "files_opened": len({path for path, *_ in plan.ranges} | set(plan.heads)),
        "files_truncated": len(plan.heads),
        "ranges_model": kinds["model"],
        "ranges_state": kinds["state"],
        "edges": num_edges(plan),
        "shared_blocks": num_shared_blocks(model, [rank, rank - 1, rank + 1]),
        "copies": len(plan.copies),
        "median_range_bytes": sizes[len(sizes) // 2],
        "largest_range_bytes": sizes[-1],
        "bytes": sum(sizes),
        "total_bytes": plan.total_bytes,
        "plan_s": round(seconds, 2),
        "command_bytes": len(command),
    }


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    for model in MODELS:
        print(json.dumps(measure(model)))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps({"peak_memory_mb": peak // 1024}))


if __name__ == "__main__":
    main()
