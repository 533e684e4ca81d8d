"""Files, paths, errors, processes, the lock: what every room stands on."""
