"""One machine of a run: starts accelerate launch, watches, restarts, gives the exit code."""
