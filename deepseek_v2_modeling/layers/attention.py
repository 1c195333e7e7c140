"""Multi-head latent attention (paper, section 2.1).

B batch, T query tokens, S cached and new tokens, H heads, C kv_lora_rank, N qk_nope_head_dim,
R qk_rope_head_dim, V v_head_dim.

There are two ways to compute the same result:
- expanded: kv_b_proj maps the latents to keys and values (training, prefill);
- absorbed: W_UK is applied to the query and W_UV to the output, so that attention runs on the cached latents
  themselves (decoding). kv_b_proj and its adapters are read at each step, so nothing is cached that could become stale.
  If kv_b_proj cannot be absorbed (an adapter other than W + s B A, a weight that torchao quantised), decoding runs
  expanded, which is slower.
"""

from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers.cache_utils import Cache

from ..cache import joined, with_room
from ..configuration import AttentionSizes, DeepseekV2Config
from ..kernels.float32_products import Linear, fastest_dtype, is_plain, rounds_apart
from ..kernels.grouped_products import ActiveAdapter
from ..kernels.quantized_weights import Quantized, QuantizedLinear
from ..packing.last_tokens import Places
from ..packing.read_layouts import ReadLayout
from .attending import AttentionBlock, at_places, attend
from .attention_plan import AttentionPlan
from .norm import DeepseekV2RMSNorm
from .peft_factors import beyond_lora, linear, unwrap
from .rope import rotate

WORTH_A_PRODUCT = 2**16  # values; from this size on a separate product per row pays
LATENT_EPS = 1e-6  # official: the epsilon of the norms on latents, regardless of rms_norm_eps
KvB = tuple[torch.Tensor, list[ActiveAdapter]]


def by_row(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a [B, M, K] @ b [B, K, N], where b is a slice of a cache. On a CPU, bmm first copies a b whose batch rows are not
    adjacent in memory; if it is large, one product per batch row is faster."""
    spaced = b.stride(0) != b.shape[1] * b.shape[2]
    if a.device.type == "cpu" and spaced and (a.shape[0] == 1 or b[0].numel() > WORTH_A_PRODUCT):
        return torch.stack([x @ y for x, y in zip(a, b, strict=True)])
    return a @ b


def is_plain_linear(layer: nn.Module) -> bool:
    """Whether a layer just computes W x: an nn.Linear without adapters whose weight is not quantised."""
    if not isinstance(layer, nn.Linear) or isinstance(layer, BaseTunerLayer):
        return False
    return is_plain(layer.weight) and layer.weight.is_floating_point() and layer.weight.itemsize > 1


class DeepseekV2Attention(AttentionBlock):
    """Multi-head latent attention with the hub's parameter names: q_proj if q_lora_rank is None, otherwise q_a_proj,
    q_a_layernorm and q_b_proj."""

    def __init__(self, config: DeepseekV2Config, layer_idx: int, scaling: float, sizes: AttentionSizes):
        super().__init__(config, layer_idx, scaling)
        hidden, heads, bias = config.hidden_size, config.num_attention_heads, config.attention_bias
        self.num_heads, self.nope_dim, self.rope_dim, self.qk_dim = heads, sizes.nope, sizes.rope, sizes.qk
        self.v_dim, self.latent_dim = sizes.value, sizes.cached[0]
        if config.q_lora_rank is None:
            self.q_proj = Linear(hidden, heads * self.qk_dim, bias=False)
        else:
            self.q_a_proj = Linear(hidden, config.q_lora_rank, bias=bias)
            self.q_a_layernorm = DeepseekV2RMSNorm(config.q_lora_rank, LATENT_EPS)
            self.q_b_proj = Linear(config.q_lora_rank, heads * self.qk_dim, bias=False)
        self.kv_a_proj_with_mqa = Linear(hidden, self.latent_dim + self.rope_dim, bias=bias)
        self.kv_a_layernorm = DeepseekV2RMSNorm(self.latent_dim, LATENT_EPS)
        self.kv_b_proj = Linear(self.latent_dim, heads * (self.nope_dim + self.v_dim), bias=False)
        self.o_proj = Linear(heads * self.v_dim, hidden, bias=bias)

    def queries(self, x: torch.Tensor) -> torch.Tensor:
        """The queries [B, H, T, N + R] before rotation."""
        without_q_lora = self.config.q_lora_rank is None
        q = (
            linear(self.q_proj, x)
            if without_q_lora
            else linear(self.q_b_proj, self.q_a_layernorm(linear(self.q_a_proj, x)))
        )
        return q.unflatten(-1, (self.num_heads, self.qk_dim)).transpose(1, 2)

    def latents(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(normalised latents [B, 1, T, C], rotary keys [B, 1, T, R] before rotation)."""
        latent, rope_key = linear(self.kv_a_proj_with_mqa, x).split((self.latent_dim, self.rope_dim), dim=-1)
        return self.kv_a_layernorm(latent).unsqueeze(1), rope_key.unsqueeze(1)

    def expanded(
        self,
        query: torch.Tensor,
        latent: torch.Tensor,
        rope_key: torch.Tensor,
        plan: AttentionPlan,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attention over keys and values computed from the latents: ([B, T, H, V], weights or None)."""
        kv = linear(self.kv_b_proj, latent.squeeze(1)).unflatten(-1, (self.num_heads, self.nope_dim + self.v_dim))
        key_nope, value = kv.transpose(1, 2).split((self.nope_dim, self.v_dim), dim=-1)
        key = torch.cat((key_nope, rope_key.to(key_nope.dtype).expand(-1, self.num_heads, -1, -1)), dim=-1)
        return attend(self, query.to(key.dtype), key, value, plan, **kwargs)

    def kv_b_parts(self, dtype: torch.dtype) -> KvB | None:
        """(kv_b_proj's weight as [H, N + V, C], its active adapters with b as [H, N + V, r]); None if kv_b_proj
        computes anything else, so that it cannot be absorbed. dtype: of the values of a weight that is stored in fewer
        bits."""
        layer: Any = self.kv_b_proj
        while isinstance(layer, LoraLayer):
            if beyond_lora(layer):
                return None
            layer = layer.base_layer
        if not (isinstance(layer, QuantizedLinear) or is_plain_linear(layer)):
            return None
        base, adapters = unwrap(self.kv_b_proj)
        rows = (self.num_heads, self.nope_dim + self.v_dim)
        parts = [ActiveAdapter(a.a, a.b.unflatten(0, rows), a.scaling, a.dropout) for a in adapters.get("weight", [])]
        weight: torch.Tensor = base.weight
        if isinstance(base, QuantizedLinear):
            weight = Quantized(weight, base.storages["weight"]).to(dtype)
        return weight.unflatten(0, rows), parts

    def absorbed(
        self, query: torch.Tensor, keys: torch.Tensor, mask: torch.Tensor | None, kv_b: KvB
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attention over the latents themselves: ([B, T, H, V], weights [B, H, T, S]).

        keys [B, S, C + R]: latents and rotary keys side by side. mask [B, 1, T, S]: True where allowed. kv_b: the
        result of `kv_b_parts`. All heads share the same keys, so the heads and queries of a row are rows of one
        product.
        """
        batch, heads, length, _ = query.shape
        weight, adapters = kv_b
        w_uk, w_uv = weight.split((self.nope_dim, self.v_dim), dim=1)  # [H, N, C], [H, V, C]
        q_nope, q_rope = query.split((self.nope_dim, self.rope_dim), dim=-1)
        dtype, wide = q_nope.dtype, fastest_dtype(q_nope)
        q_HMN = q_nope.transpose(0, 1).flatten(1, 2).to(wide)  # M = B*T
        q_HMC = q_HMN @ w_uk.to(wide)
        for a in adapters:
            low = (q_HMN @ a.b[:, : self.nope_dim].to(wide)).contiguous()  # otherwise bmm copies a once per head
            q_HMC = q_HMC + low @ a.a.to(wide) * a.scaling
        q_latent = q_HMC.unflatten(1, (batch, length)).transpose(0, 1)
        q_BMW = torch.cat((q_latent, q_rope.to(wide)), dim=-1).flatten(1, 2)
        mixed, weights = self.over_latents(q_BMW, keys, mask)
        m_HMC = mixed.unflatten(1, (heads, length)).transpose(0, 1).flatten(1, 2).to(wide).contiguous()
        w_uv = w_uv.to(wide)
        if w_uv.device.type == "cpu" and wide.itemsize < 4:
            w_uv = w_uv.contiguous()  # on a CPU, bmm of a transposed slice takes five times as long as of a copy
        out = m_HMC @ w_uv.transpose(1, 2)
        for a in adapters:
            out = out + m_HMC @ a.a.to(wide).t() @ a.b[:, self.nope_dim :].to(wide).transpose(1, 2) * a.scaling
        out = out.to(dtype).unflatten(1, (batch, length)).permute(1, 2, 0, 3)
        return out, weights[..., : keys.shape[1]].unflatten(1, (heads, length))

    def over_latents(
        self, q_BMW: torch.Tensor, keys: torch.Tensor, mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Softmax attention of the heads and queries of each row (M = H*T) over its keys [B, S, W]: ([B, M, C], weights
        [B, M, S], where S may be rounded up to whole blocks)."""
        rows, tokens = keys.shape[:2]
        on_cpu = keys.device.type == "cpu"
        if on_cpu and q_BMW.dtype != keys.dtype and rows > 1 and keys[0].numel() > WORTH_A_PRODUCT:
            masks = [None] * rows if mask is None else mask.expand(rows, -1, -1, -1).split(1)
            parts = zip(q_BMW.split(1), keys.split(1), masks, strict=True)
            out, weights = zip(*[self.over_latents(*part) for part in parts], strict=True)
            return torch.cat(out), torch.cat(weights)  # row by row, so that the float32 keys stay in the CPU's cache
        if q_BMW.dtype.itemsize < 4:
            # Whole blocks are faster (see `whole_blocks`), and the shape stays the same for many steps: oneDNN creates
            # a primitive for each new shape.
            keys = with_room(keys)
        keys = keys.to(q_BMW.dtype)
        scores = by_row(q_BMW, keys.transpose(1, 2)).float() * self.scaling  # [B, M, S]
        if mask is not None:
            by_query = scores[..., :tokens].unflatten(1, (-1, mask.shape[2]))
            by_query.masked_fill_(~mask, torch.finfo(scores.dtype).min)
        scores[..., tokens:] = -torch.inf
        # Multiply with whole rows, rotary keys included, and slice the result: reading part of each row is slower.
        weights = scores.softmax(-1).to(q_BMW.dtype)
        return by_row(weights, keys)[..., : self.latent_dim], weights

    def forward(
        self,
        x: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        plan: AttentionPlan,
        past_key_values: Cache | None = None,
        read: Places | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """x [B, T, D] -> ([B, T, D], attention weights or None). read: the only tokens [R] of the result, then [1, R,
        D]."""
        cos, sin = position_embeddings
        if read is not None and plan.reads is not None:
            wide = torch.float64 if rounds_apart(x) else torch.float32
            if (kv_b := self.kv_b_parts(wide)) is not None:
                return self.read_only(x, cos, sin, read, plan.reads, kv_b, wide, past_key_values), None
        q_nope, q_rope = self.queries(x).split((self.nope_dim, self.rope_dim), dim=-1)
        query = torch.cat((q_nope, rotate(q_rope, cos, sin)), dim=-1)
        latent, rope_key = self.latents(x)
        rope_key = rotate(rope_key, cos, sin)
        if past_key_values is not None:
            latent, rope_key = past_key_values.update(latent, rope_key, self.layer_idx)
        kv_b = self.kv_b_parts(fastest_dtype(query)) if plan.absorb else None
        if kv_b is not None:
            out, weights = self.absorbed(query, joined(latent, rope_key), plan.mask, kv_b)
        else:
            out, weights = self.expanded(query, latent, rope_key, plan, **kwargs)
        return linear(self.o_proj, at_places(out.flatten(-2), read)), self.returned(weights)

    def read_only(
        self,
        x: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        read: Places,
        layout: ReadLayout,
        kv_b: KvB,
        wide: torch.dtype,
        cache: Cache | None,
    ) -> torch.Tensor:
        """The result for a few tokens [1, R, D], from the latents of all. wide: where it is then rounded to low
        precision, float64, so that it is rounded alike whatever documents are beside."""
        shape = (*x.shape[:2], -1)
        places = tuple(part.expand(shape)[read][None] for part in (cos, sin))
        q_nope, q_rope = self.queries(x[read][None]).split((self.nope_dim, self.rope_dim), dim=-1)
        query = torch.cat((q_nope, rotate(q_rope, *places)), dim=-1)[0].to(wide)  # [H, R, N + R]
        latent, rope_key = self.latents(x)
        rope_key = rotate(rope_key, cos, sin)
        if cache is not None:  # an empty one
            latent, rope_key = cache.update(latent, rope_key, self.layer_idx)
        keys = joined(latent, rope_key).flatten(0, 1).to(wide)
        with torch.autocast(x.device.type, enabled=False):
            outs = [
                self.absorbed(query[:, bucket.queries].transpose(0, 1), keys[bucket.keys], bucket.mask, kv_b)[0]
                for bucket in layout.buckets
            ]
        out = torch.cat([part.flatten(0, 1) for part in outs])[layout.places]
        return linear(self.o_proj, out.flatten(-2).to(x.dtype)[None])
