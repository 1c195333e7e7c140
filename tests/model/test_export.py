"""Adapters for servers, and back: the same products under other keys."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from deepseek_v2_modeling import ModelError, export_adapter, import_adapter
from deepseek_v2_modeling.adapters.layouts import (
    common_scaling,
    flatten_down,
    flatten_up,
    pad,
    stack_down,
    stack_up,
    transpose_pair,
)
from deepseek_v2_modeling.checkpoints.adapter_config import WEIGHTS
from deepseek_v2_modeling.loading import ModelSource, load_base, load_model, read_adapter

from ..helpers.adapters import EVERYWHERE, IDS, edit_config, edit_tensors, make_adapter, make_base, stock_adapter
from ..helpers.models import logits_of, stock_twin

PREFIX = "base_model.model."
LEGACY = ("q_proj", "kv_a_proj_with_mqa", "gate_proj", "up_proj", "down_proj", "gate")


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return make_base(tmp_path / "base")


def config_of(adapter: Path) -> dict[str, Any]:
    return json.loads((adapter / "adapter_config.json").read_text())


def served(base: Path, adapter: Path, scaling: Any, out: Path) -> torch.Tensor:
    """Logits of stock with each 2-D pair added to the hub tensor that its key names, as a server would add it.

    scaling: a module's name -> alpha / r.
    """
    weights, pairs = load_file(base / "model.safetensors"), load_file(adapter / WEIGHTS)
    for name, a in pairs.items():
        module, _, rest = name.removeprefix(PREFIX).partition(".lora_")
        if rest.startswith("A"):
            weights[f"{module}.weight"] += scaling(module) * pairs[name.replace("lora_A", "lora_B")] @ a
        elif rest == "embedding_A":
            weights[f"{module}.weight"] += scaling(module) * (pairs[f"{name[:-1]}B"] @ a).T
    out.mkdir()
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    (out / "config.json").write_text((base / "config.json").read_text())
    return logits_of(stock_twin(out), IDS)


# Layouts


shapes = st.tuples(st.integers(1, 5), st.integers(1, 4), st.integers(1, 6), st.integers(1, 6))


@given(shapes)
@settings(max_examples=30, deadline=None)
def test_the_expert_is_the_fastest_index(sizes: tuple[int, int, int, int]):
    """PEFT's own reading of its tensors, for W [E, out, in], and that of its versions before 0.19.1."""
    experts, rank, inner, outer = sizes
    a, b = torch.randn(experts * rank, inner), torch.randn(outer, rank * experts)
    wanted = torch.einsum("ore,eri->eoi", b.reshape(outer, rank, experts), a.reshape(experts, rank, inner))
    torch.testing.assert_close(stack_up(b, experts) @ stack_down(a, experts), wanted)
    assert torch.equal(flatten_down(stack_down(a, experts)), a) and torch.equal(flatten_up(stack_up(b, experts)), b)
    old_a, old_b = transpose_pair(a, b, experts)
    assert old_a.shape == (experts * rank, outer) and old_b.shape == (inner, rank * experts)
    old = torch.einsum("ore,eri->eio", old_b.reshape(inner, rank, experts), old_a.reshape(experts, rank, outer))
    torch.testing.assert_close(old, wanted)
    again = transpose_pair(old_a, old_b, experts)
    assert torch.equal(again[0], a) and torch.equal(again[1], b)


@given(st.lists(st.tuples(st.integers(1, 32), st.sampled_from([0.5, 1.0, 2.0, 1.5, 8 / math.sqrt(3)])), min_size=1))
@settings(max_examples=50, deadline=None)
def test_one_rank_and_one_alpha_for_all(kinds: list[tuple[int, float]]):
    rank, alpha = common_scaling(kinds)
    assert rank == max(r for r, _ in kinds) and isinstance(alpha, int)
    scalings = {s for _, s in kinds}
    if len(scalings) == 1 and float(rank * min(scalings)).is_integer():
        assert alpha / rank == scalings.pop()
    else:
        assert alpha == rank
    for own, scaling in kinds:
        a, b = torch.randn(own, 3), torch.randn(4, own)
        padded = pad(b * (scaling / (alpha / rank)), rank, 1) @ pad(a, rank, 0) * (alpha / rank)
        torch.testing.assert_close(padded, scaling * b @ a)


# Out and back


@pytest.mark.parametrize(
    ("targets", "arguments", "changes", "expected"),
    [
        (EVERYWHERE, {}, {}, (2, 3)),
        (EVERYWHERE, {"r": {t: i + 1 for i, t in enumerate(EVERYWHERE)}, "alpha": 7}, {}, (5, 5)),
        (("attention", "experts"), {"r": {"attention": 3, "experts": 2}, "rslora": True}, {"q_lora_rank": 12}, (3, 3)),
        (("experts", "embeddings", "lm_head"), {"r": 4, "alpha": 8}, {}, (4, 8)),
    ],
)
def test_the_products_stay(tmp_path: Path, targets: Any, arguments: Any, changes: Any, expected: tuple[int, int]):
    base = make_base(tmp_path / "base", **changes)
    ours = make_adapter(tmp_path / "adapter", base, targets, **arguments)
    export_adapter(tmp_path / "adapter", tmp_path / "served", kv_b=True)
    config, tensors = config_of(tmp_path / "served"), load_file(tmp_path / "served" / WEIGHTS)
    assert (config["r"], config["lora_alpha"]) == expected
    assert not config["rank_pattern"] and not config["alpha_pattern"] and not config["use_rslora"]
    assert not config["target_parameters"] and not config["modules_to_save"]
    last = {re.sub(r"\.lora_.*", "", name).rpartition(".")[2] for name in tensors}
    assert last == set(config["target_modules"])
    ranks = {tensor.shape[0 if ".lora_A" in n or n.endswith("embedding_A") else 1] for n, tensor in tensors.items()}
    assert ranks == {expected[0]} and all(tensor.ndim == 2 for tensor in tensors.values())
    found = served(base, tmp_path / "served", lambda module: config["lora_alpha"] / config["r"], tmp_path / "added")
    torch.testing.assert_close(found, ours, rtol=0, atol=1e-5)

    report = import_adapter(tmp_path / "served", tmp_path / "back")
    assert report.zeros == 0
    back = load_model(ModelSource(str(base), read_adapter(tmp_path / "back")))
    torch.testing.assert_close(logits_of(back, IDS), ours, rtol=0, atol=1e-5)
    torch.testing.assert_close(stock_adapter(base, tmp_path / "back"), ours, rtol=0, atol=1e-5)
    sizes = [sum(t.numel() for t in load_file(tmp_path / d / WEIGHTS).values()) for d in ("adapter", "back")]
    if expected[0] == arguments.get("r", 2):  # gate and up keep their one A, no rank is added
        assert sizes[0] == sizes[1]


def test_keys_of_each_expert(base: Path, tmp_path: Path):
    make_adapter(tmp_path / "adapter", base)
    report = export_adapter(tmp_path / "adapter", tmp_path / "served", kv_b=True)
    names = set(load_file(tmp_path / "served" / WEIGHTS))
    for layer in (1, 2):
        for part in ("gate_proj", "up_proj", "down_proj"):
            for module in (*(f"experts.{e}" for e in range(8)), "shared_experts"):
                assert f"{PREFIX}model.layers.{layer}.mlp.{module}.{part}.lora_A.weight" in names
    assert f"{PREFIX}model.layers.0.mlp.gate_proj.lora_B.weight" in names
    assert not [name for name in names if "base_layer" in name]
    assert report.pairs * 2 == len(names) and report.zeros == 0
    assert (tmp_path / "served" / "tokenizer_config.json").is_file()
    assert [note.split()[0] for note in report.notes] == ["vLLM", "SGLang", "SGLang"]


@pytest.mark.parametrize(
    ("targets", "changes", "partner"),
    [
        (("experts.gate_up",), {}, "layers.1.mlp.experts.7.down_proj"),
        (("experts.down",), {}, "layers.1.mlp.experts.7.up_proj"),
        (("attention.q",), {"q_lora_rank": 12}, "layers.0.self_attn.kv_a_proj_with_mqa"),
    ],
)
def test_what_servers_stack_is_complete(tmp_path: Path, targets: Any, changes: Any, partner: str):
    base = make_base(tmp_path / "base", **changes)
    ours = make_adapter(tmp_path / "adapter", base, targets, alpha=4)
    report = export_adapter(tmp_path / "adapter", tmp_path / "served")
    tensors = load_file(tmp_path / "served" / WEIGHTS)
    assert report.zeros and not tensors[f"{PREFIX}model.{partner}.lora_B.weight"].any()
    found = served(base, tmp_path / "served", lambda module: 2.0, tmp_path / "added")
    torch.testing.assert_close(found, ours, rtol=0, atol=1e-5)


def test_a_high_rank_is_noted(base: Path, tmp_path: Path):
    make_adapter(tmp_path / "adapter", base, ("attention.o",), r=17)
    assert export_adapter(tmp_path / "adapter", tmp_path / "served").notes == (
        "vLLM needs --max-lora-rank 17 or more (its default is 16)",
    )


def test_what_vllm_would_drop_is_refused(base: Path, tmp_path: Path):
    make_adapter(tmp_path / "adapter", base, ("attention",))
    with pytest.raises(ModelError, match=r"adapter: vLLM drops adapters on kv_b_proj .*dsv2 merge.* --kv-b$"):
        export_adapter(tmp_path / "adapter", tmp_path / "served")
    assert not (tmp_path / "served").exists()
    make_adapter(tmp_path / "other", base, ("attention.q", "attention.kv_a", "attention.o"))
    export_adapter(tmp_path / "other", tmp_path / "served")


def test_whole_tensors_are_refused(base: Path, tmp_path: Path):
    """Embeddings that PEFT adds are left out as long as they are the base's own."""
    make_adapter(tmp_path / "adapter", base, ("attention.o", "lm_head"))
    stored = f"{PREFIX}lm_head.base_layer.weight"
    export_adapter(tmp_path / "adapter", tmp_path / "served")
    edit_tensors(tmp_path / "adapter", **{stored: torch.zeros(61, 32)})
    with pytest.raises(ModelError, match=f"{re.escape(stored)}.*dsv2 merge"):
        export_adapter(tmp_path / "adapter", tmp_path / "again")
    with pytest.raises(ModelError, match='unknown layout "fused": use per_expert'):
        export_adapter(tmp_path / "adapter", tmp_path / "again", layout="fused")
    with pytest.raises(ModelError, match="not empty"):
        export_adapter(tmp_path / "adapter", tmp_path / "served")
    assert not (tmp_path / "again").exists()


# Adapters of old


def legacy_adapter(directory: Path, base: Path, skip: str = "^$", **config: Any) -> None:
    """As PEFT made it of `nn.Linear` experts: each projection has its own A, and a rank by its pattern."""
    generator = torch.Generator().manual_seed(4)
    tensors = {}
    for name, weight in load_file(base / "model.safetensors").items():
        module = name.removesuffix(".weight")
        if module.rpartition(".")[2] in LEGACY and not re.search(skip, module):
            rank = 3 if ".experts.2." in module else 2
            for side, shape in (("A", (rank, weight.shape[1])), ("B", (weight.shape[0], rank))):
                tensors[f"{PREFIX}{module}.lora_{side}.weight"] = torch.randn(shape, generator=generator) * 0.1
    directory.mkdir()
    save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})
    settings = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(base), "r": 2, "lora_alpha": 3,
        "target_modules": list(LEGACY), "rank_pattern": {r"experts\.2\.\w+": 3}, "bias": "none", **config,
    }  # fmt: skip
    (directory / "adapter_config.json").write_text(json.dumps(settings))


@pytest.mark.parametrize(
    ("skip", "config", "scaling", "zeros"),
    [
        ("^$", {}, lambda module: 3 / (3 if ".experts.2." in module else 2), 0),
        ("^$", {"use_rslora": True}, lambda module: 3 / math.sqrt(3 if ".experts.2." in module else 2), 0),
        (
            r"layers\.1\.self|experts\.5\.|experts\.6\.up",  # and the config does not ask for these
            {
                "alpha_pattern": {"q_proj": 8},
                "target_modules": rf"(?!.*(experts\.5\.|experts\.6\.up)).*\.({'|'.join(LEGACY)})",
            },
            lambda module: (8 if "q_proj" in module else 3) / (3 if ".experts.2." in module else 2),
            2 + 2 * (3 + 1),
        ),
    ],
)
def test_legacy_adapter(base: Path, tmp_path: Path, skip: str, config: Any, scaling: Any, zeros: int):
    legacy_adapter(tmp_path / "legacy", base, skip, **config)
    wanted = served(base, tmp_path / "legacy", scaling, tmp_path / "added")
    with pytest.raises(ModelError, match=f"dsv2 import {re.escape(str(tmp_path))}/legacy OUT_DIR"):
        load_model(ModelSource(str(base), read_adapter(tmp_path / "legacy")))
    report = import_adapter(tmp_path / "legacy", tmp_path / "imported")
    assert report.zeros == zeros
    model = load_model(ModelSource(str(base), read_adapter(tmp_path / "imported")))
    torch.testing.assert_close(logits_of(model, IDS), wanted, rtol=0, atol=1e-5)
    torch.testing.assert_close(stock_adapter(base, tmp_path / "imported"), wanted, rtol=0, atol=1e-5)


def test_a_file_that_lost_experts(base: Path, tmp_path: Path):
    """Zeros would stand for what was trained."""
    legacy_adapter(tmp_path / "legacy", base, skip=r"layers\.1\.mlp\.experts\.(5|6\.up)")
    lost = r"4 of the experts' weights.*: model\.layers\.1\.mlp\.experts\.5\.down_proj\.weight, .*experts\.6\.up"
    with pytest.raises(ModelError, match=lost):
        import_adapter(tmp_path / "legacy", tmp_path / "out")
    chosen = [f"experts.{e}.{name}" for e in range(8) for name in ("gate_proj", "up_proj", "down_proj") if e != 5]
    edit_config(tmp_path / "legacy", target_modules=[name for name in chosen if name != "experts.6.up_proj"])
    assert import_adapter(tmp_path / "legacy", tmp_path / "out").zeros == 4


def test_layouts_that_are_the_same(base: Path, tmp_path: Path):
    """Attention, embeddings and the head lie alike in both layouts."""
    ours = make_adapter(tmp_path / "adapter", base, ("attention", "embeddings", "lm_head"))
    export_adapter(tmp_path / "adapter", tmp_path / "served", kv_b=True)
    assert "copied" in import_adapter(tmp_path / "served", tmp_path / "back").layout
    assert torch.equal(logits_of(load_model(ModelSource(str(base), read_adapter(tmp_path / "back"))), IDS), ours)


@pytest.mark.parametrize("target", ["experts", "attention.o"])
def test_numbers_that_are_not_finite(base: Path, tmp_path: Path, target: str):
    make_adapter(tmp_path / "adapter", base, (target,))
    export_adapter(tmp_path / "adapter", tmp_path / "served")
    tensors = load_file(tmp_path / "served" / WEIGHTS)
    name = next(name for name in tensors if ".lora_B" in name)
    edit_tensors(tmp_path / "served", **{name: torch.full_like(tensors[name], torch.inf)})
    with pytest.raises(ModelError, match=f"{re.escape(name)} contains NaN"):
        import_adapter(tmp_path / "served", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_base_is_found_from_anywhere(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    make_adapter(Path("adapter"), Path("base"), ("experts",))
    edit_config(tmp_path / "adapter", base_model_name_or_path="base")  # as of old
    export_adapter("adapter", "served")
    import_adapter("served", "back", base="base")
    for name in ("served", "back"):
        assert json.loads(Path(name, "adapter_config.json").read_text())["base_model_name_or_path"] == str(base)


def test_shared_and_dense_as_modules_are_legacy_too(base: Path, tmp_path: Path):
    """Current PEFT would take such targets for the routed experts."""
    legacy_adapter(tmp_path / "legacy", base, skip=r"\.experts\.|gate$", target_modules=["gate_proj", "up_proj"])
    with pytest.raises(ModelError, match="dsv2 import"):
        load_model(ModelSource(str(base), read_adapter(tmp_path / "legacy")))
    import_adapter(tmp_path / "legacy", tmp_path / "imported")
    assert not [name for name in load_file(tmp_path / "imported" / WEIGHTS) if ".mlp.experts." in name]


def test_import_refuses(base: Path, tmp_path: Path):
    legacy_adapter(tmp_path / "legacy", base)
    out = tmp_path / "out"
    whole = (tmp_path / "legacy" / "adapter_config.json").read_text()
    for change, match in (
        ({"r": 5, "rank_pattern": {}}, "do not fit rank 5"),
        ({"use_dora": True}, "use_dora"),
        ({"base_model_name_or_path": None}, "--base MODEL"),
        ({"base_model_name_or_path": "a/b/c"}, "a/b/c: this base model does not exist"),
    ):
        edit_config(tmp_path / "legacy", **change)
        with pytest.raises(ModelError, match=match):
            import_adapter(tmp_path / "legacy", out)
        (tmp_path / "legacy" / "adapter_config.json").write_text(whole)
    name = f"{PREFIX}model.layers.1.mlp.experts.0.up_proj.lora_B.weight"
    edit_tensors(tmp_path / "legacy", drop=[name])
    with pytest.raises(ModelError, match=r"experts\.0\.up_proj\.lora_A\.weight lacks its other factor"):
        import_adapter(tmp_path / "legacy", out)
    edit_tensors(tmp_path / "legacy", **{name.replace("experts.0", "experts.9"): torch.zeros(12, 2)})
    with pytest.raises(ModelError, match=r"no place for .*experts\.9"):
        import_adapter(tmp_path / "legacy", out)
    make_adapter(tmp_path / "adapter", base)
    with pytest.raises(ModelError, match="PEFT's layout already"):
        import_adapter(tmp_path / "adapter", out)
    with pytest.raises(ModelError, match="not an adapter"):
        import_adapter(base, out)
    assert not out.exists()


def transpose_file(adapter: Path, version: str | None, only: str = "") -> None:
    """Rewrites the experts' tensors as PEFT before 0.19.1 had them (E = 8)."""
    tensors = load_file(adapter / WEIGHTS)
    for name in [n for n in tensors if ".mlp.experts." in n and ".lora_A" in n and only in n]:
        other = name.replace("lora_A", "lora_B")
        a, b = transpose_pair(tensors[name], tensors[other], 8)
        tensors |= {name: a.contiguous(), other: b.contiguous()}
    save_file(tensors, adapter / WEIGHTS, metadata={"format": "pt"})
    edit_config(adapter, peft_version=version)


@pytest.mark.parametrize("changes", [{}, {"hidden_size": 24}])  # 24: gate_up_proj is square, down_proj tells
def test_the_transposed_layout_is_converted(tmp_path: Path, changes: dict[str, Any]):
    base = make_base(tmp_path / "base", **changes)
    ours = make_adapter(tmp_path / "adapter", base)
    untouched = load_file(tmp_path / "adapter" / WEIGHTS)
    transpose_file(tmp_path / "adapter", None)
    torch.testing.assert_close(
        logits_of(load_model(ModelSource(str(base), read_adapter(tmp_path / "adapter"))), IDS), ours
    )
    import_adapter(tmp_path / "adapter", tmp_path / "imported")
    imported = load_file(tmp_path / "imported" / WEIGHTS)
    assert imported.keys() == untouched.keys() and all(torch.equal(imported[n], untouched[n]) for n in imported)
    export_adapter(tmp_path / "adapter", tmp_path / "served", kv_b=True)
    export_adapter(tmp_path / "imported", tmp_path / "again", kv_b=True)
    a, b = (load_file(tmp_path / d / WEIGHTS) for d in ("served", "again"))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_square_experts_need_the_version(tmp_path: Path):
    base = make_base(tmp_path / "base", hidden_size=24)
    ours = make_adapter(tmp_path / "adapter", base, ("experts.gate_up",))

    def loaded() -> Any:
        return logits_of(load_model(ModelSource(str(base), read_adapter(tmp_path / "adapter"))), IDS)

    torch.testing.assert_close(loaded(), ours)
    transpose_file(tmp_path / "adapter", "0.19.0")
    torch.testing.assert_close(loaded(), ours)
    edit_config(tmp_path / "adapter", peft_version="0.19.1")
    assert (loaded() - ours).abs().max() > 1e-3
    edit_config(tmp_path / "adapter", peft_version=None)
    with pytest.raises(ModelError, match=r'square.*"peft_version"'):
        loaded()


def test_half_a_transposed_file(base: Path, tmp_path: Path):
    make_adapter(tmp_path / "adapter", base)
    transpose_file(tmp_path / "adapter", "0.18.1", only="layers.1.")
    with pytest.raises(ModelError, match="some expert tensors are transposed"):
        load_model(ModelSource(str(base), read_adapter(tmp_path / "adapter")))


def test_logits_of_the_base_differ(base: Path, tmp_path: Path):
    """What the comparisons above would be worth if adapters did nothing."""
    ours = make_adapter(tmp_path / "adapter", base)
    assert (ours - logits_of(load_base(str(base)), IDS)).abs().max() > 1e-2
