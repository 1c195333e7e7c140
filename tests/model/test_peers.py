"""What transformers' and PEFT's own users rely on, beside results: the order of an output's entries, the names of
implementations, attention weights of decode steps, batches of several adapters, quantised weights."""

from typing import Any

import pytest
import torch
from accelerate.utils.operations import convert_outputs_to_fp32
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers.modeling_outputs import MoeCausalLMOutputWithPast

from deepseek_v2_modeling import DeepseekV2ForSequenceClassification, LatentCache, ModelError, lora_config

from ..helpers.models import logits_of, random_ids, shake, small_config, small_model

ENTRIES = ["loss", "logits", "aux_loss"]


def test_order_of_entries_in_training():
    """The balance loss is last: whoever takes the first entry wants the loss, or the logits."""
    model, ids = small_model().train(), random_ids(2, 6)
    out = model(ids)
    assert list(out) == ["logits", "aux_loss"] and out[0] is out.logits
    assert model(ids, return_dict=False)[0].shape == (2, 6, 61)
    loss, logits, aux_loss = model(ids, labels=ids, return_dict=False)
    assert loss.shape == aux_loss.shape == () and logits.shape == (2, 6, 61) and aux_loss > 0


@pytest.mark.parametrize("how", ["dict", "unpacked", "items", "keys", "values", "copied", "pytree"])
def test_all_entries_of_a_training_output(how: str):
    model, ids = small_model().train(), random_ids(2, 6)
    out = model(ids, labels=ids)
    assert isinstance(out, MoeCausalLMOutputWithPast) and "logits" in out and "make_logits" not in out
    flat, spec = torch.utils._pytree.tree_flatten(out) if how == "pytree" else (None, None)
    found: dict[str, Any] = {
        "dict": lambda: dict(out),
        "unpacked": lambda: {**out},
        "items": lambda: dict(list(out.items())),
        "keys": lambda: {name: out[name] for name in out.keys()},  # noqa: SIM118 - it is what is tested
        "values": lambda: dict(zip(ENTRIES, out.values(), strict=True)),
        "copied": lambda: type(out)(dict(out)),
        "pytree": lambda: dict(torch.utils._pytree.tree_unflatten(flat, spec)),
    }[how]()
    assert list(found) == ENTRIES and len(out) == 3
    torch.testing.assert_close(found["logits"], model(ids).logits)


def test_logits_are_not_made_by_mixed_precision():
    """accelerate copies every output; a training loss that is made without the full logits stays so."""
    model, ids = small_model().train(), random_ids(2, 6)
    made: list[Any] = []
    model.lm_head.register_forward_hook(lambda _, x, y: made.append(y.shape))
    out = convert_outputs_to_fp32(model.forward)(ids, labels=ids)
    assert all(len(shape) == 2 for shape in made)  # blocks of tokens
    assert out["loss"].requires_grad and all(len(shape) == 2 for shape in made)
    assert out.logits.shape == (2, 6, 61) and list(out) == ENTRIES


def test_a_cache_in_training():
    """When the call asks for one, not when the config does, as it does by default."""
    model, ids = small_model().train(), random_ids(2, 6)
    assert model(ids, labels=ids).past_key_values is None
    out = model(ids, labels=ids, use_cache=True)
    assert isinstance(out.past_key_values, LatentCache) and out.past_key_values.get_seq_length() == 6
    out.loss.backward()
    assert model.model.layers[0].self_attn.kv_b_proj.weight.grad.any()
    scored = small_model(DeepseekV2ForSequenceClassification, num_labels=1).train()(ids, use_cache=True)
    assert scored.past_key_values.get_seq_length() == 6
    with torch.no_grad():
        assert model(ids).past_key_values.get_seq_length() == 6


@pytest.mark.parametrize("quantization", [None, "int8"])
def test_iterating_over_a_cache(quantization: Any):
    model, ids = small_model(kv_lora_rank=32, qk_rope_head_dim=16), random_ids(2, 6)
    cache = LatentCache(model.config, quantization)
    assert list(cache) == [(None, None)] * 3
    logits_of(model, ids, past_key_values=cache)
    layers = list(cache)
    assert len(layers) == len(cache) == 3
    assert all(latent.shape == (2, 1, 6, 32) and key.shape == (2, 1, 6, 16) for latent, key in layers)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("new", [1, 3])
def test_attention_weights_of_decode_steps(dtype: torch.dtype, new: int):
    """Absorbed decoding gives the weights of a whole forward, padding included; under eager only, as everywhere."""
    model, ids = small_model(attn_implementation="eager", first_k_dense_replace=3).to(dtype), random_ids(2, 9)
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[0, :2] = 0
    with torch.no_grad():
        whole = model(ids, attention_mask=mask, output_attentions=True).attentions
        cache = model(ids[:, :6], attention_mask=mask[:, :6]).past_key_values
        step = model(
            ids[:, 6 : 6 + new], attention_mask=mask[:, : 6 + new], past_key_values=cache, output_attentions=True
        ).attentions
    for one, other in zip(step, whole, strict=True):
        assert one.shape == (2, 4, new, 6 + new) and one.dtype == dtype
        torch.testing.assert_close(
            one, other[:, :, 6 : 6 + new, : 6 + new], atol=2e-2 if dtype.itemsize < 4 else 1e-5, rtol=0
        )


def test_generate_with_attentions_and_an_assistant():
    model, ids = small_model(attn_implementation="eager"), random_ids(1, 6)
    given: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "output_attentions": True}
    out = model.generate(ids, **given, return_dict_in_generate=True)
    assert [step[0].shape for step in out.attentions] == [(1, 4, 6, 6)] + [(1, 4, 1, n) for n in (7, 8, 9)]
    assisted = model.generate(ids, assistant_model=small_model(seed=5), **given, return_dict_in_generate=True)
    assert torch.equal(assisted.sequences, out.sequences) and len(assisted.attentions) == 4


@pytest.mark.parametrize("name", ["grouped_mm", "batched_mm", "eager"])
def test_names_of_experts_implementations(name: str, tmp_path: Any):
    """Accepted, with the same results: there is one way here."""
    model, ids = small_model(), random_ids(2, 6)
    wanted = logits_of(model, ids)
    model.set_experts_implementation(name)
    assert model.config._experts_implementation == name
    assert torch.equal(logits_of(model, ids), wanted)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, experts_implementation=name)
    assert loaded.config._experts_implementation == name and torch.equal(logits_of(loaded, ids), wanted)


def test_an_unknown_experts_implementation():
    with pytest.raises(ModelError, match='experts_implementation "sonic" is not supported'):
        small_model().set_experts_implementation("sonic")


@pytest.mark.parametrize("targets", [("experts",), ("router",), ("attention", "experts.down")])
def test_mixed_batches_on_experts_are_refused(targets: tuple[str, ...]):
    """As PEFT does on stock; read past its forward, each row would get the active adapter."""
    model = get_peft_model(small_model(), lora_config(targets=targets, r=2, alpha=4))
    model.add_adapter("other", model.peft_config["default"])
    model.eval()
    ids = random_ids(2, 6)
    calls: list[Any] = [(model, {}), (model.generate, {"max_new_tokens": 2})]
    for call, more in calls:
        with pytest.raises(ValueError, match="adapter_names"):
            call(input_ids=ids, adapter_names=["default", "other"], **more)


def test_mixed_batches_on_attention():
    """Each row has the logits of its own adapter, prefill and decoding."""
    model = get_peft_model(small_model(), lora_config(targets=("attention",), r=2, alpha=4))
    model.add_adapter("other", model.peft_config["default"])
    shake(model, 3)
    shake(model, 4, "other")
    model.eval()
    ids = random_ids(3, 8)
    names = ["default", "__base__", "other"]
    with torch.no_grad():
        first = model(input_ids=ids[:, :7], adapter_names=names, use_cache=True)
        step = model(input_ids=ids[:, 7:], adapter_names=names, past_key_values=first.past_key_values).logits
    found = torch.cat((first.logits, step), 1)
    for row, name in enumerate(names):
        if name == "__base__":
            with model.disable_adapter():
                wanted = logits_of(model, ids[row : row + 1])
        else:
            model.set_adapter(name)
            wanted = logits_of(model, ids[row : row + 1])
        torch.testing.assert_close(found[row : row + 1], wanted, atol=1e-4, rtol=1e-4)


class Halved(torch.Tensor):
    """A weight that is not its numbers, as a quantised one: products see the doubled values, and a view is refused."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.Tensor.unflatten, torch.Tensor.split, torch.Tensor.float, torch.Tensor.to):
            raise NotImplementedError(func)
        if func is torch.Tensor.detach:
            return args[0]
        plain = [
            a.as_subclass(torch.Tensor) * 2 if isinstance(a, cls) and func is nn.functional.linear else a for a in args
        ]
        with torch._C.DisableTorchFunctionSubclass():
            return func(*plain, **(kwargs or {}))


def test_weights_of_a_tensor_subclass_are_decoded_expanded():
    """torchao's quantised weights are such: they take part in products, and in little else."""
    model, ids = small_model(), random_ids(2, 9)
    wanted = logits_of(model, ids)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            half = (module.weight.detach() / 2).as_subclass(Halved)
            module.weight = nn.Parameter(half, requires_grad=False)
    with torch.no_grad():
        first = model(ids[:, :7], use_cache=True)
        steps = [model(ids[:, i : i + 1], past_key_values=first.past_key_values).logits for i in (7, 8)]
    torch.testing.assert_close(torch.cat((first.logits, *steps), 1), wanted)


def test_lora_config_without_targets_is_refused():
    """PEFT's conversion of MoE configs comes before its defaults: it would adapt nothing, and says so."""
    with pytest.raises(ValueError, match="target_modules"):
        get_peft_model(small_model(), LoraConfig())


def test_dynamic_rope_is_refused():
    with pytest.raises(ModelError, match='rope_scaling type "dynamic" is not supported'):
        small_config(rope_scaling={"type": "dynamic", "factor": 2.0})


def test_flags():
    assert type(small_model())._can_compile_fullgraph
