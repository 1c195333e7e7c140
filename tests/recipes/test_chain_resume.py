"""The demo chain stopped in each of its stages ends as if nothing had been: tests/chain_launch.py."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ..helpers.chain_launch import STAGES

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_a_chain_that_was_stopped_in_every_stage_ends_with_the_same_figures(tmp_path: Path) -> None:
    """In a process of its own, since it forks: this one may have threads."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.helpers.chain_launch", str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 0, done.stderr[-6000:]
    said = done.stdout.splitlines()
    assert [line.split(":")[0] for line in said[:-1]] == STAGES and said[-1] == "the same"
    assert not list(tmp_path.glob("*dsv2-*"))
