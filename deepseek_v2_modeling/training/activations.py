"""How much memory a training step takes beside weights, gradients and the optimizer's state: from the config alone.

The tables follow what autograd keeps of our forward (kernels/ save as little as they can), and what a backward pass
has in memory at its worst moments. tests/stages/test_plan.py compares them with real steps.

D hidden, H heads, Q q_lora_rank, C kv_lora_rank, R rotary width, W qk width, V v width, I dense width, F expert width,
S width of the shared experts, E experts, K experts a token, G groups.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from ..configuration import DeepseekV2Config
from ..kernels.row_blocks import IN_CACHE
from ..kernels.token_scores import BLOCK_LOGITS, CACHED_LOGITS
from ..layers.balance_losses import COEFFICIENTS
from .sizes import FLOAT32, Sizes, Unit

INDEX = 8  # bytes of an int64
READ_INPUT = ("q_proj", "q_a_proj", "k_proj", "v_proj", "kv_a_proj_with_mqa")  # projections of attention's own input


@dataclass(frozen=True)
class Step:
    """One forward and backward pass of one process.

    tokens: in the micro-batch. labels: tokens with a label, whose logits are computed; 0 without a language-model head.
    low: bytes of a value that products compute with; wide: of a value of the residual stream. checkpointing: whether
    layers are recomputed in the backward pass. on_cpu: softmaxes and gates then run in pieces that fit into its cache.
    figures: whether entropies of the logits are needed. accumulates: whether there are gradients of an earlier
    micro-batch, to which those of this one are added. uniform: see `kernels.token_scores.Head`. keys: tokens that
    attention reads as keys and values, more than `tokens` where the prompt of several answers is; 0 for as many.
    """

    tokens: int
    labels: int
    low: int
    wide: int
    checkpointing: bool = False
    on_cpu: bool = False
    figures: bool = True
    accumulates: bool = False
    uniform: bool = True
    keys: int = 0


class Activations(NamedTuple):
    """Bytes. saved: what the layers keep for the backward pass. head: the most that the language-model head and its
    loss take. layer: the most that the backward pass of one layer has beside `saved`; a recomputed layer included."""

    saved: int
    head: int
    layer: int

    @property
    def peak(self) -> int:
        """The most at one time: the head and a layer's backward pass come one after the other."""
        return self.saved + max(self.head, self.layer)


def step_memory(settings: DeepseekV2Config, sizes: Sizes, step: Step) -> Activations:
    """What a training step takes beside the weights and the state of their training."""
    shapes = _Shapes(settings, sizes, step)
    last = shapes.norm("root", "norm", settings.hidden_size, step.wide)
    kinds: tuple[Unit, Unit] = ("dense layer", "MoE layer")
    layers: dict[Unit, tuple[Table, int]] = {unit: shapes.layer(unit) for unit in kinds if sizes.units[unit]}
    if step.checkpointing:
        kept = settings.num_hidden_layers * settings.hidden_size * step.wide
        worst = max(_sum(saved) * step.tokens + peak for saved, peak in layers.values())
    else:
        kept = sum(_sum(saved) * sizes.units[unit] for unit, (saved, _) in layers.items())
        worst = max(peak for _, peak in layers.values())
    balance = shapes.balance() * sizes.units["MoE layer"]
    saved = step.tokens * (kept + last + balance)
    return Activations(saved, _head(settings, sizes, step), worst)


def _sum(table: Iterable[tuple[str, int]]) -> int:
    return sum(size for _, size in table)


Table = list[tuple[str, int]]  # (what, bytes of a token)


class _Shapes:
    """Bytes of a token, by what keeps them."""

    def __init__(self, settings: DeepseekV2Config, sizes: Sizes, step: Step):
        self.settings, self.sizes, self.step = settings, sizes, step
        self.hidden = settings.hidden_size
        self.heads = settings.num_attention_heads
        self.attended = settings.attention_sizes
        self.qk = self.attended.qk
        self.top_k, self.experts = settings.num_experts_per_tok or 0, settings.n_routed_experts or 0
        self.width = settings.moe_intermediate_size
        self.shared = (settings.n_shared_experts or 0) * self.width

    def norm(self, unit: Unit, module: str, width: int, itemsize: int) -> int:
        """A norm keeps its input and 1 / rms, and what its weight was multiplied with if that is trained."""
        return width * itemsize * (1 + self.sizes.trains(unit, module)) + FLOAT32

    def of(self, unit: Unit, *modules: str) -> bool:
        """Whether any of the modules is trained or adapted: then it keeps its input."""
        return any(self.sizes.trains(unit, module) for module in modules)

    def attention(self, unit: Unit) -> Table:
        low, wide = self.step.low, self.step.wide
        inputs = (f"self_attn.{name}" for name in READ_INPUT)
        table = [
            ("input and its norm", self.norm(unit, "input_layernorm", self.hidden, wide)),
            ("input of q, k and v", self.hidden * wide * self.of(unit, *inputs)),
            ("q and output", 2 * self.heads * self.qk * low + self.heads * FLOAT32),
            ("k and v", 2 * self.heads * self.qk * low * max(self.step.keys, self.step.tokens) // self.step.tokens),
            ("input of o", self.heads * self.attended.value * low * self.of(unit, "self_attn.o_proj")),
        ]
        return table + (self.latents(unit) if self.settings.uses_latents else [])

    def latents(self, unit: Unit) -> Table:
        low, wide, (latent, rope) = self.step.low, self.step.wide, self.attended.cached
        table = [
            ("kv latents", self.norm(unit, "self_attn.kv_a_layernorm", latent, low)),
            ("rotary part", rope * low),
            ("input of kv_b", latent * wide * self.of(unit, "self_attn.kv_b_proj")),
        ]
        if self.settings.q_lora_rank is not None:
            rank = self.settings.q_lora_rank
            table += [("q latents", self.norm(unit, "self_attn.q_a_layernorm", rank, low))]
            table += [("input of q_b", rank * wide * self.of(unit, "self_attn.q_b_proj"))]
        return table

    def mlp(self, unit: Unit, name: str, width: int) -> Table:
        low = self.step.low
        return [
            ("gate and up", 2 * width * low),
            ("input of down", width * low * self.of(unit, f"{name}.down_proj")),
        ]

    def feed_forward(self, unit: Unit) -> Table:
        low, wide, settings = self.step.low, self.step.wide, self.settings
        table = [("residual and its norm", self.norm(unit, "post_attention_layernorm", self.hidden, wide))]
        if unit == "dense layer":
            taught = self.of(unit, "mlp.gate_proj", "mlp.up_proj")
            return [*table, ("input", self.hidden * wide * taught), *self.mlp(unit, "mlp", settings.intermediate_size)]
        shared = self.of(unit, "mlp.shared_experts.gate_proj", "mlp.shared_experts.up_proj")
        kept_wide = wide != low and (shared or self.of(unit, "mlp.gate"))
        limited = settings.topk_method == "group_limited_greedy"
        return [
            *table,
            ("input of experts", self.hidden * (low + wide * kept_wide)),
            ("input of the router", self.hidden * FLOAT32 * (wide < FLOAT32 and self.of(unit, "mlp.gate"))),
            ("scores", self.experts * FLOAT32 + self.top_k * (FLOAT32 + INDEX)),
            ("groups", limited * (self.experts + (settings.n_group or 1) * FLOAT32)),
            ("places of slots", 3 * self.top_k * INDEX),
            ("gate and up of experts", 2 * self.top_k * self.width * low),
            *self.mlp(unit, "mlp.shared_experts", self.shared),
        ]

    def balance(self) -> int:
        """The softmax over all experts and the chosen ones, per MoE layer."""
        used = any(getattr(self.settings, name) for name in COEFFICIENTS.values())
        return (2 * self.experts * FLOAT32 + self.top_k * INDEX) * used

    def layer(self, unit: Unit) -> tuple[Table, int]:
        """What a layer keeps of a token, and the most bytes that its backward pass has beside that."""
        attention, feed_forward = self.attention(unit), self.feed_forward(unit)
        stream = 2 * self.hidden * self.step.wide  # the gradient of the residual stream, and what is added to it
        of_attention = self.step.tokens * (4 * self.heads * self.qk * self.step.low - _sum(feed_forward))
        feed_forward_too = self.backward_of_mlp() if unit == "dense layer" else self.backward_of_experts(unit)
        return attention + feed_forward, self.step.tokens * stream + max(of_attention, feed_forward_too)

    def backward_of_mlp(self) -> int:
        return self.step.tokens * 4 * self.settings.intermediate_size * self.step.low

    def backward_of_experts(self, unit: Unit) -> int:
        """kernels/expert_training.py, when the shared experts have passed their gradients on already."""
        low, tokens = self.step.low, self.step.tokens
        rows, gates = tokens * self.top_k * self.hidden * low, tokens * self.top_k * self.width * low
        down, gate_up = (self.gradients(unit, f"mlp.experts.{name}") for name in ("down_proj", "gate_up_proj"))
        gating = 4 * min(gates, IN_CACHE * low) if self.step.on_cpu else 0  # a GPU does that in one kernel
        factors = FLOAT32 * sum(w.trained for w in self.sizes.weights if w.unit == unit and w.adapter and w.routed)
        first = max(gating, rows + gate_up + factors)
        return 2 * rows + 4 * gates + down + first - tokens * _sum(self.mlp(unit, "mlp.shared_experts", self.shared))

    def gradients(self, unit: Unit, module: str) -> int:
        """The gradients of a trained weight of this micro-batch, before they are added to those of earlier ones."""
        own = [w for w in self.sizes.weights if w.unit == unit and w.module.startswith(module)]
        return FLOAT32 * sum(weight.trained for weight in own) * self.step.accumulates


def _head(settings: DeepseekV2Config, sizes: Sizes, step: Step) -> int:
    """The language-model head and its loss, a block of tokens at a time (kernels/token_scores.py): its input, logits,
    and the gradients, which are computed with the logits."""
    if not step.labels:
        return 0
    logits, hidden = step.labels * settings.vocab_size, step.labels * settings.hidden_size
    trained = sizes.trains("root", "lm_head")
    copies = (step.low < FLOAT32) + 1 + 2 * step.figures  # of logits, in float32
    if trained and not step.uniform and logits <= BLOCK_LOGITS:  # autograd keeps all of them
        return 2 * hidden * step.wide + logits * (step.low + FLOAT32 * (copies + 1))
    block = min(logits, BLOCK_LOGITS)
    piece = min(block, CACHED_LOGITS) if step.on_cpu else block
    weights = settings.vocab_size * settings.hidden_size * FLOAT32 * trained
    blocks = block * step.low * (1 + (logits > block))
    return 2 * hidden * step.wide + weights + blocks + max(piece * FLOAT32 * (copies + (logits > piece)), weights)
