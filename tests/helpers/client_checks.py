"""What `make clients` gives other programs to read, and how it judges what they answer."""

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from transformers import AutoModelForCausalLM, AutoTokenizer

from deepseek_v2_modeling import DeepseekV2ForCausalLM
from deepseek_v2_modeling.presets import released_config
from recipes.cli import main

PROGRAMS = Path(__file__).parents[1] / "clients" / "programs"
LITE = "deepseek-ai/DeepSeek-V2-Lite"
# llama.cpp recognises V2-Lite by its 27 layers, and knows the released tokenizer only.
NARROW = {
    "hidden_size": 128, "intermediate_size": 256, "moe_intermediate_size": 64,
    "num_attention_heads": 2, "num_key_value_heads": 2, "n_routed_experts": 8, "num_experts_per_tok": 2,
    "initializer_range": 0.05,
}  # fmt: skip
# A name -> the preset or released model that it is made of, and the settings that differ.
BASES: dict[str, tuple[str, dict[str, Any]]] = {
    "tiny": ("tiny", {}),
    "v2-lite-heads": ("v2-lite-heads", {}),
    "v2-lite-heads, all layers dense": ("v2-lite-heads", {"first_k_dense_replace": 3}),
    "27 narrow layers": (LITE, NARROW),
}
TALKS = [[{"role": "user", "content": text}] for text in ("What is 17 + 25?", "十七加二十五等于多少?", "Hi!")]
TOKENS = 50
LORA = "lora={targets: [attention, experts, shared_experts, dense], r: 4, alpha: 16}"
TRAINING = {"max_steps": 4, "per_device_train_batch_size": 4, "max_length": 64, "learning_rate": 0.001}


def dsv2(*words: str) -> None:
    assert main(list(words)) == 0, words


def make_base(name: str, folder: Path) -> None:
    """A random model, with its tokenizer; that of a released model is the released one."""
    source, changes = BASES[name]
    if source == LITE:
        folder.mkdir()
        for file in released_tokenizer().glob("tokenizer*.json"):
            shutil.copy(file, folder)
        config = released_config(source)
        assert config is not None
        tokenizer = AutoTokenizer.from_pretrained(folder)
        changes = {**changes, "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    else:
        dsv2("init", str(folder), "--preset", source)
        config = DeepseekV2ForCausalLM.from_pretrained(folder).config
    if changes:
        for key, value in changes.items():
            setattr(config, key, value)
        torch.manual_seed(0)
        DeepseekV2ForCausalLM(config).save_pretrained(folder)


def released_tokenizer() -> Path:
    """The directory $DSV2_TOKENIZER, or the files of DeepSeek-V2-Lite from the hub."""
    return Path(os.environ.get("DSV2_TOKENIZER") or snapshot_download(LITE, allow_patterns="tokenizer*.json"))


def train_runs(base: str, lora: str = LORA) -> None:
    """In the working directory: base, a full run on it, an adapter run on that (lora), and its merge (merged)."""
    recipe = {"stage": "sft", "data": [{"path": "tiny:sft_train?n=16"}], "training": TRAINING}
    Path("sft.yaml").write_text(json.dumps(recipe), encoding="utf-8")
    make_base(base, Path("base"))
    dsv2("sft", "sft.yaml", "model.path=base", "output_dir=full")
    dsv2("sft", "sft.yaml", "model.path=full/final", "output_dir=lora", "training.learning_rate=0.01", lora)
    dsv2("merge", "lora", "merged")


@dataclass(frozen=True)
class Comparison:
    """A program's answers beside our float32 model's view of the same text.

    same: tokens that are also our greedy choice, of `tokens`; lost: the most that a choice of another token costs in
    log-probability; wrong: the largest difference of the answers' log-probabilities.
    """

    tokens: int
    same: int
    lost: float
    wrong: float

    def __str__(self) -> str:
        return f"{self.same} of {self.tokens} greedy tokens, log-probabilities within {self.wrong:.1e}"


def compare(folder: Path, told: list[Any]) -> Comparison:
    """Check a program's prompts, text and ids, against ours, and measure its answers.

    told: for each talk its text, its ids, and the answer's ids and log-probabilities.
    """
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert type(model).__module__.startswith("deepseek_v2_modeling")
    tokens, same, lost, wrong = 0, 0, 0.0, 0.0
    for talk, (text, ids, answer, said) in zip(TALKS, told, strict=True):
        assert text == tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
        assert ids == tokenizer(text, add_special_tokens=False).input_ids
        with torch.no_grad():
            logits = model(torch.tensor([ids + answer])).logits[0, len(ids) - 1 : -1].log_softmax(-1)
        own = logits.gather(-1, torch.tensor(answer)[:, None])[:, 0]
        logits[:, tokenizer.eos_token_id] = -torch.inf  # no answer ends before its time
        tokens += len(answer)
        same += int((logits.argmax(-1) == torch.tensor(answer)).sum())
        lost = max(lost, float((logits.amax(-1) - own).max()))
        wrong = max(wrong, float((own - torch.tensor(said)).abs().max()))
    return Comparison(tokens, same, lost, wrong)
