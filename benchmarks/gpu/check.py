"""Checks of the model that need a GPU: correct results, no host synchronisation, speed and memory compared with stock.

    python -m benchmarks.gpu.check [--device cuda] [--output FILE.json] [--only WORD]

Needs torch, transformers, peft and this repository (not installed), in whose root it is started. Every check runs
even if others fail; the table at the end has one line per check, and the exit code says whether any failed. `--device
cpu` runs the same code at toy size, so that only the GPU itself is left untested.
"""

import argparse
import gc
import json
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import DynamicCache
from transformers.models.deepseek_v2 import configuration_deepseek_v2 as stock_configuration
from transformers.models.deepseek_v2 import modeling_deepseek_v2 as stock

from deepseek_v2_modeling import (
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    LatentCache,
    apply_lora,
    lora_config,
)
from deepseek_v2_modeling.decode_steps import SlotDecoder
from deepseek_v2_modeling.inference import generate_answers
from deepseek_v2_modeling.kernels.grouped_products import Groups

REFERENCE = Path(__file__).resolve().parents[2] / "tests" / "reference"
V2_LITE: dict[str, Any] = {
    "vocab_size": 102400, "hidden_size": 2048, "intermediate_size": 10944, "moe_intermediate_size": 1408,
    "num_hidden_layers": 27, "num_attention_heads": 16, "num_key_value_heads": 16, "q_lora_rank": None,
    "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
    "n_routed_experts": 64, "n_shared_experts": 2, "num_experts_per_tok": 6, "first_k_dense_replace": 1,
    "topk_method": "greedy", "max_position_embeddings": 32768, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "aux_loss_alpha": 0.0,  # stock has no balance loss
}  # fmt: skip
TOY = V2_LITE | {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 32, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 4, "kv_lora_rank": 32, "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16, "v_head_dim": 16, "n_routed_experts": 8, "num_experts_per_tok": 3,
}  # fmt: skip
STOCK_TARGETS = ["q_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]
STOCK_EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
Figures = dict[str, Any]


class Bench:
    """The device, the model's sizes (by default chosen for the device), and one large model shared by the checks."""

    def __init__(self, device: str, shape: Figures | None = None):
        self.device, self.on_gpu = torch.device(device), device == "cuda"
        self.shape = shape or (V2_LITE if self.on_gpu else TOY)
        self._large: Any = None

    def config(self, cls: Any, **changes: Any) -> Any:
        return cls(**self.shape | changes)

    def model(self, dtype: torch.dtype, **changes: Any) -> DeepseekV2ForCausalLM:
        """Ours with random weights, the same for the same arguments."""
        torch.manual_seed(0)
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            with self.device:
                return DeepseekV2ForCausalLM(self.config(DeepseekV2Config, **changes)).to(dtype)
        finally:
            torch.set_default_dtype(before)

    def large(self) -> DeepseekV2ForCausalLM:
        """A model of the full shape in bf16, created once."""
        if self._large is None:
            self._large = self.model(torch.bfloat16).eval()
        return self._large

    def twin(self, ours: DeepseekV2ForCausalLM, **changes: Any) -> Any:
        """The stock model sharing our model's tensors."""
        config = self.config(stock_configuration.DeepseekV2Config, **changes)
        with torch.device("meta"):
            model = stock.DeepseekV2ForCausalLM(config)
        model.load_state_dict(ours.state_dict(), strict=True, assign=True)
        model.model.rotary_emb = type(model.model.rotary_emb)(config).to(self.device)
        return model.eval()

    def ids(self, *shape: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(1)
        return torch.randint(3, self.shape["vocab_size"], shape, generator=generator).to(self.device)

    def wait(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()

    def seconds(self, run: Callable[[], Any], repeats: int = 5, warm_up: int = 2) -> float:
        """Median seconds of a call."""
        times = []
        for _ in range(warm_up + repeats):
            self.wait()
            start = time.perf_counter()
            run()
            self.wait()
            times.append(time.perf_counter() - start)
        return statistics.median(times[warm_up:])

    def peak_gb(self, run: Callable[[], Any]) -> tuple[Any, float]:
        """(the call's result, peak device memory in GB during the call; 0 on a CPU)."""
        gc.collect()
        if not self.on_gpu:
            return run(), 0.0
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return run(), torch.cuda.max_memory_allocated() / 1e9

    def matrix_rate(self) -> float:
        """FLOP/s of a large bf16 product."""
        n = 8192 if self.on_gpu else 512
        a = torch.randn(n, n, device=self.device, dtype=torch.bfloat16)
        return 2 * n**3 / self.seconds(lambda: a @ a, repeats=10)


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual.float() - expected.float()).norm() / expected.float().norm()).item()


def adapted(model: Any, ours: bool) -> tuple[Any, dict[str, torch.nn.Parameter]]:
    """LoRA r = 16 on attention and routed experts, with the same values on both sides, by PEFT's names."""
    if ours:
        model = apply_lora(model, lora_config(targets=("attention", "experts"), r=16, alpha=32))
    else:
        model = get_peft_model(
            model,
            LoraConfig(
                r=16, lora_alpha=32, task_type="CAUSAL_LM",
                target_modules=STOCK_TARGETS, target_parameters=STOCK_EXPERTS,
            ),
        )  # fmt: skip
    trained = {name: p for name, p in sorted(model.named_parameters()) if p.requires_grad}
    for name, p in trained.items():
        values = torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name))) * 0.02
        p.data = values.to(p.device, p.dtype)
    return model.train(), trained


# --- correct results -----------------------------------------------------------------------------------------------


def goldens(bench: Bench) -> Figures:
    """Logits, loss and gradients against golden sets of the official implementation in float32; the distance of
    bf16."""
    figures: Figures = {}
    for name in ("lite", "full"):
        golden = load_file(REFERENCE / name / "golden.safetensors", device=str(bench.device))
        for attention in ("eager", "sdpa"):
            model = DeepseekV2ForCausalLM.from_pretrained(REFERENCE / name, attn_implementation=attention)
            model = model.to(bench.device).eval()
            real = golden["attention_mask"].bool()
            with torch.no_grad():
                logits = model(golden["input_ids"], attention_mask=golden["attention_mask"]).logits
            worst = (logits[real] - golden["logits"][real]).abs().max().item()
            assert worst < 5e-5, f"{name} {attention}: logits off by {worst:.2g}"
            out = model.train()(input_ids=golden["train_input_ids"], labels=golden["train_labels"])
            loss = (out.loss - out.aux_loss - golden["train_loss"][0]).abs().item()
            assert loss < 5e-6, f"{name} {attention}: loss off by {loss:.2g}"
            out.loss.backward()
            grads = dict(model.named_parameters())
            stored = {k.removeprefix("grad_seq/"): v for k, v in golden.items() if k.startswith("grad_seq/")}
            for key, expected in stored.items():
                if key in grads:
                    assert relative(grads[key].grad, expected) < 2e-5, f"{name} {attention}: gradient of {key}"
            with torch.no_grad():
                low_precision = model.eval().to(torch.bfloat16)
                low = low_precision(golden["input_ids"], attention_mask=golden["attention_mask"]).logits
            figures[f"{name}_{attention}"] = {
                "logits_off": worst, "loss_off": loss, "bf16_relative": relative(low[real], golden["logits"][real]),
            }  # fmt: skip
    return figures


def lora_gradients(bench: Bench) -> Figures:
    """Loss and adapter gradients of ours versus stock PEFT on the stock model, in float32."""
    ours = bench.model(torch.float32, num_hidden_layers=min(4, bench.shape["num_hidden_layers"]))
    layers = {"num_hidden_layers": ours.config.num_hidden_layers}
    ids, losses, gradients = bench.ids(2, 256 if bench.on_gpu else 32), [], []
    twin = bench.twin(ours, **layers)
    for model, is_ours in ((twin, False), (ours, True)):
        model, trained = adapted(model, is_ours)
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        losses.append(loss.item())
        gradients.append({name: p.grad.clone() for name, p in trained.items()})
        del model
    assert set(gradients[0]) == set(gradients[1])
    worst = max(relative(gradients[1][name], grad) for name, grad in gradients[0].items())
    assert abs(losses[0] - losses[1]) < 2e-5 * losses[0] and worst < 1e-3, (losses, worst)
    return {"loss": losses[1], "loss_stock": losses[0], "gradients_off": worst, "tensors": len(gradients[0])}


@torch.no_grad()
def cached_decoding(bench: Bench) -> Figures:
    """Absorbed decoding from the latent cache versus one full forward, in float32 and bf16."""
    figures: Figures = {}
    context, steps = (512, 8) if bench.on_gpu else (24, 4)
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 0.05)):
        model = bench.model(dtype, num_hidden_layers=min(4, bench.shape["num_hidden_layers"])).eval()
        ids = bench.ids(2, context + steps)
        expected = model(ids, use_cache=False).logits[:, context - 1 :]
        cache = LatentCache(model.config)
        logits = [model(ids[:, :context], past_key_values=cache, use_cache=True, logits_to_keep=1).logits]
        for step in range(steps):
            token = ids[:, context + step : context + step + 1]
            logits.append(model(token, past_key_values=cache, use_cache=True).logits)
        off = relative(torch.cat(logits, dim=1), expected)
        assert off < tolerance, f"{dtype}: {off:.2g}"
        figures[str(dtype).removeprefix("torch.")] = off
        cache = LatentCache(model.config)
        logits = [model(ids[:, :context], past_key_values=cache, use_cache=True, logits_to_keep=1).logits]
        capture = bench.on_gpu and dtype == torch.bfloat16  # the float32 kernel waits for the host
        step = SlotDecoder(model, cache, 2, context + steps, fixed=True, capture=capture)
        step.fill([0, 1], cache, [0, 1], [context, context])
        logits += [step(ids[:, context + i])[:, None].clone() for i in range(steps // 2)]
        step.keep([1])
        logits = [part[1:] for part in logits]
        logits += [step(ids[1:, context + i])[:, None].clone() for i in range(steps // 2, steps)]
        off = relative(torch.cat(logits, dim=1), expected[1:])
        assert off < tolerance, f"{dtype}, at fixed shapes: {off:.2g}"
        figures[f"{str(dtype).removeprefix('torch.')}_fixed"] = off
    return figures


def ragged_groups(bench: Bench) -> Figures:
    """Grouped products with empty and uneven groups versus one product per expert: outputs and gradients."""
    figures: Figures = {}
    sizes = [0, 7, 130, 0, 1, 64, 33, 0]
    wide, narrow = (512, 256) if bench.on_gpu else (32, 16)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 0.01)):
        generator = torch.Generator().manual_seed(0)
        x, w, g = (
            torch.randn(*shape, generator=generator).to(bench.device, dtype)
            for shape in ((sum(sizes), wide), (len(sizes), narrow, wide), (sum(sizes), narrow))
        )
        x, w = x.requires_grad_(), w.requires_grad_()
        y = Groups(torch.tensor(sizes, device=bench.device)).linear(x, w)
        dx, dw = torch.autograd.grad(y, (x, w), g)
        plain = torch.cat([part.float() @ m.float().t() for part, m in zip(x.split(sizes), w, strict=True)])
        px, pw = torch.autograd.grad(plain, (x, w), g.float())
        off = max(relative(y, plain), relative(dx, px), relative(dw, pw))
        assert off < tolerance, f"{dtype}: {off:.2g}"
        figures[str(dtype).removeprefix("torch.")] = off
    return figures


def no_waiting(bench: Bench) -> Figures:
    """Forward, backward and a decode step without any host synchronisation (CUDA raises an error at one)."""
    model = bench.model(torch.bfloat16, num_hidden_layers=min(4, bench.shape["num_hidden_layers"]))
    model, trained = adapted(model, ours=True)
    ids = bench.ids(2, 128)
    faults: dict[str, str] = {}

    @contextmanager
    def guarded(name: str) -> Iterator[None]:
        try:
            if bench.on_gpu:
                torch.cuda.set_sync_debug_mode("error")
            yield
        except RuntimeError as error:
            frames = traceback.extract_tb(error.__traceback__)
            our_frames = [f"{Path(f.filename).name}:{f.lineno}" for f in frames if "deepseek_v2_modeling" in f.filename]
            faults[name] = f"{our_frames[-1] if our_frames else frames[-1].filename}: {str(error)[:80]}"
        finally:
            if bench.on_gpu:
                torch.cuda.set_sync_debug_mode("default")

    def loss(**inputs: Any) -> torch.Tensor:
        return model(input_ids=ids, labels=ids, use_cache=False, **inputs).loss

    loss().backward()  # the first calls compile and select kernels
    with guarded("forward"):
        loss()
    retained_loss = loss()
    with guarded("backward"):
        retained_loss.backward()
    cache = LatentCache(model.config)
    with torch.no_grad():
        for part in (ids, ids[:, :1]):
            model.eval()(part, past_key_values=cache, use_cache=True, logits_to_keep=1)
        with guarded("decode step"):
            model(ids[:, :1], past_key_values=cache, use_cache=True)
    assert not faults, faults
    return {"synchronisations": 0, "trained": len(trained)}


# --- speed and memory, stock beside ------------------------------------------------------------------------------


def step_flops(config: Any, tokens: int, context: int, full: bool = False) -> float:
    """FLOPs of a LoRA step: 4 x active parameters x tokens (the base is frozen; 6 in full fine-tuning), and causal
    attention both ways."""
    d, heads = config.hidden_size, config.num_attention_heads
    qk, v = config.qk_nope_head_dim + config.qk_rope_head_dim, config.v_head_dim
    attention = d * heads * qk + d * (config.kv_lora_rank + config.qk_rope_head_dim) + heads * v * d
    attention += config.kv_lora_rank * heads * (config.qk_nope_head_dim + v)
    experts = 3 * d * config.moe_intermediate_size * (config.num_experts_per_tok + config.n_shared_experts)
    layers, dense = config.num_hidden_layers, config.first_k_dense_replace
    active = attention * layers + 3 * d * config.intermediate_size * dense + d * config.vocab_size
    active += (experts + d * config.n_routed_experts) * (layers - dense)
    return (6 if full else 4) * active * tokens + 3 * heads * (qk + v) * context * tokens * layers


def checkpoint(model: Any) -> None:
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def training_step(model: Any, optimizer: torch.optim.Optimizer, ids: torch.Tensor, **inputs: torch.Tensor) -> None:
    model(input_ids=ids, labels=ids, use_cache=False, **inputs).loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def lora_step(bench: Bench) -> Figures:
    """A LoRA step (attention and experts, r = 16, bf16, AdamW), with and without checkpointing, compared with stock."""
    rate, figures = bench.matrix_rate(), {"matrix_tflops": 0.0}
    figures["matrix_tflops"] = rate / 1e12
    batch, context = (4, 1024) if bench.on_gpu else (2, 32)
    ids = bench.ids(batch, context)
    for side in ("ours", "stock", "ours checkpointed"):
        is_ours = side != "stock"
        base = bench.large()
        model, trained = adapted(base if is_ours else bench.twin(base), is_ours)
        if "checkpointed" in side:
            checkpoint(model)
        optimizer = torch.optim.AdamW(trained.values(), lr=1e-4)

        step = partial(training_step, model, optimizer, ids)
        try:
            seconds, peak = bench.peak_gb(lambda step=step: bench.seconds(step, repeats=3))
            flops = step_flops(bench.config(DeepseekV2Config), batch * context, context)
            figures[side] = {
                "tokens_per_s": batch * context / seconds, "mfu": flops / seconds / rate, "peak_gb": peak,
            }  # fmt: skip
        except torch.OutOfMemoryError as error:
            figures[side] = {"out_of_memory": str(error)[:100]}
        if "checkpointed" in side:
            model.gradient_checkpointing_disable()
            model.disable_input_require_grads()
        if is_ours:
            bench._large = model.unload().eval()
        del model, trained, optimizer, step
    return compared(figures, "tokens_per_s")


@torch.no_grad()
def decoding(bench: Bench) -> Figures:
    """Prefill and decode steps at several batches and contexts in bf16: ours, ours captured as a graph, and stock."""
    sizes = ((1, 128), (8, 2048), (8, 8192)) if bench.on_gpu else ((1, 8), (2, 16))
    models = {"ours": bench.large(), "captured": bench.large(), "stock": bench.twin(bench.large())}
    figures: Figures = {}
    for batch, context in sizes:
        row: Figures = {}
        for side, model in models.items():
            try:
                decode_seconds(bench, model, side, bench.ids(batch, context))  # compiles and selects kernels
                (prefill, step), peak = bench.peak_gb(
                    partial(decode_seconds, bench, model, side, bench.ids(batch, context))
                )
                row[side] = {"prefill_s": prefill, "tokens_per_s": batch / step, "peak_gb": peak}
            except torch.OutOfMemoryError as error:
                row[side] = {"out_of_memory": str(error)[:100]}
        figures[f"{batch} x {context}"] = compared(row, "tokens_per_s")
    return figures


def new_cache(model: Any, side: str) -> Any:
    return DynamicCache(config=model.config) if side == "stock" else LatentCache(model.config)


def decode_seconds(bench: Bench, model: Any, side: str, ids: torch.Tensor, steps: int = 23) -> tuple[float, float]:
    """Seconds of the prefill, and of one step after it."""
    cache = new_cache(model, side)
    keep: dict[str, Any] = {"past_key_values": cache, "use_cache": True}
    prefill = bench.seconds(lambda: model(ids, logits_to_keep=1, **keep), repeats=1, warm_up=0)
    if side == "captured":
        rows, tokens = ids.shape
        fixed = SlotDecoder(model, cache, rows, tokens + steps, fixed=True, capture=bench.on_gpu)
        fixed.fill(range(rows), cache, range(rows), [tokens] * rows)
        return prefill, bench.seconds(lambda: fixed(ids[:, 0]), repeats=20, warm_up=3)
    return prefill, bench.seconds(lambda: model(ids[:, :1], **keep), repeats=20, warm_up=3)


def rollout(bench: Bench) -> Figures:
    """Sampling as in RL: 8 prompts, 8 answers each; compared with stock's `generate`."""
    prompts, length, new = (8, 256, 128) if bench.on_gpu else (2, 8, 4)
    ids = bench.ids(prompts, length).repeat_interleave(8, 0)
    rows, model, figures = ids.tolist(), bench.large(), {}
    twin = bench.twin(model)

    def ours() -> None:
        ends: dict[str, Any] = {"pad_token_id": 0, "eos_token_id": 2, "max_new_tokens": new}
        generate_answers(model, rows, **ends, temperature=1.0, batch_size=64, seeds=range(len(rows)))

    @torch.no_grad()
    def stock_rollout() -> None:
        twin.generate(ids, attention_mask=torch.ones_like(ids), do_sample=True, top_k=0, max_new_tokens=new)

    for side, run in (("ours", ours), ("stock", stock_rollout)):
        seconds, peak = bench.peak_gb(lambda run=run: bench.seconds(run, repeats=1, warm_up=1))
        figures[side] = {"tokens_per_s": ids.shape[0] * new / seconds, "peak_gb": peak}
    return compared(figures, "tokens_per_s")


def compared(figures: Figures, key: str) -> Figures:
    """The figures, with the ratios of ours (captured, if measured) to stock."""
    ours, stock_side = figures.get("captured", figures.get("ours", {})), figures.get("stock", {})
    if key in ours and key in stock_side:
        figures["ratio_speed"] = ours[key] / stock_side[key]
        if stock_side.get("peak_gb"):
            figures["ratio_memory"] = ours["peak_gb"] / stock_side["peak_gb"]
        if "prefill_s" in ours:
            figures["ratio_prefill"] = stock_side["prefill_s"] / ours["prefill_s"]
    return figures


CHECKS = (
    goldens,
    lora_gradients,
    cached_decoding,
    ragged_groups,
    no_waiting,
    lora_step,
    decoding,
    rollout,
)


def rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) else value


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--output", type=Path, help="where the figures go, as JSON")
    parser.add_argument("--only", default="", help="the checks whose name holds this word")
    arguments = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    bench = Bench(arguments.device)
    results: Figures = {
        "date": datetime.now(UTC).date().isoformat(),
        "device": torch.cuda.get_device_name() if bench.on_gpu else "cpu, toy size",
        "versions": {name: version(name) for name in ("torch", "transformers", "peft")},
    }
    lines, failed = [], 0
    for check in CHECKS:
        if arguments.only not in check.__name__:
            continue
        start = time.perf_counter()
        try:
            figures = rounded(check(bench))
            verdict = "ok"
        except Exception as error:
            figures, verdict, failed = {"error": f"{type(error).__name__}: {str(error)[:500]}"}, "FAILED", failed + 1
            traceback.print_exc()
        seconds = time.perf_counter() - start
        results[check.__name__] = figures
        lines.append(f"{check.__name__:<16} {verdict:<7} {seconds:6.1f} s  {json.dumps(figures)}")
        print(lines[-1], flush=True)
        if arguments.output:  # keeps the results so far if a later check crashes
            arguments.output.parent.mkdir(parents=True, exist_ok=True)
            arguments.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        gc.collect()
        if bench.on_gpu:
            torch.cuda.empty_cache()
    print("\n" + "\n".join(line[:400] for line in lines))
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
