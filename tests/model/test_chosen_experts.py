"""Training chosen experts (ESFT), with LoRA and in full: gradients, what stays as it is, files, resume, sizes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file

from deepseek_v2_modeling import ModelError, apply_lora, lora_config, merge_lora
from deepseek_v2_modeling.adapters.lora import adapted_modules
from deepseek_v2_modeling.checkpoints.adapter_config import WEIGHTS
from deepseek_v2_modeling.esft.choice import ExpertChoice, read_choice
from deepseek_v2_modeling.esft.full_weights import _grouped, _looped, train_chosen_experts, trained_rows
from deepseek_v2_modeling.kernels.grouped_products import Groups
from deepseek_v2_modeling.layers.moe import WAYS
from deepseek_v2_modeling.loading import (
    LoraSettings,
    load_base,
    load_model,
    prepare_trainable,
    resolve_source,
    save_directory,
)

from ..helpers.models import logits_of, random_ids, shake, small_config, small_model, stock_twin, tokenizer

torch.set_num_threads(1)
CHOICE = ExpertChoice({1: (1, 4, 6), 2: ()}, "e.json")  # layers 1 and 2 are the MoE layers; 8 experts each
TARGETS, RANK = ("experts", "shared_experts"), 2
LORA = LoraSettings(TARGETS, r=RANK, alpha=3)
IDS = random_ids(3, 11)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("base")
    small_model().save_pretrained(directory)
    tokenizer().save_pretrained(directory)
    return directory


def adapted(base: Path, choice: ExpertChoice | None = CHOICE, **settings: Any) -> Any:
    torch.manual_seed(0)
    config = lora_config(TARGETS, r=RANK, alpha=3)
    return apply_lora(load_base(str(base)), config, experts=choice, **settings).train()


def shaken(base: Path) -> Any:
    """A chosen-experts adapter whose factors are far from zero."""
    model = adapted(base)
    shake(model, seed=3)
    return model.eval()


def chosen_full(base: Path, choice: ExpertChoice = CHOICE, dtype: str = "float32") -> Any:
    return prepare_trainable(resolve_source(base), lora=None, experts=choice, merge_dir=base / "no", dtype=dtype)


def backward(model: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
    model(input_ids=IDS, labels=IDS, **kwargs).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def expert_stack(name: str, factor: torch.Tensor) -> torch.Tensor:
    """A factor of PEFT's layout with the expert in front."""
    if "lora_A" in name:
        return factor.unflatten(0, (8, RANK))
    return factor.unflatten(1, (RANK, 8)).permute(2, 0, 1)


def train_steps(model: Any, steps: int = 2) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        backward(model)
        optimizer.step()
    return optimizer


# --- LoRA -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lora_gradients_are_the_full_adapters(base: Path, dropout: float, dtype: torch.dtype) -> None:
    """The full adapter with zeros for the others has the same loss, and the same gradients for the chosen experts."""
    chosen, full = (adapted(base, choice, dropout=dropout) for choice in (CHOICE, None))
    shake(chosen, seed=3)
    full.load_state_dict(chosen.state_dict())
    grads = []
    for model in (chosen, full):
        torch.manual_seed(7)
        with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
            grads.append(backward(model))
    compared = 0
    for name, wanted in grads[1].items():
        found = grads[0][name]
        if ".experts." not in name:
            torch.testing.assert_close(found, wanted, msg=name)
            continue
        picks = CHOICE.layers[int(name.split(".layers.")[1].split(".")[0])]
        stacked = expert_stack(name, wanted)[list(picks)]
        compact = found.unflatten(0, (len(picks), RANK)) if "lora_A" in name else None
        if compact is None:
            compact = found.unflatten(1, (RANK, len(picks))).permute(2, 0, 1)
        torch.testing.assert_close(compact, stacked, msg=name)
        compared += compact.abs().sum() > 0
    assert compared == 4  # A and B of gate_up and down in layer 1; layer 2 trains none


def test_a_fresh_chosen_adapter_starts_like_the_full_one(base: Path) -> None:
    chosen, full = (get_peft_model_state_dict(adapted(base, choice)) for choice in (CHOICE, None))
    assert chosen.keys() == full.keys()
    name = next(n for n in full if "layers.1.mlp.experts.lora_A" in n)
    picks = list(CHOICE.layers[1])
    a, b = expert_stack(name, chosen[name]), expert_stack(name, full[name])
    assert torch.equal(a[picks], b[picks]) and b.ne(0).all()
    assert a.flatten(1).any(1).nonzero().flatten().tolist() == picks


def test_gpu_path_spreads_the_factors(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The branch for a GPU, whose kernel runs on the CPU too (rows of factors must be of 16 bytes)."""

    def grads() -> dict[str, torch.Tensor]:
        model = apply_lora(load_base(str(base)), lora_config(TARGETS, r=4), experts=CHOICE).train()
        shake(model, seed=3)
        return backward(model)

    wanted = grads()
    _as_on_a_gpu(monkeypatch)
    for name, found in grads().items():
        torch.testing.assert_close(found, wanted[name], rtol=1e-4, atol=1e-6, msg=name)


def _as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def init(self: Groups, sizes_E: torch.Tensor, *_: Any) -> None:
        self.looped, self.ends = False, sizes_E.cumsum(0).to(torch.int32)

    monkeypatch.setattr(Groups, "__init__", init)
    monkeypatch.delitem(WAYS, "training")


def test_lora_trains_nothing_else(base: Path) -> None:
    before, model = load_base(str(base)).state_dict(), adapted(base)
    start = {name: factor.clone() for name, factor in get_peft_model_state_dict(model).items()}
    train_steps(model)
    after = model.get_base_model().state_dict()
    for name, weight in before.items():
        (found,) = [v for k, v in after.items() if k.replace(".base_layer", "") == name]
        assert torch.equal(found, weight), name
    for name, factor in get_peft_model_state_dict(model).items():
        assert not torch.equal(factor, start[name]) or "layers.2.mlp.experts" in name, name
        if ".experts." in name:
            others = expert_stack(name, factor).clone()
            others[list(CHOICE.layers[int(name.split(".layers.")[1].split(".")[0])])] = 0
            assert not others.any(), name


def test_lora_memory_is_the_chosen_experts(base: Path) -> None:
    def sizes(choice: ExpertChoice | None) -> tuple[int, int]:
        model = adapted(base, choice)
        optimizer = train_steps(model, 1)
        held = [p for n, p in model.named_parameters() if p.requires_grad and ".mlp.experts." in n]
        state = sum(t.numel() for p in held for k, t in optimizer.state[p].items() if k != "step")
        assert all(p.grad is None or p.grad.shape == p.shape for p in held)
        return sum(p.numel() for p in held), state

    weights, state = sizes(None)
    assert sizes(CHOICE) == (weights * 3 // 16, state * 3 // 16)


def test_saved_adapter_in_stock_and_back(base: Path, tmp_path: Path) -> None:
    model = shaken(base)
    wanted = logits_of(model, IDS)
    save_directory(model, tokenizer(), tmp_path / "a")
    stock = PeftModel.from_pretrained(stock_twin(base), str(tmp_path / "a")).eval()
    torch.testing.assert_close(logits_of(stock, IDS), wanted, rtol=0, atol=1e-5)
    assert not torch.allclose(wanted, logits_of(load_base(str(base)).eval(), IDS), atol=1e-3)
    assert torch.equal(logits_of(load_model(resolve_source(tmp_path / "a")), IDS), wanted)

    merge_lora(tmp_path / "a", tmp_path / "merged")
    torch.testing.assert_close(logits_of(load_base(str(tmp_path / "merged")).eval(), IDS), wanted, rtol=0, atol=1e-5)
    before, merged = load_base(str(base)).state_dict(), load_base(str(tmp_path / "merged")).state_dict()
    for part in ("gate_up_proj", "down_proj"):
        changed = (
            before[f"model.layers.1.mlp.experts.{part}"] != merged[f"model.layers.1.mlp.experts.{part}"]
        ).flatten(1)
        assert changed.any(1).nonzero().flatten().tolist() == [1, 4, 6]
        assert torch.equal(*(s[f"model.layers.2.mlp.experts.{part}"] for s in (before, merged)))


def test_merging_in_memory_and_switches(base: Path) -> None:
    model = shaken(base)
    wanted, plain = logits_of(model, IDS), logits_of(load_base(str(base)).eval(), IDS)
    with model.disable_adapter():
        assert torch.equal(logits_of(model, IDS), plain)
    model.add_adapter("ref", model.peft_config["default"])  # as TRL makes the frozen reference
    for name, parameter in model.named_parameters():
        if ".default." in name:
            model.get_parameter(name.replace(".default.", ".ref.")).data.copy_(parameter.data)
    shake(model, seed=5)
    assert not torch.allclose(logits_of(model, IDS), wanted, atol=1e-3)
    model.set_adapter("ref")
    assert torch.equal(logits_of(model, IDS), wanted)
    merged = model.merge_and_unload(adapter_names=["ref"])
    torch.testing.assert_close(logits_of(merged, IDS), wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("later", "goes_on"),
    [
        (CHOICE, True),
        (ExpertChoice({1: (1, 4), 2: ()}), False),
        (ExpertChoice({1: (1, 4, 6, 7), 2: ()}), False),
        (None, False),
    ],
)
def test_an_adapter_goes_on_with_its_experts_only(
    base: Path, tmp_path: Path, later: ExpertChoice | None, goes_on: bool
) -> None:
    save_directory(shaken(base), tokenizer(), tmp_path / "a")
    source = resolve_source(tmp_path / "a")
    wanted = logits_of(load_model(source), IDS)
    model: Any = prepare_trainable(source, lora=LORA, experts=later, merge_dir=tmp_path / "merged")
    torch.testing.assert_close(logits_of(model.eval(), IDS), wanted, rtol=0, atol=1e-5)
    assert (tmp_path / "merged").exists() is not goes_on
    if goes_on:
        assert get_peft_model_state_dict(model)[_some_factor(model)].any()
    full = prepare_trainable(source, lora=LORA, merge_dir=tmp_path / "m")
    save_directory(full, tokenizer(), tmp_path / "full")  # an adapter of all experts is taken up by all only
    prepare_trainable(resolve_source(tmp_path / "full"), lora=LORA, merge_dir=tmp_path / "full-merged")
    assert not (tmp_path / "full-merged").exists()


def _some_factor(model: Any) -> str:
    return next(n for n in get_peft_model_state_dict(model) if "layers.1.mlp.experts.lora_B" in n)


def test_factors_of_other_experts_are_not_dropped(base: Path) -> None:
    full = adapted(base, None)
    with pytest.raises(ModelError, match="trained on experts that are not among the chosen"):
        adapted(base).load_state_dict(full.state_dict())


def test_table_says_how_many_experts_train(base: Path) -> None:
    rows = {row["projection"]: row for row in adapted_modules(adapted(base))}
    width, hidden = 12, 32
    gate_up = rows["mlp.experts.gate_up_proj"]
    assert (gate_up["experts"], gate_up["of_experts"], gate_up["layers"]) == (3, 16, 2)
    assert gate_up["parameters"] == 3 * RANK * (hidden + 2 * width)
    assert "experts" not in rows["mlp.shared_experts.gate_proj.weight"]
    full = {row["projection"]: row for row in trained_rows(chosen_full(base))}
    assert full["mlp.experts.down_proj"] == {
        "projection": "mlp.experts.down_proj", "layers": 2, "parameters": 3 * hidden * width,
        "experts": 3, "of_experts": 16,
    }  # fmt: skip


# --- in full --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gpu", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_full_gradients_are_those_of_all_weights(
    base: Path, monkeypatch: pytest.MonkeyPatch, gpu: bool, checkpointing: bool
) -> None:
    choice = ExpertChoice({1: (1, 4, 6), 2: (0, 7)})
    full = load_base(str(base)).train()
    wanted = backward(full)
    if gpu:
        _as_on_a_gpu(monkeypatch)
    model = chosen_full(base, choice)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    found = backward(model)
    assert len(found) == 4
    for name, grad in found.items():
        picks = list(choice.layers[int(name.split(".layers.")[1].split(".")[0])])
        torch.testing.assert_close(grad, wanted[name.replace("chosen_", "")][picks], rtol=1e-4, atol=1e-6, msg=name)


def test_both_gradient_kernels_agree() -> None:
    """With experts without rows, rows that belong to no chosen one, and an order that is not the experts'."""
    sizes, chosen = torch.tensor([3, 0, 4, 2, 5]), torch.tensor([4, 1, 2])
    groups, g, x = Groups(sizes), torch.randn(14, 8), torch.randn(14, 4)
    groups.ends = sizes.cumsum(0).to(torch.int32)
    slow = torch.stack([g[9:14].t() @ x[9:14], torch.zeros(8, 4), g[3:7].t() @ x[3:7]])
    for kernel in (_looped, _grouped):
        torch.testing.assert_close(kernel(groups, g, x, chosen), slow)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_full_training_leaves_every_other_weight_bit_identical(base: Path, tmp_path: Path, dtype: str) -> None:
    model = chosen_full(base, dtype=dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == "bfloat16"):
        train_steps(model)
    save_directory(model, tokenizer(), tmp_path / "final", dtype)
    before = load_base(str(base), dtype=dtype).state_dict()
    after = load_base(str(tmp_path / "final"), dtype=dtype).state_dict()
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"model.layers.1.mlp.experts.gate_up_proj", "model.layers.1.mlp.experts.down_proj"}
    for name in changed:
        rows = (before[name] != after[name]).flatten(1).any(1).nonzero().flatten().tolist()
        assert rows == [1, 4, 6], name
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == "bfloat16"):
        assert torch.equal(
            logits_of(model.eval(), IDS), logits_of(load_base(str(tmp_path / "final"), dtype=dtype), IDS)
        )


def test_full_training_is_that_of_all_weights_with_the_others_held(base: Path) -> None:
    """Two AdamW steps with weight decay, against all experts trained with the others' rows put back after each."""
    model, full = chosen_full(base), load_base(str(base)).train()
    train_steps(model)
    full.requires_grad_(False)
    held = [full.model.layers[1].mlp.experts.gate_up_proj, full.model.layers[1].mlp.experts.down_proj]
    start = [weight.detach().clone() for weight in held]
    for weight in held:
        weight.requires_grad_(True)
    others = [e for e in range(8) if e not in CHOICE.layers[1]]
    optimizer = torch.optim.AdamW(held, lr=1e-2, weight_decay=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        backward(full)
        optimizer.step()
        for weight, first in zip(held, start, strict=True):
            weight.data[others] = first[others]
    for name in ("gate_up_proj", "down_proj"):
        found = model.state_dict()[f"model.layers.1.mlp.experts.{name}"]
        torch.testing.assert_close(found, full.state_dict()[f"model.layers.1.mlp.experts.{name}"], rtol=0, atol=1e-5)


def test_full_memory_is_the_chosen_experts(base: Path) -> None:
    model = chosen_full(base, dtype="bfloat16")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        optimizer = train_steps(model, 1)
    trained = [p for p in model.parameters() if p.requires_grad]
    per_expert = 3 * 12 * 32
    assert sum(p.numel() for p in trained) == 3 * per_expert
    assert sum(t.numel() for s in optimizer.state.values() for k, t in s.items() if k != "step") == 2 * 3 * per_expert
    assert {p.dtype for p in trained} == {torch.float32}
    assert all(p.grad is None and p.dtype == torch.bfloat16 for p in model.parameters() if not p.requires_grad)


def test_a_new_score_head_trains_too(base: Path) -> None:
    model = prepare_trainable(resolve_source(base), lora=None, experts=CHOICE, merge_dir=base / "no", head="score")
    assert {n.split(".")[-1] for n, p in model.named_parameters() if p.requires_grad} == {
        "weight", "chosen_gate_up_proj", "chosen_down_proj",
    }  # fmt: skip
    assert model.get_parameter("score.weight").requires_grad
    assert not model.get_parameter("model.norm.weight").requires_grad


def test_a_state_dict_is_the_plain_models(base: Path) -> None:
    """And is taken as such: with the trained weights in it, on both ways."""
    model, other = chosen_full(base), small_model(seed=4)
    model.load_state_dict(other.state_dict())
    assert torch.equal(logits_of(model.eval(), IDS), logits_of(other, IDS))
    train_steps(model.train(), 1)
    other.load_state_dict(model.state_dict())
    assert torch.equal(logits_of(model.eval(), IDS), logits_of(other, IDS))


# --- the file -------------------------------------------------------------------------------------------------------


def write(path: Path, content: Any) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_an_official_expert_config_is_read(tmp_path: Path) -> None:
    file = write(tmp_path / "e.json", {"experts": {"2": [3, 0], "1": []}, "shared_experts": False})
    choice = read_choice(file)
    assert choice.layers == {1: (), 2: (0, 3)} and list(choice.layers) == [1, 2]
    choice.check(small_config())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not a readable experts file"),
        ([1], "not an experts file"),
        ({"experts": {}}, "not an experts file"),
        ({"experts": {"1": [0], "x": [1]}}, 'the key "x"'),
        ({"experts": {"1": [0, 0]}}, "list of different experts"),
        ({"experts": {"1": 3}}, "list of different experts"),
        ({"experts": {"1": ["3"]}}, "layer 1 names '3'"),
        ({"experts": {"1": [True]}}, "layer 1 names True"),
        ({"experts": {"1": [-1]}}, "layer 1 names -1"),
        ({"experts": {"1": [], "2": []}}, "names no experts"),
        ({"experts": {"1": [0]}, "shared_experts": True}, "shared_experts is true"),
    ],
)
def test_what_is_wrong_in_a_file_is_named(tmp_path: Path, content: Any, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        read_choice(write(tmp_path / "e.json", content))


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ({0: (1,), 1: (1,), 2: (1,)}, "no MoE layer 0; this model's MoE layers are 1, 2"),
        ({1: (1,)}, "layer 2 is missing"),
        ({1: (1, 8), 2: ()}, "layer 1 names expert 8; this model's are 0 to 7"),
    ],
)
def test_a_choice_for_another_model_is_refused(base: Path, layers: Any, message: str) -> None:
    choice = ExpertChoice(layers, "e.json")
    with pytest.raises(ModelError, match=f"e.json: .*{message}"):
        train_chosen_experts(small_model(), choice)
    with pytest.raises(ModelError, match=message):
        adapted(base, choice)


def test_no_file_and_no_experts_among_the_targets(base: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="dsv2 experts RECIPE"):
        read_choice(tmp_path / "none.json")
    with pytest.raises(ModelError, match="add experts to"):
        apply_lora(load_base(str(base)), lora_config(["attention"]), experts=CHOICE)


def test_the_others_are_zeros_on_disk(base: Path, tmp_path: Path) -> None:
    save_directory(shaken(base), tokenizer(), tmp_path / "a")
    tensors = load_file(tmp_path / "a" / WEIGHTS)
    name = next(n for n in tensors if "layers.1.mlp.experts.lora_B" in n)
    live = expert_stack(name, tensors[name]).flatten(1).any(1).nonzero().flatten().tolist()
    assert live == [1, 4, 6] and tensors[name].shape == (32, RANK * 8)
