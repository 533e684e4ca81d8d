"""The collector stands aside while libraries are imported, and afterwards does not look at what they brought."""

import gc
import os
import subprocess
import sys
import weakref
from pathlib import Path

import pytest

from launcher.base.collector import no_collections


@pytest.fixture(autouse=True)
def unfrozen():
    yield
    gc.unfreeze()


def test_what_is_imported_is_not_looked_at_again():
    gc.unfreeze()
    gc.collect()  # none is due for hundreds of objects
    before = [stats["collections"] for stats in gc.get_stats()]
    with no_collections():
        assert not gc.isenabled()
        kept = [[] for _ in range(100_000)]
    assert gc.isenabled() and gc.get_freeze_count() >= len(kept)
    assert [stats["collections"] for stats in gc.get_stats()] == before


def test_garbage_of_later_is_collected_even_after_an_error():
    with pytest.raises(ImportError), no_collections():
        raise ImportError("no such library")
    assert gc.isenabled()

    class Cycle:
        pass

    cycle = Cycle()
    cycle.itself, gone = cycle, weakref.ref(cycle)
    del cycle
    gc.collect()
    assert gone() is None


def test_who_had_it_off_keeps_it_off():
    gc.disable()
    try:
        with no_collections():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_a_rank_trains_with_a_collector_that_passes_over_its_libraries(tmp_path: Path):
    script = (
        "import gc, sys, launcher.train.loop as loop\n"
        "before = gc.get_stats()[2]['collections']\n"
        "def fit(run):\n"
        "    print(gc.isenabled(), gc.get_freeze_count() > 300_000, gc.get_stats()[2]['collections'] - before)\n"
        "    sys.stdout.flush()\n"
        "    raise KeyboardInterrupt\n"
        "loop.fit = fit\n"
        "from launcher.train.__main__ import main\n"
        "main()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, "launch.num_processes=1", "tracker=off", f"output_dir={tmp_path}/run",
         f"data.cache_dir={tmp_path}/cache"],
        text=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=300,
    )  # fmt: skip
    is_on, is_frozen, num_whole = done.stdout.split()
    assert (is_on, is_frozen) == ("True", "True")
    assert int(num_whole) <= 2, "all objects were looked through again and again"
