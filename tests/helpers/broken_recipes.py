"""Recipes of every kind that run in a second, each with one thing broken: `dsv2 check` and the run must agree on
them."""

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .models import IN_BLOCKS
from .stages import assistant, byte_tokenizer, chat_model, conversations, pairs, user

Path_ = tuple[str | int, ...]
REMOVED = "(the key is taken out)"
JUNK: list[Any] = [None, True, -1, 0, 1, 2.5, 1e30, 10**30, "", "banana", "a\0b", [], {}, [None], {"a": 1}, REMOVED]
LORA = {"targets": ["attention"], "r": 2}
TRAINING = {
    "max_length": 64,
    "per_device_train_batch_size": 2,
    "per_device_eval_batch_size": 2,
    "max_steps": 1,
    "logging_steps": 1,
}
ROLLOUT = {
    "per_device_train_batch_size": 4,
    "num_generations": 2,
    "max_completion_length": 4,
    "max_steps": 1,
    "logging_steps": 1,
    "loss_type": "grpo",
    "use_bias_correction_kl": False,
}


def _task(metric: str, data: str = "chat.jsonl", **settings: Any) -> dict[str, Any]:
    return {"name": f"a_{metric}", "metric": metric, "data": [{"path": data}], **settings}


def _recipe(stage: str, data: str | None = None, **sections: Any) -> dict[str, Any]:
    listed = {"data": [{"path": data}]} if data else {}
    return {"stage": stage, "model": {"path": "base"}, **listed, **sections, "output_dir": "out"}


RECIPES: dict[str, dict[str, Any]] = {
    "sft": _recipe(
        "sft", "chat.jsonl", lora=LORA, eval_data=[{"path": "held_out.jsonl"}],
        training={**TRAINING, "eval_strategy": "steps", "eval_steps": 1},
    ),
    "sft_quantized": _recipe(
        "sft", "chat.jsonl", lora=LORA, model={"path": "wide", "quantization": "nf4"}, training=TRAINING
    ),
    "sft_full": _recipe("sft", "chat.jsonl", lora=None, training=TRAINING),
    "reward": _recipe(
        "reward", "pairs.jsonl", lora=LORA, loss="pairwise", eval_data=[{"path": "pairs.jsonl"}], training=TRAINING
    ),
    "reward_pointwise": _recipe("reward", "judged.jsonl", lora=None, loss="pointwise", training=TRAINING),
    "rl": _recipe(
        "rl", "chat.jsonl", lora=LORA, rewards=[{"rule": "number"}, {"rule": "format"}], training=ROLLOUT
    ),
    "rl_model": _recipe(
        "rl", "chat.jsonl", lora=LORA, model={"path": "runs/sft"}, training=ROLLOUT, rollout={"max_cache_gb": 1},
        rewards=[{"model": "runs/reward"}, {"rule": "format"}],
    ),
    "rl_tools": _recipe(
        "rl", "chat.jsonl", lora=LORA, rewards=[{"rule": "number"}], eval_data=[{"path": "chat.jsonl"}],
        training={**ROLLOUT, "eval_strategy": "steps", "eval_steps": 1, "num_generations_eval": 1},
        environment={"python": "conversations.environments:Calculator", "settings": {}},
    ),
    "rl_replay": _recipe(
        "rl", "chat.jsonl", lora=None, rewards=[{"rule": "number"}], training={**ROLLOUT, "num_iterations": 2},
        routing_replay="rollout", curriculum={"by": "pass_rate", "target": 0.5}, dynamic_sampling={"max_rounds": 1},
        rollout_correction={"mode": "token_truncate", "cap": 2},
    ),
    "dpo": _recipe(
        "rl", "pairs.jsonl", method="dpo", lora=LORA, eval_data=[{"path": "pairs.jsonl"}],
        training={**TRAINING, "eval_strategy": "steps", "eval_steps": 1},
    ),
    "kto": _recipe("rl", "judged.jsonl", method="kto", lora=None, training=TRAINING, parallel=None),
    "simpo": _recipe("rl", "pairs.jsonl", method="simpo", lora=None, training=TRAINING),
    "eval": _recipe(
        "eval",
        tasks=[
            _task("exact_match", rule="number", temperatures=[0, 1], max_new_tokens=3, stop=["x"]), _task("loss"),
            _task("refusal", max_new_tokens=2), _task("format", max_new_tokens=2),
        ],
    ),
    "eval_tools": _recipe(
        "eval",
        tasks=[
            _task(
                "exact_match", max_new_tokens=2, limit=2, max_tool_calling_iterations=1,
                environment={"python": "conversations.environments:Calculator", "settings": {}},
            ),
        ],
    ),
    "eval_reward": _recipe("eval", model={"path": "runs/reward"}, tasks=[_task("pair_accuracy", "pairs.jsonl")]),
    "eval_benchmark": _recipe(
        "eval", chat_template=None,
        tasks=[
            {
                "task": "gsm8k_local", "name": "sums", "path": "sums.jsonl", "fewshot_path": "sums.jsonl",
                "num_fewshot": 1, "limit": 2, "temperature": 1, "num_answers": 2, "pass_at": [1], "max_new_tokens": 2,
                "batch_size": 2, "stop": ["Q"], "too_long": "cut",
            },
            {"task": "mmlu_local", "path": "choices.jsonl"},
        ],
    ),
    "eval_open": _recipe(
        "eval",
        tasks=[
            {
                "task": "open_ended", "name": "talk", "path": "turns.jsonl", "baseline": "theirs.jsonl", "limit": 2,
                "reward": {"model": "runs/reward", "normalize": True, "clip": 3.0}, "temperature": 1,
                "max_new_tokens": 2, "batch_size": 2, "stop": ["x"],
            },
            {"task": "open_ended", "path": "turns.jsonl", "reward": {"model": "runs/reward"}, "max_new_tokens": 2},
        ],
    ),
    "eval_models": {
        "stage": "eval", "models": {"one": "base", "other": {"path": "base", "dtype": "float32"}},
        "tasks": [_task("loss", limit=2)], "output_dir": "out",
    },
    "pairs": _recipe(
        "pairs", "chat.jsonl", rewards=[{"rule": "number"}, {"rule": "format"}], limit=3, num_generations=2,
        max_new_tokens=3, batch_size=4, max_pairs_per_prompt=2, min_margin=0.1, balance_lengths=False, temperature=1,
    ),
    "chain": {
        "stage": "chain", "model": {"path": "base"}, "output_dir": "out", "compare": [],
        "stages": [
            {"name": "sft", "recipe": "sft_full.yaml"},
            {"name": "eval_sft", "recipe": "eval_small.yaml", "results": "stages.sft", "model": {"path": "${sft}"}},
        ],
    },
}  # fmt: skip
COMMAND = {"chain": "run"}


def make_world(folder: Path) -> None:
    """The model, the data and the stages' recipes that the recipes name, in `folder`; runs/ is for the caller."""
    for name, widths in (("base", {}), ("wide", IN_BLOCKS)):
        chat_model(**widths).save_pretrained(folder / name)
        byte_tokenizer().save_pretrained(folder / name)
    judged = [{"prompt": user(f"ask {i}"), "completion": assistant("yes"), "label": bool(i % 2)} for i in range(8)]
    rows = conversations(12)
    bare = [{"messages": row["messages"]} for row in rows]
    files: dict[str, list[dict[str, Any]]] = {
        "chat": rows, "held_out": conversations(4), "pairs": pairs(8), "judged": judged, "bare": bare,
        "some_references": rows[:6] + bare[6:], "bad_references": [{**row, "reference": "banana"} for row in rows],
        "scored": [{**row, "label": index / 8} for index, row in enumerate(judged)], "one": rows[:1], "empty": [],
        "sums": [{"question": f"{i} + 1?", "answer": f"#### {i + 1}"} for i in range(3)],
        "choices": [{"question": "1 + 1?", "choices": list("0123"), "answer": i} for i in range(3)],
        "turns": [{"question_id": i, "category": "math", "turns": [f"{i} + 1?", "Why?"]} for i in range(3)],
        "theirs": [{"question_id": i, "choices": [{"turns": ["2", "So."]}]} for i in range(3)],
        "plain": [{"text": "def f(): pass"}] * 8, "unknown": [{"x": 1}] * 3,
        "long": [{**row, "messages": user("a " * 4000) + assistant("b")} for row in rows],
        "long_answers": [{**row, "messages": user("a") + assistant("b" * 300)} for row in rows],
    }  # fmt: skip
    for name, content in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    (folder / "experts.json").write_text(json.dumps({"experts": {"1": [0]}}))
    (folder / "other_experts.json").write_text(json.dumps({"experts": {"9": [0]}}))
    (folder / "folder").mkdir()
    (folder / "folder" / "notes.txt").write_text("mine")
    (folder / "sft_full.yaml").write_text(json.dumps({**RECIPES["sft_full"], "output_dir": "unused"}))
    small = _recipe("eval", tasks=[_task("refusal", max_new_tokens=2)])
    (folder / "eval_small.yaml").write_text(json.dumps(small))


def broken(recipe: dict[str, Any], changes: dict[Path_, Any]) -> dict[str, Any]:
    """The recipe with other values at these paths; sections that are missing are made."""
    recipe = copy.deepcopy(recipe)
    for (*parents, key), value in changes.items():
        node: Any = recipe
        for parent in parents:
            if isinstance(node, dict) and node.get(parent) is None:
                node[parent] = {}
            node = node[parent]
        if value == REMOVED:
            node.pop(key)
        else:
            node[key] = copy.deepcopy(value)
    return recipe


def junk_cases() -> Iterator[tuple[str, dict[Path_, Any]]]:
    """Every value of every recipe, replaced by what it cannot be, or may."""
    for kind, recipe in RECIPES.items():
        for path in _paths(recipe):
            yield from ((kind, {path: value}) for value in JUNK)


def _paths(node: Any, path: Path_ = ()) -> Iterator[Path_]:
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in items:
        yield (*path, key)
        yield from _paths(value, (*path, key))


DATA = (
    "chat", "pairs", "judged", "bare", "some_references", "bad_references", "scored", "one", "empty", "plain",
    "unknown", "long", "long_answers",
)  # fmt: skip
PLACES = ("absent.jsonl", "chat.txt", "folder", "base", "*.nothing", "tiny:absent", "tiny:sft_train?n=4", "/dev/null")
MODELS = ("runs/sft", "runs/sft/final", "runs/reward", "runs", "folder", "absent", "chat.jsonl", "base/config.json")
CONFIGS: list[dict[str, Any]] = [
    {"hidden_size": 8}, {"num_hidden_layers": 1}, {"vocab_size": 10}, {"max_position_embeddings": 4},
    {"num_experts_per_tok": 99}, {"aux_loss_alpha": "x"}, {"hidden_act": "x"}, {"pad_token_id": 300}, {"n_group": 3},
    {"num_labels": 3}, {"tie_word_embeddings": True}, {"quantization_config": {"a": 1}}, {"aux_loss_alpha": 0.1},
    {"bias_update_speed": 0.001},
]  # fmt: skip
ADAPTERS: list[dict[str, Any]] = [
    {"targets": ["attention", "attention.q"]}, {"targets": ["experts"], "experts_file": "experts.json"},
    {"targets": ["experts"], "experts_file": "other_experts.json"}, {"targets": ["lm_head"]},
    {"targets": ["experts"], "experts_file": "absent.json"}, {"targets": ["embeddings"]}, {"targets": ["router"]},
    {"targets": ["attention"], "r": 4096}, {"targets": ["attention"], "alpha": 1e300}, {"targets": ["attention.k"]},
]  # fmt: skip
ANY_STAGE: list[dict[str, Any]] = [
    {"optim": "adamw_bnb_8bit"}, {"optim": "galore_adamw", "optim_target_modules": ["q_proj"]}, {"optim": "adafactor"},
    {"optim_target_modules": "(a+)+$"}, {"lr_scheduler_type": "cosine_with_min_lr"}, {"deepspeed": "absent.json"},
    {"lr_scheduler_type": "warmup_stable_decay"}, {"lr_scheduler_type": "reduce_lr_on_plateau"}, {"use_cpu": True},
    {"lr_scheduler_kwargs": {"banana": 1}}, {"load_best_model_at_end": True}, {"save_strategy": "best"}, {"tf32": True},
    {"dataloader_drop_last": True, "per_device_train_batch_size": 100}, {"report_to": ["banana"]}, {"max_steps": -1},
    {"report_to": "tensorboard"}, {"gradient_accumulation_steps": 0}, {"warmup_ratio": 2.0}, {"learning_rate": 1e30},
    {"accelerator_config": {"banana": 1}}, {"debug": "underflow_overflow"}, {"ddp_backend": "banana"},
    {"eval_strategy": "epoch"}, {"metric_for_best_model": "banana"}, {"group_by_length": True}, {"hub_token": "x"},
    {"dataloader_prefetch_factor": 2}, {"auto_find_batch_size": True}, {"gradient_checkpointing": True},
    {"eval_on_start": True},
]  # fmt: skip
ROLLOUTS: list[dict[str, Any]] = [
    {"num_generations": 3}, {"num_generations": 1}, {"steps_per_generation": 3}, {"generation_batch_size": 6},
    {"use_vllm": True}, {"temperature": 0}, {"loss_type": "banana"}, {"generation_kwargs": {"banana": 1}},
    {"max_completion_length": 100_000}, {"sync_ref_model": True}, {"cache_implementation": "banana"}, {"beta": 0.1},
    {"per_device_train_batch_size": 100}, {"scale_rewards": "x"}, {"use_liger_kernel": True}, {"num_iterations": 2},
    {"mask_truncated_completions": True}, {"top_entropy_quantile": 0.2}, {"importance_sampling_level": "x"},
]  # fmt: skip
METHODS = ("grpo", "dpo", "ipo", "kto", "simpo", "orpo", "ppo")
PREFERENCES: list[dict[str, Any]] = [
    {"loss_type": "ipo"}, {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.1]}, {"loss_type": "exo_pair"},
    {"loss_type": "banana"}, {"loss_type": "apo_zero_unpaired"}, {"sync_ref_model": True}, {"beta": 0},
    {"ld_alpha": 0.5}, {"use_weighting": True}, {"precompute_ref_log_probs": False}, {"per_device_train_batch_size": 1},
    {"f_divergence_type": "js_divergence"}, {"label_smoothing": 0.1}, {"cpo_alpha": 1.0}, {"simpo_gamma": -1},
    {"train_sampling_strategy": "random"}, {"generate_during_eval": True}, {"max_completion_length": 4},
    {"metric_for_best_model": "rewards/accuracies", "load_best_model_at_end": True, "save_steps": 1},
]  # fmt: skip
REWARDS: list[list[dict[str, Any]]] = [
    [{"rule": "banana"}], [{"rule": "math"}], [{"rule": "number", "weight": 0}], [{"rule": "number"}] * 2, [{}],
    [{"model": "base"}], [{"model": "runs/sft"}], [{"model": "absent"}], [{"model": "absent", "if_missing": "random"}],
    [{"model": "runs/reward", "combine": "min"}], [{"rule": "format", "combine": "min"}],
    [{"model": "runs/reward", "device": "cpu"}], [{"model": "runs/reward", "device": "cuda:9"}],
    [{"rule": "format", "device": "cpu"}],
    [{"model": "runs/reward", "clip": 1}], [{"rule": "number", "on_error": "skip"}, {"rule": "format"}],
]  # fmt: skip
TASKS: list[dict[str, Any]] = [
    {"temperatures": [1, 1.0]}, {"temperatures": [11]}, {"max_new_tokens": 10**9}, {"patterns": ["["]}, {"limit": 1},
    {"metric": "reward"}, {"metric": "reward", "combine": "min"}, {"combine": "min"},
    {"metric": "pair_accuracy"}, {"metric": "loss"}, {"rule": "math"}, {"name": "a_n"}, {"batch_size": 10**9},
]  # fmt: skip
BENCHMARKS: list[dict[str, Any]] = [
    {"task": "banana"}, {"task": "absent.yaml"}, {"task": "mmlu_local"}, {"task": "perplexity_local"},
    {"task": "gsm8k"}, {"num_fewshot": 2}, {"num_fewshot": 9}, {"fewshot_path": None},
    {"fewshot_path": "choices.jsonl"}, {"limit": 10**9},
    {"temperature": 0}, {"temperature": None}, {"num_answers": 1}, {"pass_at": [3]}, {"max_new_tokens": 10**9},
    {"max_new_tokens": 10**9, "too_long": "refuse"}, {"name": "a_n"}, {"name": "mmlu_local"}, {"metric": "loss"},
]  # fmt: skip
OPEN_ENDED: list[dict[str, Any]] = [
    {"path": "theirs.jsonl"}, {"path": "sums.jsonl"}, {"baseline": "turns.jsonl"}, {"baseline": "runs/reward"},
    {"baseline": None}, {"baseline": "absent.jsonl"}, {"baseline": "folder"}, {"limit": 10**9}, {"limit": 1},
    {"references": "theirs.jsonl"}, {"reward": {"rule": "number"}}, {"reward": {"model": "base"}},
    {"reward": {"model": "absent"}}, {"reward": {"model": "absent", "if_missing": "random"}},
    {"reward": {"model": "runs/reward", "device": "cuda:9"}}, {"reward": {"judge": {"base_url": "http://a"}}},
    {"temperature": None}, {"temperature": 11}, {"max_new_tokens": 10**9}, {"batch_size": 10**9}, {"num_fewshot": 1},
    {"name": "a_points"}, {"name": "open_ended"}, {"metric": "loss"}, {"task": "gsm8k_local"},
]  # fmt: skip
SAMPLINGS: list[dict[str, Any]] = [
    {"num_generations": 1}, {"num_generations": 257}, {"temperature": 0}, {"temperature": 11}, {"limit": 10**9},
    {"max_new_tokens": 10**9}, {"batch_size": 10**9}, {"min_margin": -1}, {"min_margin": 1e300}, {"limit": 1},
    {"max_pairs_per_prompt": 10**9}, {"balance_lengths": True}, {"lora": {"targets": ["attention"]}},
]  # fmt: skip
OUTPUTS = ("base", "chat.jsonl", "folder", "chat.jsonl/x", "runs/sft", "x" * 300, "~nobody/x", ".")


def special_cases() -> Iterator[tuple[str, dict[Path_, Any]]]:
    """What a user may write who knows the keys."""
    for kind, recipe in RECIPES.items():
        if kind == "chain":
            continue
        evaluates, by_path = recipe["stage"] == "eval", kind in ("eval_benchmark", "eval_open")
        data: Path_ = ("tasks", 0, "data", 0, "path") if evaluates else ("data", 0, "path")
        data = ("tasks", 0, "path") if by_path else data
        yield from ((kind, {data: place}) for place in (*(f"{name}.jsonl" for name in DATA), *PLACES))
        yield from ((kind, {("model", "path"): place}) for place in MODELS)
        yield from ((kind, {("model", "config"): config}) for config in CONFIGS)
        yield from ((kind, {("output_dir",): place}) for place in OUTPUTS)
        if recipe.get("model"):
            yield from ((kind, {("model", "quantization"): name}) for name in ("nf4", "int8", None))
        if evaluates:
            tasks = {"eval_benchmark": BENCHMARKS, "eval_open": OPEN_ENDED}.get(kind, TASKS)
            yield from ((kind, {("tasks", 0, key): value for key, value in task.items()}) for task in tasks)
            continue
        if recipe["stage"] == "pairs":
            yield from ((kind, {(key,): value for key, value in fields.items()}) for fields in SAMPLINGS)
            continue
        yield from ((kind, {("lora",): lora}) for lora in ADAPTERS)
        samples, prefers = "rewards" in recipe, "method" in recipe
        yield from ((kind, {("method",): method}) for method in METHODS if recipe["stage"] == "rl")
        more = ROLLOUTS if samples else [{"packing": True}, {"max_length": None}, {"max_length": 2}]
        more = [*more, *(PREFERENCES if prefers else [])]
        yield from (
            (kind, {("training", key): value for key, value in fields.items()}) for fields in (*ANY_STAGE, *more)
        )
        yield from ((kind, {("eval_data",): [{"path": f"{name}.jsonl"}]}) for name in DATA)
        if not samples:
            yield from ((kind, {data: "long_answers.jsonl", ("format", "too_long"): how}) for how in ("drop", "split"))
    for router in (True, False):
        yield from (("rl", {("train_router",): router, ("lora",): lora}) for lora in (None, *ADAPTERS[:2], ADAPTERS[6]))
    for rewards in REWARDS:
        for name in ("chat", "bare", "some_references", "bad_references"):
            changes: dict[Path_, Any] = {("rewards",): rewards, ("data", 0, "path"): f"{name}.jsonl"}
            yield from ((kind, changes) for kind in ("rl", "pairs"))
