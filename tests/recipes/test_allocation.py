"""Memory that a run frees stays with the process."""

import subprocess
import sys

import pytest

SCRIPT = """
import resource, sys
import torch
from recipes.process_settings import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
torch.ones(2**26)  # 256 MB, freed at once
before = faults()
for _ in range(8):
    torch.ones(2**24)
print(faults() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="of glibc")
def test_freed_memory_is_found_again():
    kept, left = (
        int(subprocess.run([sys.executable, "-c", SCRIPT, how], capture_output=True, text=True, check=True).stdout)
        for how in ("keep", "leave")
    )
    assert kept < 0.8 * left or left < 100  # huge pages make few faults in any case
