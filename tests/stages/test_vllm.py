"""Rollouts by vLLM: weights go over as its deepseek_v2 loads them, and what it lacks is refused before the run."""

import copy
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx2
import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from trl.generation import vllm_client, vllm_generation

from deepseek_v2_modeling import ModelError, apply_lora, lora_config
from deepseek_v2_modeling.adapters import check_mergeable, hub_weights, merged_copy
from recipes.cli import main
from rl.rollouts.vllm_engine import send_hub_weights

from ..helpers.broken_recipes import RECIPES, ROLLOUT, make_world
from ..helpers.rl import run, trainer_for
from ..helpers.stages import byte_tokenizer, chat_model, lines
from ..helpers.vllm_stand_in import StandIn, serving

ALL = ("attention", "experts", "shared_experts", "dense")


def adapted(**changes: Any) -> Any:
    """A model whose adapters, kv_b_proj's among them, do something."""
    torch.manual_seed(0)
    model = apply_lora(chat_model(**changes), lora_config(ALL, r=2))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    """A stand-in, which TRL's client finds; vLLM itself is not installed."""
    stand_in = StandIn(chat_model(seed=5).eval(), [byte_tokenizer().eos_token_id])

    class Transport:
        @staticmethod
        def trainer_send_weights(iterator: Any, trainer_args: Any) -> None:
            stand_in.transfer(iterator)

    def init(self: Any) -> None:
        """As TRL's, without NCCL, and with a client that needs neither vLLM nor requests."""
        client = object.__new__(vllm_client.VLLMClient)
        client.session, client.base_url, client.model = httpx2.Client(), self.server_base_url, "served"
        client.communicator, client._updating_weights = None, False
        self.vllm_client = client

    monkeypatch.setattr(vllm_client, "NCCLWeightTransferEngine", Transport, raising=False)
    monkeypatch.setattr(vllm_client, "NCCLTrainerSendWeightsArgs", dict, raising=False)
    monkeypatch.setattr(vllm_generation.VLLMGeneration, "_init_vllm", init)
    monkeypatch.setattr("rl.rollouts.vllm_engine.is_vllm_available", lambda: True)
    with serving(stand_in) as url:
        stand_in.url = url  # type: ignore[attr-defined]
        yield stand_in


def asked(server: Any, **training: Any) -> dict[str, Any]:
    return {"use_vllm": True, "vllm_mode": "server", "vllm_server_base_url": server.url, **training}


@pytest.mark.parametrize("tied", [False, True])
def test_weights_have_the_hubs_names_and_adapters_are_merged(tied: bool, tmp_path: Path):
    model = adapted(tie_word_embeddings=tied)
    found = dict(hub_weights(model))
    merged_copy(model).save_pretrained(tmp_path)
    saved = type(model.get_base_model()).from_pretrained(tmp_path)
    wanted = dict(hub_weights(saved))
    assert found.keys() == wanted.keys() and "model.layers.1.mlp.experts.7.gate_proj.weight" in found
    for name, value in found.items():
        torch.testing.assert_close(value, wanted[name], atol=1e-6, rtol=1e-6)
    assert ("lm_head.weight" in found) is not tied


def test_adapters_that_cannot_be_merged_are_refused():
    check_mergeable(adapted())
    dora = get_peft_model(chat_model(), LoraConfig(target_modules=["kv_b_proj"], r=2, use_dora=True))
    with pytest.raises(ModelError, match=r"the adapter of .*kv_b_proj cannot be merged"):
        check_mergeable(dora)


@pytest.mark.parametrize("full", [True, False])
def test_a_run_samples_from_the_weights_that_went_over(full: bool, server: StandIn, tmp_path: Path):
    """The sampler's log-probabilities are the policy's at each step, so that it has the policy's weights."""
    model = chat_model() if full else adapted()
    run(tmp_path, model, training=asked(server, max_steps=3, save_strategy="no", learning_rate=1e-2))
    logged = [line for line in lines(tmp_path / "metrics.jsonl") if "mismatch/k3" in line]
    assert len(logged) == 3 and all(line["mismatch/k3"] < 1e-8 for line in logged)
    assert all(line["sampling/sampling_logp_difference/max"] < 1e-3 for line in logged)
    assert server.faults == [] and server.updates == 3


def test_held_out_prompts_are_answered_by_the_weights_of_their_step(server: StandIn, tmp_path: Path):
    trainer = trainer_for(tmp_path, training=asked(server))
    trainer.eval_dataset = trainer.train_dataset.select(range(2))
    trainer.evaluate()
    assert server.updates == 1 and server.faults == []
    for name, value in hub_weights(trainer.model):
        assert torch.equal(server.received[name], value)


def test_a_colocated_engine_reloads_all_weights_at_once():
    """Not one by one as TRL does: vLLM would keep what it made of the old ones (packed, absorbed)."""
    model, taken = adapted(), list[dict[str, torch.Tensor]]()
    worker = SimpleNamespace(reload_weights=lambda weights_iterator: taken.append(dict(weights_iterator)))
    executor = SimpleNamespace(model_executor=SimpleNamespace(driver_worker=worker))
    engine = SimpleNamespace(llm_engine=executor, reset_prefix_cache=lambda: None)
    generation: Any = SimpleNamespace(mode="colocate", enable_sleep_mode=False, llm=engine, model=model)
    send_hub_weights(generation)
    generation.sync_weights()
    wanted = dict(hub_weights(model))
    assert len(taken) == 1 and taken[0].keys() == wanted.keys()
    assert all(torch.equal(value, wanted[name]) for name, value in taken[0].items())


def recipe_file(**changes: Any) -> None:
    written = copy.deepcopy(RECIPES["rl"])
    written["training"] = {**ROLLOUT, "use_vllm": True, "vllm_mode": "server", **changes.pop("training", {})}
    Path("recipe.yaml").write_text(yaml.safe_dump({**written, **changes}))


def refused(capsys: Any) -> str:
    """The one message of check, which is also that of the run."""
    messages = []
    for command in ("check", "rl"):
        assert main([command, "recipe.yaml"]) == 2
        messages.append(" ".join(capsys.readouterr().err.split()))
    assert "vLLM" in messages[0] and messages[0].split("training.use_vllm: ")[1] in messages[1]
    return messages[0]


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    make_world(tmp_path)
    return tmp_path


def test_check_refuses_what_is_missing(world: Path, server: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any):
    recipe_file(training={"vllm_server_base_url": "http://127.0.0.1:1"})
    assert "no vLLM server answers at http://127.0.0.1:1 (ConnectError); start it with" in refused(capsys)
    recipe_file(training={"vllm_server_base_url": server.url})
    server.weight_transfer = False
    assert "takes no weights; start it with" in refused(capsys)
    server.developer = False
    assert "because it runs without VLLM_SERVER_DEV_MODE=1" in refused(capsys)
    monkeypatch.setattr("rl.rollouts.vllm_engine.is_vllm_available", lambda: False)
    assert "vLLM is not installed; install it" in refused(capsys)


def test_check_and_run_accept_a_server(world: Path, server: Any, capsys: Any):
    recipe_file(training={"vllm_server_base_url": server.url})
    assert main(["check", "recipe.yaml"]) == 0, capsys.readouterr().err
    assert main(["rl", "recipe.yaml"]) == 0, capsys.readouterr().err
    assert server.faults == [] and server.updates == 1
