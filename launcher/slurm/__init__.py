"""Runs as Slurm jobs: render, submit, and what the job itself asks once its ranks have ended. Imports no torch."""

from launcher.slurm.submit import ArrayJob, Submission, live_job, render_arrays, render_run, submit_array, submit_run

__all__ = ["ArrayJob", "Submission", "live_job", "render_arrays", "render_run", "submit_array", "submit_run"]
