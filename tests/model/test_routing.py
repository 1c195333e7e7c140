"""Recording and replaying the experts that a forward chose."""

from typing import Any

import pytest
import torch

from deepseek_v2_modeling import apply_lora, lora_config, record_routing, replay_routing

from ..helpers.models import logits_of, random_ids, small_model


def recorded(model: Any, ids: torch.Tensor, **kwargs: Any) -> list[list[torch.Tensor]]:
    with record_routing(model) as routes:
        logits_of(model, ids, **kwargs)
    return routes


def other_gates(model: Any) -> Any:
    """Changes the routers so much that other experts are chosen."""
    torch.manual_seed(5)
    for layer in model.model.layers[1:]:
        torch.nn.init.normal_(layer.mlp.gate.weight, std=0.3)
    return model


def test_recording():
    model, ids = small_model(), random_ids(2, 7)
    with record_routing(model) as routes:
        first = logits_of(model, ids)
        logits_of(model, ids[:1, :3])
    logits_of(model, ids)
    assert [[tuple(layer.shape) for layer in forward] for forward in routes] == [[(2, 7, 3)] * 2, [(1, 3, 3)] * 2]
    assert torch.equal(first, logits_of(model, ids))
    assert not any(layer.requires_grad for forward in routes for layer in forward)
    assert not torch.equal(routes[0][0], routes[0][1])


def test_replay_of_its_own_routes_changes_nothing():
    model, ids = small_model(), random_ids(2, 7)
    routes, wanted = recorded(model, ids), logits_of(model, ids)
    with replay_routing(model, routes):
        assert torch.equal(logits_of(model, ids), wanted)
    with replay_routing(model, routes):  # the recording can be used again
        assert torch.equal(logits_of(model, ids), wanted)


def test_replay_forces_the_experts_and_weighs_them_by_the_gate():
    model, ids = small_model(), random_ids(2, 7)
    routes = recorded(model, ids)
    changed = other_gates(small_model())
    own = recorded(changed, ids)
    assert any(not torch.equal(a.sort(-1).values, b.sort(-1).values) for a, b in zip(routes[0], own[0], strict=True))
    with record_routing(changed) as used, replay_routing(changed, routes):
        found = logits_of(changed, ids)
    assert all(torch.equal(a, b) for a, b in zip(used[0], routes[0], strict=True))
    assert not torch.allclose(found, logits_of(changed, ids), atol=1e-3)  # other experts than its own
    assert not torch.allclose(found, logits_of(model, ids), atol=1e-3)  # the same ones, other weights
    assert torch.equal(recorded(changed, ids)[0][0], own[0][0])  # replay is over


def test_order_of_the_experts_has_no_meaning():
    model, ids = small_model(), random_ids(1, 5)
    routes = [[layer.flip(-1) for layer in forward] for forward in recorded(model, ids)]
    with replay_routing(model, routes):
        torch.testing.assert_close(logits_of(model, ids), logits_of(small_model(), ids))


def train_grads(model: Any, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model.train()(ids, labels=ids).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gates_get_gradients(checkpointing: bool):
    model, ids = small_model(), random_ids(2, 7)
    routes, wanted = recorded(model, ids), train_grads(model, ids)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    with replay_routing(model, routes):
        found = train_grads(model, ids)
    assert all(found[f"model.layers.{i}.mlp.gate.weight"].norm() > 1e-4 for i in (1, 2))
    for name, grad in wanted.items():
        torch.testing.assert_close(found[name], grad, msg=name)


def test_checkpointing_recomputes_with_the_replayed_experts():
    """The recompute runs after the forward, and may run after the context is closed."""
    ids = random_ids(2, 7)
    routes = recorded(small_model(), ids)
    grads = []
    for checkpointing in (False, True):
        model = other_gates(small_model())
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        with replay_routing(model, routes):
            loss = model.train()(ids, labels=ids).loss
        loss.backward()
        grads.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, msg=name)


def test_generation_replayed_in_one_forward():
    """`generate` records the prompt and then each token; joined, they serve a forward over the whole answer."""
    model, ids = small_model(eos_token_id=None), random_ids(2, 5)
    with record_routing(model) as routes:
        out = model.generate(ids, do_sample=False, max_new_tokens=6, output_logits=True, return_dict_in_generate=True)
    assert [forward[0].shape[1] for forward in routes] == [5, 1, 1, 1, 1, 1]
    whole = [[torch.cat(layers, dim=1) for layers in zip(*routes, strict=True)]]
    with replay_routing(model, whole):
        logits = logits_of(model, out.sequences[:, :-1])
    torch.testing.assert_close(logits[:, 4:], torch.stack(out.logits, dim=1), rtol=0, atol=1e-5)


def test_generation_under_replay():
    model, ids = small_model(), random_ids(2, 5)
    with record_routing(model) as routes:
        wanted = model.generate(ids, do_sample=False, max_new_tokens=6, min_new_tokens=6)
    with replay_routing(model, routes):
        assert torch.equal(model.generate(ids, do_sample=False, max_new_tokens=6, min_new_tokens=6), wanted)


@pytest.mark.parametrize(
    "change",
    [
        lambda layers: layers[:1],
        lambda layers: [*layers, layers[0]],
        lambda layers: [layer[:1] for layer in layers],
        lambda layers: [layer[:, :-1] for layer in layers],
        lambda layers: [layer[..., :2] for layer in layers],
        lambda layers: [layers[0], layers[1][..., :2]],
        lambda layers: [layer.flatten(0, 1) for layer in layers],
    ],
)
def test_wrong_shapes(change: Any):
    model, ids = small_model(), random_ids(2, 7)
    routes = [change(layers) for layers in recorded(model, ids)]
    with pytest.raises(ValueError, match="recorded routing"), replay_routing(model, routes):
        logits_of(model, ids)
    logits_of(model, ids)


def test_past_the_end():
    model, ids = small_model(), random_ids(2, 7)
    routes = recorded(model, ids)
    with replay_routing(model, routes):
        logits_of(model, ids)
        with pytest.raises(ValueError, match="no entry left"):
            logits_of(model, ids)


def test_before_the_end():
    model, ids = small_model(), random_ids(2, 7)
    with record_routing(model) as routes:
        logits_of(model, ids)
        logits_of(model, ids)
    with pytest.raises(ValueError, match="1 of the 2 forwards"), replay_routing(model, routes):
        logits_of(model, ids)
    with pytest.raises(RuntimeError, match="its own"), replay_routing(model, routes):
        raise RuntimeError("its own")
    with replay_routing(model, routes[:1]):
        logits_of(model, ids)


def test_a_recording_within_a_recording_is_part_of_both():
    model, ids = small_model(), random_ids(2, 7)
    with record_routing(model) as outer:
        logits_of(model, ids)
        with record_routing(model) as inner:
            logits_of(model, ids[:, :3])
        logits_of(model, ids[:1])
    logits_of(model, ids)
    assert [tuple(forward[0].shape) for forward in outer] == [(2, 7, 3), (2, 3, 3), (1, 7, 3)]
    assert [tuple(forward[0].shape) for forward in inner] == [(2, 3, 3)]


def test_a_replay_within_a_replay():
    model, ids = small_model(), random_ids(2, 7)
    routes = recorded(model, ids)
    with replay_routing(model, routes):
        with pytest.raises(ValueError, match="open"), replay_routing(model, routes):
            pass
        logits_of(model, ids)


def test_under_peft():
    model, ids = apply_lora(small_model(), lora_config(["experts", "router"], r=2)).eval(), random_ids(1, 6)
    routes = recorded(model, ids)
    assert len(routes) == 1
    with replay_routing(model, routes):
        torch.testing.assert_close(logits_of(model, ids), logits_of(small_model(), ids), rtol=0, atol=1e-6)


def test_without_a_model():
    for use in (lambda: record_routing(torch.nn.Linear(1, 1)), lambda: replay_routing(torch.nn.Linear(1, 1), [])):
        with pytest.raises(ValueError, match="Linear"), use():
            pass
