"""What a start does not need is not imported: each of these costs every start of every process a second or so."""

from __future__ import annotations

import subprocess
import sys

_START = """
import sys
from launcher.train import rank_setup
rank_setup.before_imports()
import torch
from launcher.config.compose import compose
from launcher.model.optim import Schedule, build_optimizer
from launcher.train import build, evaluation, finish, loop
from launcher.train.accelerator import build_accelerator
config = compose(["strategy=single", "launch.num_processes=1", "tracker=off", "output_dir=unused"])
accelerator = build_accelerator(config)
module = torch.nn.Linear(2, 2)
optimizer = build_optimizer(config, module)
Schedule(config, optimizer, 10)
model, optimizer = accelerator.prepare(module, optimizer)
assert accelerator.unwrap_model(model) is module
print(sorted({"peft", "bitsandbytes", "deepspeed", "datasets", "pandas", "torch._inductor.compile_fx",
              "transformers.trainer_utils", "optuna", "wandb"} & set(sys.modules)))
"""


def test_a_start_imports_neither_peft_nor_deepspeed_when_it_uses_neither() -> None:
    done = subprocess.run([sys.executable, "-c", _START], capture_output=True, text=True, timeout=300, check=False)
    assert done.stdout.splitlines()[-1:] == ["[]"], done.stdout + done.stderr[-2000:]
