"""What the commands write, read by programs that know nothing of this project: transformers' and PEFT's own classes."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

import sft.stage
from deepseek_v2_modeling.inference import score_sequences
from recipes.cli import main

# In a process of its own, from which our packages cannot be imported: here, they have registered their classes.
STOCK = """
import sys
from importlib.abc import MetaPathFinder

class NotHere(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("deepseek_v2_modeling", "conversations", "recipes"):
            raise ImportError(name)

sys.meta_path.insert(0, NotHere())
import json
import torch
from peft import AutoPeftModelForCausalLM, AutoPeftModelForSequenceClassification
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, GenerationConfig

TALK = [{"role": "user", "content": "17 + 25?"}]
told, prompts = {}, {}
with torch.no_grad():
    for folder in ("base", "full/final", "merged", "lora/final", "reward/final", "scorer/final", "served"):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        prompts[folder] = tokenizer.apply_chat_template(TALK, tokenize=False, add_generation_prompt=True)
        if folder == "served":
            continue
        ids = tokenizer(prompts[folder], return_tensors="pt").input_ids
        scores, adapted = folder.startswith(("reward", "scorer")), folder in ("lora/final", "scorer/final")
        if adapted:
            cls = AutoPeftModelForSequenceClassification if scores else AutoPeftModelForCausalLM
            model = cls.from_pretrained(folder, **({"num_labels": 1} if scores else {}))
            inner = model.base_model.model
        else:
            cls = AutoModelForSequenceClassification if scores else AutoModelForCausalLM
            model, info = cls.from_pretrained(folder, output_loading_info=True)
            assert not any(info.values()), info
            inner = model
        assert type(inner).__module__ == "transformers.models.deepseek_v2.modeling_deepseek_v2"
        told[folder] = model.eval()(ids).logits.tolist()
        if folder == "reward/final":
            answers = ("42", "Sure, it is 42, I think.", "")
            said = [[*TALK, {"role": "assistant", "content": answer}] for answer in answers]
            texts = [tokenizer.apply_chat_template(turns, tokenize=False) for turns in said]
            batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="right", add_special_tokens=False)
            ends = batch.attention_mask.sum(-1, keepdim=True) - 1
            assert (batch.input_ids.gather(1, ends) == tokenizer.eos_token_id).all()
            rows = [row[real.bool()].tolist() for row, real in zip(batch.input_ids, batch.attention_mask)]
            told["scores"] = [rows, model(**batch).logits[:, 0].tolist()]
        if not scores:
            GenerationConfig.from_pretrained(folder if not adapted else "base")
            answer = model.generate(input_ids=ids, max_new_tokens=2, min_new_tokens=2, do_sample=False)
            assert answer.shape[1] == ids.shape[1] + 2
print(json.dumps([ids.tolist(), prompts, told]))
"""


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """base, full and LoRA runs, a merge, an export, and reward models with all weights and with an adapter."""
    home = tmp_path_factory.mktemp("written")
    lora = "lora={targets: [attention, experts, shared_experts, dense], r: 2, alpha: 4}"
    rows = {"sft": "tiny:sft_train?n=4", "reward": "tiny:helpful_train?n=4"}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        patch.setattr(sft.stage, "SAMPLE_TOKENS", 1)
        for stage, data in rows.items():
            training = {"max_steps": 2, "per_device_train_batch_size": 2, "max_length": 64, "learning_rate": 0.02}
            recipe = {"stage": stage, "data": [{"path": data}], "training": training}
            Path(f"{stage}.yaml").write_text(json.dumps(recipe), encoding="utf-8")
        for words in (
            ["init", "base", "--preset", "tiny"],
            ["sft", "sft.yaml", "model.path=base", "output_dir=full"],
            ["sft", "sft.yaml", "model.path=full/final", "output_dir=lora", lora],
            ["merge", "lora", "merged"],
            ["export", "lora", "served", "--layout", "per_expert", "--kv-b"],
            ["reward", "reward.yaml", "model.path=full/final", "output_dir=reward"],
            ["reward", "reward.yaml", "model.path=full/final", "output_dir=scorer", lora],
        ):
            assert main(words) == 0, words
        yield home


def test_stock_classes_read_all_of_it_and_give_the_same(checkpoints: Path) -> None:
    done = subprocess.run([sys.executable, "-c", STOCK], cwd=checkpoints, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    ids, prompts, told = json.loads(done.stdout.splitlines()[-1])
    assert len(set(prompts.values())) == 1 and "User: 17 + 25?\n\nAssistant:" in prompts["served"]
    ours = {
        "base": AutoModelForCausalLM.from_pretrained("base"),
        "full/final": AutoModelForCausalLM.from_pretrained("full/final"),
        "merged": AutoModelForCausalLM.from_pretrained("merged"),
        "lora/final": PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("full/final"), "lora/final"),
        "reward/final": AutoModelForSequenceClassification.from_pretrained("reward/final"),
    }
    with torch.no_grad():
        found = {name: model.eval()(torch.tensor(ids)).logits for name, model in ours.items()}
    for name, logits in found.items():
        torch.testing.assert_close(torch.tensor(told[name]), logits, rtol=0, atol=2e-5)
    torch.testing.assert_close(found["merged"], found["lora/final"], rtol=0, atol=2e-5)
    assert (found["lora/final"] - found["full/final"]).abs().max() > 1e-3
    assert told["scorer/final"] != told["reward/final"]
    rows, scores = told["scores"]
    assert len({*map(len, rows)}) == 3
    assert score_sequences(ours["reward/final"], rows, pad_token_id=2) == pytest.approx(scores, abs=1e-5)


def test_trl_takes_a_reward_model_by_its_path(checkpoints: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rewards of GRPO are our scores of what was said, whatever the padding."""
    monkeypatch.chdir(checkpoints)
    tokenizer = AutoTokenizer.from_pretrained("reward/final")
    trainer = GRPOTrainer(
        "base",
        reward_funcs="reward/final",
        args=GRPOConfig("grpo", max_steps=1, num_generations=2, per_device_train_batch_size=4, max_completion_length=6,
                        bf16=False, report_to="none", use_cpu=True, save_strategy="no"),
        train_dataset=Dataset.from_list([{"prompt": [{"role": "user", "content": f"{i} + 1?"}]} for i in (7, 123456)]),
        processing_class=tokenizer,
    )  # fmt: skip
    trainer.train()
    logged = trainer._logs
    said = [prompt + completion for prompt, completion in zip(logged["prompt"], logged["completion"], strict=True)]
    texts = [tokenizer.apply_chat_template(turns, tokenize=False) for turns in said]
    rows = tokenizer(texts, add_special_tokens=False).input_ids
    model = AutoModelForSequenceClassification.from_pretrained("reward/final")
    (rewards,) = logged["rewards"].values()
    assert len(rows) == 4 and score_sequences(model, rows, pad_token_id=2) == pytest.approx(list(rewards), abs=1e-5)
