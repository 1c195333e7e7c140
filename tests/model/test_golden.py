"""The model against the golden tensors of `reference/` (see its README for what each one is)."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from deepseek_v2_modeling import DeepseekV2ForCausalLM, record_routing
from deepseek_v2_modeling.layers.balance_losses import RouterOutput, layer_losses, sequence_ids
from deepseek_v2_modeling.layers.moe import expert_weights
from deepseek_v2_modeling.layers.rope import RotaryEmbedding, inverse_frequencies, softmax_scale

from ..helpers.models import REFERENCE, relative

MOE_LAYERS = (1, 2)
WEIGHT_TOLERANCE = {"lite": 1e-5, "full": 1e-4}
GRADIENT_TOLERANCE = 2e-5
# Settings read at each forward that give the gradients of each mode.
MODES: dict[str, dict[str, Any]] = {"seq": {}, "tok": {"seq_aux": False}, "none": {"aux_loss_alpha": 0.0}}


@dataclass
class Golden:
    name: str
    model: DeepseekV2ForCausalLM
    tensors: dict[str, torch.Tensor]

    def __getitem__(self, key: str) -> torch.Tensor:
        return self.tensors[key]

    def set(self, **settings: Any) -> None:
        for key, value in settings.items():
            setattr(self.model.config, key, value)


@pytest.fixture(params=["lite", "full"])
def golden(request: pytest.FixtureRequest) -> Golden:
    """With eager attention."""
    return load(request.param, "eager")


@pytest.fixture(params=["lite-eager", "lite-sdpa", "full-eager", "full-sdpa"])
def either(request: pytest.FixtureRequest) -> Golden:
    """With each kind of attention."""
    return load(*request.param.split("-"))


def load(name: str, attention: str) -> Golden:
    directory = REFERENCE / name
    model = DeepseekV2ForCausalLM.from_pretrained(directory, attn_implementation=attention).eval()
    assert model.dtype == torch.float32 and model.config._attn_implementation == attention
    return Golden(name, model, load_file(directory / "golden.safetensors"))


def close(found: torch.Tensor, wanted: torch.Tensor, tolerance: float) -> None:
    torch.testing.assert_close(found.detach().to(wanted.dtype), wanted, rtol=0, atol=tolerance)


def routers_of(golden: Golden, kind: str, **inputs: Any) -> Iterator[tuple[int, RouterOutput]]:
    """(layer, what its router saw and chose) of one forward; also checks that nothing is missing."""
    with record_routing(golden.model) as routes:
        logits = golden.model(**inputs, output_router_logits=True).router_logits
    assert len(routes) == 1 and len(routes[0]) == len(logits) == len(MOE_LAYERS), kind
    for layer, seen, chosen in zip(MOE_LAYERS, logits, routes[0], strict=True):
        yield layer, RouterOutput(seen, chosen.flatten(0, 1))


def test_logits_and_hidden_states(either: Golden):
    real = either["attention_mask"].bool()
    with torch.no_grad():
        out = either.model(either["input_ids"], attention_mask=either["attention_mask"], output_hidden_states=True)
    close(out.logits[real], either["logits"][real], 5e-5)
    assert len(out.hidden_states) == 4
    for found, wanted in zip(out.hidden_states, either["hidden_states"], strict=True):
        close(found[real], wanted[real], 2e-4)


@torch.no_grad()
def test_router(either: Golden):
    mask = either["attention_mask"]
    real = mask.flatten().bool()
    for layer, router in routers_of(either, "eval", input_ids=either["input_ids"], attention_mask=mask):
        wanted = {k: either[f"router.{layer}.{k}"].flatten(0, 1) for k in ("scores", "topk_idx", "topk_weight")}
        scores = router.logits.softmax(-1)
        chosen, order = router.experts.sort(-1)
        weights = expert_weights(either.model.config, scores, router.experts).gather(1, order)
        close(scores[real], wanted["scores"][real], 1e-5)
        assert torch.equal(chosen[real], wanted["topk_idx"][real])
        close(weights[real], wanted["topk_weight"][real], WEIGHT_TOLERANCE[either.name])


def test_rope(golden: Golden):
    """The reference lays the frequencies out as two equal halves; we rotate interleaved pairs by one set."""
    config, positions = golden.model.config, torch.arange(16).unsqueeze(0)
    close(inverse_frequencies(config), golden["rope_inv_freq"], 1e-6)
    for found, name in zip(RotaryEmbedding(config)(positions), ("rope_cos", "rope_sin"), strict=True):
        assert torch.equal(*golden[name].chunk(2, dim=-1))
        close(found[0], golden[name].chunk(2, dim=-1)[0], 1e-6)


def test_softmax_scale(golden: Golden):
    wanted = golden["softmax_scale"].item()
    assert softmax_scale(golden.model.config) == pytest.approx(wanted, rel=1e-12)
    assert {layer.self_attn.scaling for layer in golden.model.model.layers} == {softmax_scale(golden.model.config)}


def test_training_routes(golden: Golden):
    golden.model.train()
    for layer, router in routers_of(golden, "train", input_ids=golden["train_input_ids"]):
        wanted = golden[f"train_router.{layer}.topk_idx"].flatten(0, 1)
        assert torch.equal(router.experts.sort(-1).values, wanted)


@pytest.mark.parametrize("mode", MODES)
def test_training_losses(either: Golden, mode: str):
    either.set(**MODES[mode])
    out = either.model.train()(input_ids=either["train_input_ids"], labels=either["train_labels"])
    if mode == "none":
        assert out.aux_loss is None
        close(out.loss, either["train_loss"][0], 5e-6)
    else:
        close(out.aux_loss, either[f"train_aux_loss_{mode}"].sum(), 1e-6)
        close(out.loss - out.aux_loss, either["train_loss"][0], 5e-6)


@pytest.mark.parametrize("mode", ["seq", "tok"])
def test_balance_loss_of_each_layer(golden: Golden, mode: str):
    golden.set(**MODES[mode])
    ids = golden["train_input_ids"]
    where = sequence_ids(ids.shape, None, None, ids.device)
    for i, (_, router) in enumerate(routers_of(golden, "train", input_ids=ids)):
        losses = layer_losses(golden.model.config, router, *where)
        close(losses["expert"], golden[f"train_aux_loss_{mode}"][i], 1e-6)


def test_eval_loss_has_no_balance_loss(golden: Golden):
    out = golden.model(input_ids=golden["train_input_ids"], labels=golden["train_labels"])
    assert out.aux_loss is None
    close(out.loss, golden["train_loss"][0], 5e-6)


@pytest.mark.parametrize("mode", ["seq", "tok"])
def test_padded_batch(either: Golden, mode: str):
    """Ours leaves padding out: the same numbers as from each row without its padding, which differ from the
    reference's. With padding counted they are the reference's."""
    either.set(**MODES[mode])
    either.model.train()
    ids, mask = either["pad_input_ids"], either["pad_attention_mask"]
    out = either.model(input_ids=ids, attention_mask=mask, labels=either["pad_labels"])
    close(out.loss - out.aux_loss, either["pad_loss"][0], 5e-6)

    config, counted, direct = either.model.config, [], []
    routers = list(routers_of(either, "pad", input_ids=ids, attention_mask=mask))
    rows = [
        list(routers_of(either, "row", input_ids=row[keep][None])) for row, keep in zip(ids, mask.bool(), strict=True)
    ]
    for i, (_, router) in enumerate(routers):
        counted.append(layer_losses(config, router, *sequence_ids(ids.shape, None, None, ids.device))["expert"])
        alone = [row[i][1] for row in rows]
        direct.append(loss_of_rows(alone, config.aux_loss_alpha, mode))
    close(torch.stack(counted), either[f"pad_aux_loss_{mode}"], 1e-6)
    close(out.aux_loss, torch.stack(direct).sum(), 1e-6)
    assert abs(out.aux_loss.item() - either[f"pad_aux_loss_{mode}"].sum().item()) > 1e-5


def loss_of_rows(rows: list[RouterOutput], alpha: float, mode: str) -> torch.Tensor:
    """The README's formula on rows without padding: f = share of the choices * E, P = mean of the score."""

    def balance(scores: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        experts = scores.shape[-1]
        return (torch.bincount(chosen.flatten(), minlength=experts) / chosen.numel() * experts * scores.mean(0)).sum()

    pairs = [(row.logits.softmax(-1), row.experts) for row in rows]
    if mode == "tok":
        pairs = [tuple(torch.cat(parts) for parts in zip(*pairs, strict=True))]
    return alpha * torch.stack([balance(*pair) for pair in pairs]).mean()


def hub_gradients(model: DeepseekV2ForCausalLM) -> dict[str, torch.Tensor]:
    """{name in the hub's layout: gradient}, the fused experts taken apart."""
    found = {}
    for name, parameter in model.named_parameters():
        grad = parameter.grad
        assert grad is not None, name
        if name.endswith("experts.gate_up_proj"):
            for e, (gate, up) in enumerate(g.chunk(2) for g in grad):
                found[name.replace("gate_up_proj", f"{e}.gate_proj.weight")] = gate
                found[name.replace("gate_up_proj", f"{e}.up_proj.weight")] = up
        elif name.endswith("experts.down_proj"):
            found |= {name.replace("down_proj", f"{e}.down_proj.weight"): g for e, g in enumerate(grad)}
        else:
            found[name] = grad
    return found


@pytest.mark.parametrize("mode", MODES)
def test_gradients(either: Golden, mode: str):
    either.set(**MODES[mode])
    either.model.train()(input_ids=either["train_input_ids"], labels=either["train_labels"]).loss.backward()
    found = hub_gradients(either.model)

    norms = json.loads((REFERENCE / either.name / "grad_norms.json").read_text())[mode]
    assert set(found) == set(norms)
    for name, norm in norms.items():
        assert found[name].norm().item() == pytest.approx(norm, rel=GRADIENT_TOLERANCE, abs=1e-9), name

    prefix = f"grad_{mode}/"
    stored = {key.removeprefix(prefix): value for key, value in either.tensors.items() if key.startswith(prefix)}
    assert stored
    for name, wanted in stored.items():
        assert relative(found[name], wanted) < GRADIENT_TOLERANCE, name


@torch.no_grad()
def test_greedy_without_cache(either: Golden):
    ids, margins = either["prompt_ids"], []
    for _ in either["greedy_ids"][0]:
        best = either.model(ids, use_cache=False).logits[:, -1].topk(2)
        margins.append(best.values[0, 0] - best.values[0, 1])
        ids = torch.cat((ids, best.indices[:, :1]), dim=-1)
    assert torch.equal(ids[:, either["prompt_ids"].shape[1] :], either["greedy_ids"])
    close(torch.stack(margins), either["greedy_margin"], 1e-4)


def test_greedy_with_cache(either: Golden):
    either.model.generation_config.eos_token_id = None  # not special in the reference's run
    prompt, wanted = either["prompt_ids"], either["greedy_ids"]
    found = either.model.generate(prompt, do_sample=False, max_new_tokens=wanted.shape[1])
    assert torch.equal(found[:, prompt.shape[1] :], wanted)
