"""What every rank runs, in reading order: __main__, build, loop, evaluation, finish."""
