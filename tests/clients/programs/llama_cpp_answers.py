"""llama.cpp: converts the folder to GGUF with its own converter. Then each talk as rendered by the template in that
file and encoded by llama.cpp, its greedy answer, and that answer's log-probabilities."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
from llama_cpp import Llama
from llama_cpp.llama_chat_format import Jinja2ChatFormatter

request = json.loads(sys.argv[1])
(converter,) = Path(sys.prefix, "source").glob("*/vendor/llama.cpp/convert_hf_to_gguf.py")
file = f"{request['folder'].replace('/', '_')}.{request['dtype']}.gguf"
subprocess.run(
    [sys.executable, converter, request["folder"], "--outfile", file, "--outtype", request["dtype"]], check=True
)
llm = Llama(file, n_ctx=256, logits_all=True, verbose=False)
bos, eos = (llm.detokenize([token], special=True).decode() for token in (llm.token_bos(), llm.token_eos()))
template = Jinja2ChatFormatter(llm.metadata["tokenizer.chat_template"], eos_token=eos, bos_token=bos)
told = []
for talk in request["talks"]:
    text = template(messages=talk).prompt
    ids = llm.tokenize(text.encode(), add_bos=False, special=True)
    answer, said = [], []
    llm.reset()
    llm.eval(ids)
    for _ in range(request["tokens"]):
        logits = llm.scores[llm.n_tokens - 1].astype(np.float64)
        probabilities = logits - logits.max() - np.log(np.exp(logits - logits.max()).sum())
        logits[llm.token_eos()] = -np.inf  # as long as the others' answers
        answer.append(int(logits.argmax()))
        said.append(float(probabilities[answer[-1]]))
        llm.eval(answer[-1:])
    told.append([text, ids, answer, said])
print(json.dumps(told))
