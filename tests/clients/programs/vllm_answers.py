"""vLLM: each talk as rendered and encoded, its greedy answer, and that answer's log-probabilities.

With an adapter, the answers are the adapter's. It does not start twice in one process.
"""

import json
import sys

from transformers import AutoTokenizer
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest


def main() -> None:
    request = json.loads(sys.argv[1])
    tokenizer = AutoTokenizer.from_pretrained(request["folder"])
    llm = LLM(
        model=request["folder"], dtype=request["dtype"], enforce_eager=True, max_model_len=256, max_num_seqs=4,
        **request.get("engine", {}),
    )  # fmt: skip
    adapter = LoRARequest("adapter", 1, request["adapter"]) if "adapter" in request else None
    texts = [tokenizer.apply_chat_template(t, tokenize=False, add_generation_prompt=True) for t in request["talks"]]
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    settings = SamplingParams(temperature=0, max_tokens=request["tokens"], min_tokens=request["tokens"], logprobs=1)
    outs = llm.generate([{"prompt_token_ids": row} for row in ids], settings, lora_request=adapter)
    told = []
    for text, row, out in zip(texts, ids, outs, strict=True):
        answer = list(out.outputs[0].token_ids)
        said = [step[token].logprob for token, step in zip(answer, out.outputs[0].logprobs, strict=True)]
        told.append([text, row, answer, said])
    print(json.dumps(told))


if __name__ == "__main__":  # it starts processes that import this file
    main()
