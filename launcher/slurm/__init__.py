"""Runs as Slurm jobs: render, submit, and what the job itself asks once its ranks have ended. Imports no torch."""

from launcher.slurm.queue import cancel, live_jobs
from launcher.slurm.submit import ArrayJob, Submission, render_arrays, render_run, submit_array, submit_run

__all__ = ["ArrayJob", "Submission", "cancel", "live_jobs", "render_arrays", "render_run", "submit_array", "submit_run"]
