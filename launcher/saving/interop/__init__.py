"""Checkpoints of others: import from transformers' Trainer, export to it and for serving."""
