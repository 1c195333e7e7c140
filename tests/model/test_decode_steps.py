"""Decode steps for rows of different lengths, eager and with static shapes, against a forward without a cache."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek_v2_modeling import LatentCache
from deepseek_v2_modeling.batching import pad_batch
from deepseek_v2_modeling.decode_steps import SlotDecoder, can_capture, logits_of

from ..helpers.models import random_ids, small_model

ROOT = Path(__file__).parents[2]
COLUMNS = 80
MODEL = small_model()


def prefilled(prompts: list[list[int]], quantization: Any = None) -> LatentCache:
    ids, mask = pad_batch(prompts, 0, left=True)
    cache = LatentCache(MODEL.config, quantization)
    with torch.no_grad():
        logits_of(MODEL, ids, mask, (mask.cumsum(-1) - 1).clamp(min=0), cache)
    return cache


def last_logits(tokens: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return MODEL(torch.tensor([tokens]), use_cache=False).logits[0, -1]


def play(decoder: SlotDecoder, rows: list[list[int]], steps: int, seed: int) -> None:
    """Feed random tokens; the logits of every row that is not empty must be those of a forward over all of it."""
    for ids in random_ids(steps, len(rows), seed=seed):
        with torch.no_grad():
            found = decoder(ids)
        for slot, row in enumerate(rows):
            if row:
                row.append(int(ids[slot]))
                torch.testing.assert_close(found[slot], last_logits(row), atol=2e-5, rtol=1e-4)


@settings(max_examples=8)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=2, max_size=4),
    later=st.integers(1, 12),
    steps=st.integers(1, 3),
    fixed=st.booleans(),
)
def test_each_row_decodes_as_if_it_were_alone(lengths: list[int], later: int, steps: int, fixed: bool):
    """Also when a slot gets another row, and when slots are dropped."""
    rows = [random_ids(1, length, seed=i)[0].tolist() for i, length in enumerate(lengths)]
    cache = prefilled(rows)
    decoder = SlotDecoder(MODEL, cache, len(rows), COLUMNS, fixed=fixed, capture=False)
    order = list(reversed(range(len(rows))))
    decoder.fill(order, cache, order, [len(rows[i]) for i in order])
    play(decoder, rows, steps, seed=1)
    rows[0] = random_ids(1, later, seed=9)[0].tolist()
    decoder.empty(0)
    decoder.fill([0], prefilled([[3] * 12, rows[0]]), [1], [later])
    play(decoder, rows, steps, seed=2)
    rows[1] = []
    decoder.empty(1)
    play(decoder, rows, steps, seed=3)
    kept = [0, *range(2, len(rows))]
    decoder.keep(kept)
    play(decoder, [rows[i] for i in kept], steps, seed=4)


def test_the_cache_grows_and_shrinks_with_its_longest_row():
    rows = [random_ids(1, length, seed=length)[0].tolist() for length in (63, 5)]
    cache = prefilled(rows)
    decoder = SlotDecoder(MODEL, cache, 2, 100)
    decoder.fill([0, 1], cache, [0, 1], [63, 5])
    play(decoder, rows, 1, seed=0)
    assert decoder.cache.columns == 64
    play(decoder, rows, 1, seed=1)
    assert decoder.cache.columns == 128
    rows[0] = []
    decoder.empty(0)
    play(decoder, rows, 2, seed=2)
    assert decoder.cache.columns == 64


def test_a_finished_row_may_wait_in_a_full_cache():
    """Its place stays at the last column while others go on."""
    rows = [random_ids(1, length, seed=length)[0].tolist() for length in (62, 3)]
    cache = prefilled(rows)
    decoder = SlotDecoder(MODEL, cache, 2, 64, fixed=True, capture=False)
    decoder.fill([0, 1], cache, [0, 1], [62, 3])
    play(decoder, rows, 2, seed=0)
    rows[0] = []
    decoder.empty(0)
    play(decoder, rows, 4, seed=1)


@torch.no_grad()
@pytest.mark.parametrize("quantization", ["int8", "int6"])
def test_static_shapes_give_the_same_logits_with_a_quantised_cache(quantization: str):
    rows = [random_ids(1, length, seed=length)[0].tolist() for length in (7, 3)]
    found = []
    for fixed in (False, True):
        cache = prefilled(rows, quantization)
        decoder = SlotDecoder(MODEL, cache, 2, COLUMNS, fixed=fixed, capture=False)
        decoder.fill([0, 1], cache, [0, 1], [7, 3])
        found.append(torch.stack([decoder(ids).clone() for ids in random_ids(9, 2, seed=1)]))
    torch.testing.assert_close(found[1], found[0], atol=1e-5, rtol=1e-5)


def test_buffers_keep_their_addresses():
    """A captured step reads and writes addresses: neither steps nor new rows may move the cache."""
    rows = [random_ids(1, 7, seed=i)[0].tolist() for i in range(2)]
    cache = prefilled(rows)
    decoder = SlotDecoder(MODEL, cache, 2, COLUMNS, fixed=True, capture=False)
    tensors = [decoder.cache.place, decoder.tokens, *(layer.buffer for layer in decoder.cache.layers)]
    before = [tensor.data_ptr() for tensor in tensors]
    decoder.fill([0, 1], cache, [0, 1], [7, 7])
    play(decoder, rows, 3, seed=0)
    decoder.fill([1], cache, [0], [7])
    tensors = [decoder.cache.place, decoder.tokens, *(layer.buffer for layer in decoder.cache.layers)]
    assert [tensor.data_ptr() for tensor in tensors] == before


def test_what_cannot_be_captured_decodes_eagerly_and_says_so(monkeypatch: pytest.MonkeyPatch):
    said: list[str] = []
    monkeypatch.setattr("deepseek_v2_modeling.decode_steps.logger.warning_once", said.append)

    def fails(decoder: Any) -> None:
        raise RuntimeError("no graph today")

    monkeypatch.setattr(SlotDecoder, "_captured", fails)
    rows = [random_ids(1, 7)[0].tolist()]
    cache = prefilled(rows)
    decoder = SlotDecoder(MODEL, cache, 1, COLUMNS, fixed=True)
    decoder.fill([0], cache, [0], [7])
    play(decoder, rows, 2, seed=0)
    assert said == ["decoding without a CUDA graph, which is slower: no graph today"]
    assert not can_capture(MODEL)


@pytest.mark.slow
def test_the_gpu_check_runs_at_toy_size(tmp_path: Path):
    """The same code on a CPU: what is left unknown of `make gpu-check` is the GPU."""
    command = [sys.executable, "-m", "benchmarks.gpu.check", "--device", "cpu", "--output", tmp_path / "out.json"]
    alone = {**os.environ, "OMP_NUM_THREADS": "1"}  # two threads wait for one another where others work as well
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=alone, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "FAILED" not in done.stdout and (tmp_path / "out.json").is_file()
