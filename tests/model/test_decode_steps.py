"""Decode steps at fixed shapes, which a CUDA graph needs, against steps as they come."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from deepseek_v2_modeling import LatentCache
from deepseek_v2_modeling.decode_steps import EagerStep, FixedStep, can_capture, decode_step, logits_of, new_cache

from ..helpers.models import random_ids, small_model

STEPS = 9
ROOT = Path(__file__).parents[2]


def filled(quantization: str | None = None):
    """(model, a cache of three prompts of which one is padded on the left, their mask, the next tokens [STEPS, 3])."""
    model = small_model()
    ids, mask = random_ids(3, 7), torch.ones(3, 7, dtype=torch.long)
    mask[1, :4] = 0
    cache = LatentCache(model.config, quantization)  # pyright: ignore[reportArgumentType]
    cache.reserve(STEPS)
    with torch.no_grad():
        logits_of(model, ids, mask, (mask.cumsum(-1) - 1).clamp(min=0), cache)
    return model, cache, mask, random_ids(STEPS, 3, seed=1)


@torch.no_grad()
@pytest.mark.parametrize("quantization", [None, "int8", "int6"])
def test_fixed_shapes_give_the_same_logits(quantization: str | None):
    """Also after a row has left the batch."""
    found = []
    for fixed in (False, True):
        model, cache, mask, tokens = filled(quantization)
        step = FixedStep(model, cache, mask, STEPS, capture=False) if fixed else EagerStep(model, cache, mask)
        logits = [step(row).clone() for row in tokens[:4]]
        step.keep(torch.tensor([0, 1]))
        logits += [step(row[:2]).clone() for row in tokens[4:]]
        found.append(logits)
    for as_it_comes, at_fixed_shapes in zip(*found, strict=True):
        torch.testing.assert_close(at_fixed_shapes, as_it_comes, atol=1e-5, rtol=1e-5)


def test_buffers_stay_where_they_are():
    """A captured step reads and writes addresses: a cache with room must not move, nor be copied."""
    model, cache, mask, tokens = filled()
    before = [layer.buffer.data_ptr() for layer in cache.layers]
    step = FixedStep(model, cache, mask, STEPS, capture=False)
    with torch.no_grad():
        for row in tokens:
            step(row)
    assert [layer.buffer.data_ptr() for layer in step.cache.layers] == before


def test_nothing_is_captured_on_a_cpu():
    model = small_model()
    assert not can_capture(model)
    cache = new_cache(model, steps=100)
    assert cache.reserved == 0
    ids = random_ids(2, 5)
    with torch.no_grad():
        model(ids, past_key_values=cache, use_cache=True)
    assert isinstance(decode_step(model, cache, torch.ones_like(ids), 100), EagerStep)


@pytest.mark.slow
def test_the_gpu_check_runs_at_toy_size(tmp_path: Path):
    """The same code on a CPU: what is left unknown of `make gpu-check` is the GPU."""
    command = [sys.executable, ROOT / "benchmarks/gpu/check.py", "--device", "cpu", "--output", tmp_path / "out.json"]
    alone = {**os.environ, "OMP_NUM_THREADS": "1"}  # two threads wait for one another where others work as well
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=alone)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "FAILED" not in done.stdout and (tmp_path / "out.json").is_file()
