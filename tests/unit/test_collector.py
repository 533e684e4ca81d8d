"""The collector stands aside while libraries are imported, and afterwards does not look at what they brought."""

import gc
import weakref

import pytest

from launcher.base.collector import no_collections


@pytest.fixture(autouse=True)
def unfrozen():
    yield
    gc.unfreeze()


def test_what_is_imported_is_not_looked_at_again():
    gc.unfreeze()
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
