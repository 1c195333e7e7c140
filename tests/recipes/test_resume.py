"""Runs killed at bad moments and started again end as if nothing had been: tests/resume_launch.py."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ..helpers.resume_launch import MOMENTS

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_killed_runs_end_with_the_same_weights_and_lines(tmp_path: Path) -> None:
    """In a process of its own, since it forks: this one may have threads."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.helpers.resume_launch", str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-6000:]
    assert done.stdout.splitlines() == [f"{moment}: the same" for moment in MOMENTS]
