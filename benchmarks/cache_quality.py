"""Quality loss of a quantised latent cache on the demo's trained model: perplexity and greedy answers.

    make demo
    python -m benchmarks.cache_quality runs/tiny/rl_preference      half a minute; results/cache_quality.json

Tokens are decoded one at a time, so that everything they attend to has been through the cache.
"""

import argparse
from typing import Any

import torch

from benchmarks.common import write
from conversations import render_conversation
from deepseek_v2_modeling import LatentCache
from deepseek_v2_modeling.inference import pad_batch
from deepseek_v2_modeling.loading import load_model, load_tokenizer, resolve_source
from recipes.tiny.world import rows

WIDTHS = (None, "int8", "int6", "int4")
NEW_TOKENS = 24


@torch.no_grad()
def perplexity(model: Any, conversations: list[dict[str, Any]], quantization: Any, pad: int) -> float:
    """Perplexity of the assistant's tokens, decoded one at a time."""
    ids, mask = pad_batch([c["input_ids"] for c in conversations], pad, left=False)
    trained, _ = pad_batch([c["assistant_mask"] for c in conversations], 0, left=False)
    cache, losses = LatentCache(model.config, quantization), []
    for place in range(ids.shape[1] - 1):
        logits = model(ids[:, place : place + 1], past_key_values=cache, attention_mask=mask[:, : place + 1]).logits
        losses.append(torch.nn.functional.cross_entropy(logits[:, 0], ids[:, place + 1], reduction="none"))
    is_trained = trained[:, 1:].bool()
    return torch.stack(losses, 1)[is_trained].mean().exp().item()


@torch.no_grad()
def greedy(model: Any, prompts: list[list[int]], quantization: Any, tokenizer: Any) -> list[str]:
    """Answers of at most NEW_TOKENS tokens."""
    ids, mask = pad_batch(prompts, tokenizer.pad_token_id, left=True)
    output = model.generate(
        input_ids=ids,
        attention_mask=mask,
        past_key_values=LatentCache(model.config, quantization),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
    )
    return tokenizer.batch_decode(output[:, ids.shape[1] :], skip_special_tokens=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--rows", type=int, default=500)
    args = parser.parse_args()
    source = resolve_source(args.model)
    tokenizer, model = load_tokenizer(source), load_model(source)
    heldout = rows("sft_heldout", 0, args.rows)
    conversations: list[Any] = [render_conversation(row["messages"], tokenizer) for row in heldout]
    prompts = [
        render_conversation(row["messages"][:1], tokenizer, add_generation_prompt=True)["input_ids"] for row in heldout
    ]
    plain, reference_answers = 0.0, []
    figures: dict[str, dict[str, float]] = {}
    for width in WIDTHS:
        value = perplexity(model, conversations, width, tokenizer.pad_token_id)
        answers = greedy(model, prompts, width, tokenizer)
        plain, reference_answers = (value, answers) if width is None else (plain, reference_answers)
        same = sum(a == b for a, b in zip(answers, reference_answers, strict=True)) / len(reference_answers)
        figures[width or "float32"] = {
            "perplexity": round(value, 5),
            "rise_percent": round(100 * (value / plain - 1), 4),
            "same_answers_percent": round(100 * same, 2),
        }
        print(width or "float32", figures[width or "float32"], flush=True)
    write("cache_quality", {"rows": len(heldout), "widths": figures})


if __name__ == "__main__":
    main()
