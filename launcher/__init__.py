"""Fine-tune language models on many GPUs and never lose a run."""

__version__ = "0.1.0"
