"""What a rehearsal leaves as it was."""

import gc

import pytest

from recipes.runs.rehearsal import _unnoticed


@pytest.mark.parametrize("frozen", [True, False])
def test_garbage_collection_is_as_before(frozen: bool):
    gc.unfreeze()
    try:
        if frozen:
            gc.freeze()
        with _unnoticed():
            assert gc.get_freeze_count()
        assert bool(gc.get_freeze_count()) == frozen
    finally:
        gc.freeze()  # as conftest.py leaves it
