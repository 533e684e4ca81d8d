"""What is used of other libraries that is not their public interface is still there, and means what it meant.

Seen with torch 2.13, transformers 5.23.0, accelerate 1.15.0, deepspeed 0.19.8. Where one of these fails after an
upgrade, the module that it names is the one to look at; pyproject.toml must not let in a version that fails.
"""

from __future__ import annotations

import importlib
import inspect
import re
from pathlib import Path

import pytest
import torch

_NAMES = {
    "launcher/model/_transformers.py": [
        "transformers.integrations.deepspeed:_hf_deepspeed_config_weak_ref",
        "transformers.integrations.deepspeed:unset_hf_deepspeed_config",
        "transformers.initialization:no_init_weights",
        "transformers.masking_utils:fast_all",
        "transformers.masking_utils:find_packed_sequence_indices",
        "transformers.masking_utils:flash_attention_mask",
        "transformers.core_model_loading:revert_weight_conversion",
        "transformers.core_model_loading:build_glob_alternation",
        "transformers.modeling_utils:remove_tied_weights_from_state_dict",
        "transformers.quantizers.quantizers_utils:should_convert_module",
        "transformers.modeling_utils:PreTrainedModel._from_config",
        "transformers.modeling_utils:PreTrainedModel._get_dtype_plan",
        "transformers.modeling_utils:PreTrainedModel._keys_to_ignore_on_save",
    ],
    "launcher/base/_deepspeed.py": [
        "deepspeed.runtime.zero.partition_parameters:Init._zero_init_param",
        "deepspeed.runtime.zero.partition_parameters:Init._convert_to_deepspeed_param",
        "deepspeed.runtime.zero.stage3:DeepSpeedZeroOptimizer_Stage3._reassign_or_swap_out_partitioned_parameters",
        "deepspeed.comm.torch:build_shm_op",
        "torch.utils.cpp_extension:_get_build_directory",
    ],
}


@pytest.mark.parametrize(
    ("used_by", "name"), [(used_by, name) for used_by, names in _NAMES.items() for name in names]
)  # fmt: skip
def test_private_name_is_there(used_by: str, name: str) -> None:
    module, _, path = name.partition(":")
    value = importlib.import_module(module)
    for attribute in path.split("."):
        assert hasattr(value, attribute), f"{name} is gone; {used_by} uses it"
        value = getattr(value, attribute)


@pytest.mark.parametrize(
    ("cls", "attributes"),
    [
        ("stage_1_and_2:DeepSpeedZeroOptimizer", ("single_partition_of_fp32_groups", "round_robin_bit16_groups",
                                                  "round_robin_bit16_offsets", "optimizer", "loss_scaler")),
        ("stage3:DeepSpeedZeroOptimizer_Stage3", ("fp32_partitioned_groups_flat", "fp16_groups",
                                                  "sub_group_to_group_id", "persistent_parameters", "optimizer",
                                                  "loss_scaler")),
    ],
)  # fmt: skip
def test_zero_optimizers_have_the_attributes_that_state_is_read_from(cls: str, attributes: tuple[str, ...]) -> None:
    """launcher/base/_deepspeed.py; made in __init__, so looked for in the source."""
    module, _, name = cls.partition(":")
    source = inspect.getsource(getattr(importlib.import_module(f"deepspeed.runtime.zero.{module}"), name))
    assert [a for a in attributes if f"self.{a}" not in source] == []


def test_partitioned_parameters_have_the_attributes_that_state_is_read_from() -> None:
    source = inspect.getsource(importlib.import_module("deepspeed.runtime.zero.partition_parameters"))
    for name in ("param.ds_id", "param.ds_shape", "param.ds_tensor", "param.ds_tensor.ds_numel"):
        assert f"{name} = " in source, name


def test_adam_of_the_host_takes_a_step_as_it_is_given_one_of_nothing() -> None:
    """launcher/base/_deepspeed.py, forget_powers; the native part is built only where it is used."""
    module = importlib.import_module("deepspeed.ops.adam.cpu_adam")
    source = " ".join(inspect.getsource(module.DeepSpeedCPUAdam.step).split())
    assert (
        "self.ds_opt_adam.adam_update(self.opt_id, state['step'], group['lr'], beta1, beta2, group['eps'], "
        "group['weight_decay'], group['bias_correction'], p.data, p.grad.data, state['exp_avg'], state['exp_avg_sq'])"
    ) in source
    header = (Path(module.__file__ or "").parents[1] / "csrc/includes/cpu_adam.h").read_text()
    assert "if (step == _step + 1)" in header and header.count("_betta1_t = std::pow(_betta1, step)") == 2


def test_private_names_of_deepspeed_are_in_one_module_only() -> None:
    """Its public interface is imported by launcher/train/accelerator.py through Accelerate; nothing else is used."""
    private = re.compile(
        r"\bds_(id|shape|tensor|numel)\b|fp32_partitioned_groups|single_partition_of_fp32|bit16_groups"
    )
    root = Path(__file__).parents[2] / "launcher"
    foreign = {"saving/interop/zero_shards.py"}  # another tool's files, which hold these names
    found = {
        str(path.relative_to(root)) for path in root.rglob("*.py")
        if private.search(path.read_text()) or re.search(r"^\s*(from|import) deepspeed", path.read_text(), re.M)
    }  # fmt: skip
    assert found - foreign == {"base/_deepspeed.py"}


def test_ddp_rebuilds_no_buckets_when_it_looks_for_unused_parameters() -> None:
    """launcher/train/accelerator.py relies on it: with rebuilt buckets a resumed run sums in another order."""
    import torch.distributed as dist

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        rebuilt = {}
        for find in (False, True):
            model = torch.nn.Sequential(*(torch.nn.Linear(8, 8) for _ in range(3)))
            ddp = torch.nn.parallel.DistributedDataParallel(model, find_unused_parameters=find)
            for _ in range(3):
                ddp(torch.ones(1, 8)).sum().backward()
            rebuilt[find] = bool(ddp._get_ddp_logging_data().get("has_rebuilt_buckets"))
        assert rebuilt == {False: True, True: False}
    finally:
        dist.destroy_process_group()


def test_peft_collects_rows_of_tokens_where_it_is_replaced() -> None:
    from peft.tuners.trainable_tokens import TrainableTokensLayer

    parameters = inspect.signature(TrainableTokensLayer._collect_token_weights).parameters
    assert list(parameters) == ["self", "weight", "rows", "embed_dim"]


def test_a_four_bit_layer_keeps_its_weights_when_it_is_evaluated() -> None:
    """launcher/model/_bitsandbytes.py; on a processor with AVX512-BF16 it would not, without that."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    from launcher.model._bitsandbytes import REPACKS, keep_weights

    torch.manual_seed(0)
    for width in (32, 64, 128):  # narrower than a block of scales, as wide, wider
        layer = bitsandbytes.nn.Linear4bit(
            width, 128, bias=False, compress_statistics=True, compute_dtype=torch.float32
        )
        layer.to("cpu")
        assert hasattr(layer, REPACKS)
        keep_weights(layer)
        rows, before = torch.randn(3, width), layer.weight.data.clone()
        expected = layer.train()(rows)
        with torch.no_grad():
            evaluated = layer.eval()(rows)
        assert layer.weight.data.equal(before) and layer.train()(rows).equal(expected)
        torch.testing.assert_close(evaluated, expected, rtol=1e-5, atol=1e-6)
