"""What is used of bitsandbytes that is not its public interface.

Seen with bitsandbytes 0.50.2; tests/unit/test_private_names.py fails where an upgrade has moved or changed it.
"""

from __future__ import annotations

from torch import nn

REPACKS = "support_avx512bf16_for_cpu"


def keep_weights(model: nn.Module) -> None:
    """Has quantised layers leave their weights as they are.

    On processors with AVX512-BF16 the first evaluation repacks the weights of a 4-bit layer in place and rounds their
    scales to bf16 (bitsandbytes/functional.py, `_convert_weight_packed_for_cpu`): what is trained afterwards would
    depend on whether and when the run was evaluated, and layers narrower than a block of scales cannot be repacked.
    """
    for part in model.modules():
        if hasattr(part, REPACKS):
            setattr(part, REPACKS, False)


def is_quantised(part: nn.Module) -> bool:
    """Whether a layer's weights are quantised."""
    from bitsandbytes.nn.modules import Linear4bit, Linear8bitLt

    return isinstance(part, (Linear4bit, Linear8bitLt))
