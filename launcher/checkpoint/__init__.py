"""Checkpoints that cannot be lost: snapshot, write, commit, retain, verify, resume.

Kept free of imports: the writer process starts from this package with the standard library alone.
"""
