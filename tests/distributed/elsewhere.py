"""An optimizer, chosen by `optim.name`, whose run saves and loads by hand through Accelerate's own calls.

After the fourth step: `save_state(SAVE_TO)`, then `load_state(SAVE_TO)` of what was just saved.
"""

from __future__ import annotations

import os
from typing import Any

from launcher.train import loop
from tests.distributed.faulty import FaultyAdamW


def _train_and_save(run: loop.Run) -> Any:
    agreed = _train(run)
    if run.step == 4:
        run.train_step.accelerator.save_state(os.environ["SAVE_TO"])
        result = run.saver.checkpointer.wait()
        assert result is not None and result.error is None, result
        run.train_step.accelerator.load_state(os.environ["SAVE_TO"])
    return agreed


_train, loop.train = loop.train, _train_and_save


class ElsewhereAdamW(FaultyAdamW):
    """AdamW; importing it has done the rest."""
