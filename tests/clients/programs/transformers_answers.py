"""Stock transformers: each talk as rendered and encoded, its greedy answer, and that answer's log-probabilities."""

import json
import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

request = json.loads(sys.argv[1])
tokenizer = AutoTokenizer.from_pretrained(request["folder"])
model = AutoModelForCausalLM.from_pretrained(request["folder"])
assert type(model).__module__ == "transformers.models.deepseek_v2.modeling_deepseek_v2"
chat = pipeline("text-generation", model=model, tokenizer=tokenizer)
length = {"max_new_tokens": request["tokens"], "min_new_tokens": request["tokens"], "do_sample": False}
told = []
for talk in request["talks"]:
    text = tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
    out = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), output_logits=True, return_dict_in_generate=True, **length
    )
    answer = out.sequences[0, ids.shape[1] :]
    said = torch.cat(out.logits).log_softmax(-1).gather(-1, answer[:, None])[:, 0]
    told.append([text, ids[0].tolist(), answer.tolist(), said.tolist()])
    turn = chat(talk, **length)[0]["generated_text"][-1]["content"]
    assert turn.strip() == tokenizer.decode(answer, skip_special_tokens=True).strip(), turn
print(json.dumps(told))
