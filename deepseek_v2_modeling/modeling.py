"""The DeepSeek-V2 model classes for transformers, with the stock parameter names and the official model's behaviour."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial, wraps
from typing import Any

import torch
from torch import nn
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.generation.utils import GenerationMixin
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, SequenceClassifierOutputWithPast
from transformers.utils import logging
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .cache import LatentCache
from .checkpoints.strict import StrictPreTrainedModel
from .configuration import CORRECTION_BIAS, DeepseekV2Config, check_config, check_settings
from .errors import ModelError
from .kernels.float32_products import Linear, WideLinear, rounds_apart
from .kernels.token_scores import IGNORED, blockwise_loss
from .layers.attending import AttentionBlock, at_places
from .layers.attention_plan import plan_attention
from .layers.balance_losses import BalanceLedger, RouterOutput, balance_losses, expert_counts
from .layers.moe import DeepseekV2Experts, DeepseekV2MLP, DeepseekV2MoE, DeepseekV2Router
from .layers.multi_head_attention import ATTENTIONS
from .layers.norm import DeepseekV2RMSNorm
from .layers.quantization import Quantization, check_quantization_library, quantize_layers
from .layers.rope import RotaryEmbedding, softmax_scale
from .outputs import DeepseekV2ModelOutput, causal_lm_output
from .packing.boundaries import BOUNDARIES, documents_with_cache
from .packing.last_tokens import Places, packed_rows, real_runs, repeated, scored_tokens
from .routing_replay import Routes, next_routes

logger = logging.get_logger(__name__)

LOST_BALANCE = (
    "The balance losses of this training forward are in no loss: the model was called without labels, or past its "
    "own forward, as TRL's trainers do. `class MyTrainer(RunTrainerMixin, SFTTrainer)` puts them back (RunTrainerMixin "
    "is in deepseek_v2_modeling); so does `collect_balance` in a loop of your own, or adding the output's aux_loss to "
    "your loss. Coefficients of 0 (aux_loss_alpha, ...) turn them off."
)
STEADY_TOKENS = 512  # fewer, and oneDNN sums low-precision products in an order that depends on their number
BATCH_SHAPED = ("output_hidden_states", "output_attentions", "output_router_logits")  # results with values per token
EXPERTS_IMPLEMENTATIONS = ("grouped_mm", "batched_mm", "eager")
LayerOutput = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]


class DeepseekV2DecoderLayer(GradientCheckpointingLayer):
    """Attention and feed-forward (dense or MoE), each with a pre-norm and a residual connection.

    attention: makes the attention of a layer, from its index.
    """

    def __init__(self, config: DeepseekV2Config, layer_idx: int, attention: Callable[[int], AttentionBlock]):
        super().__init__()
        self.self_attn = attention(layer_idx)
        self.is_moe = config.is_moe_layer(layer_idx)
        self.mlp = DeepseekV2MoE(config) if self.is_moe else DeepseekV2MLP(config, config.intermediate_size)
        self.input_layernorm = DeepseekV2RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = DeepseekV2RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self, x: torch.Tensor, replayed: torch.Tensor | None = None, read: Places | None = None, **kwargs: Any
    ) -> LayerOutput:
        """x [B, T, D] -> (x [B, T, D], router logits [N, E], chosen experts [N, K]); the last two are None in a dense
        layer. replayed: experts to use instead of choosing them. read: the only tokens [R] that are computed; x is then
        [1, R, D]."""
        attended = self.self_attn(self.input_layernorm(x), read=read, **kwargs)[0]
        x = at_places(x, read) + attended
        normed = self.post_attention_layernorm(x)
        if not self.is_moe:
            return x + self.mlp(normed), None, None
        y, router = self.mlp(normed, replayed)
        return x + y, router.logits, router.experts


@contextmanager
def without_checkpointing(layers: Iterable[Any]) -> Iterator[None]:
    """Turn gradient checkpointing off for these layers: transformers' checkpointed layers ignore the cache."""
    switched = [layer for layer in layers if layer.gradient_checkpointing]
    for layer in switched:
        layer.gradient_checkpointing = False
    try:
        yield
    finally:
        for layer in switched:
            layer.gradient_checkpointing = True


def only_one(input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None) -> torch.Tensor:
    """The one that is given. Raises ValueError if it is none or both."""
    given = [inputs for inputs in (input_ids, inputs_embeds) if inputs is not None]
    if len(given) != 1:
        raise ValueError("give exactly one of input_ids and inputs_embeds")
    return given[0]


def without_default_cache(forward: Callable) -> Callable:
    """Decorator: in training, a cache is created only if the call asks for one, not because of the config's default."""

    @wraps(forward)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("use_cache") is None and self.training and torch.is_grad_enabled():
            kwargs["use_cache"] = False
        return forward(self, *args, **kwargs)

    return wrapper


class DeepseekV2PreTrainedModel(StrictPreTrainedModel):
    config_class = DeepseekV2Config
    config: DeepseekV2Config
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["DeepseekV2DecoderLayer"]  # noqa: RUF012 - these are read by transformers
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _keep_in_fp32_modules_strict = [CORRECTION_BIAS]  # noqa: RUF012
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {  # noqa: RUF012
        "hidden_states": OutputRecorder(DeepseekV2DecoderLayer, index=0),
        "attentions": OutputRecorder(AttentionBlock, index=1),
    }

    def __init__(self, config: DeepseekV2Config):
        expected: Any = self.config_class
        if not isinstance(config, expected):
            raise ModelError(
                f"{type(self).__name__} was given a {type(config).__module__}.{type(config).__name__}: it takes a "
                f"deepseek_v2_modeling.{expected.__name__}, which AutoConfig gives too"
            )
        super().__init__(config)

    def store_in(self, quantization: Quantization | None) -> None:
        """Quantise the layers of a model without weights, unless `quantization` is None (`layers.quantization`)."""
        if quantization is not None:
            check_quantization_library(quantization)
            quantize_layers(self, quantization)

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return True

    def get_correct_experts_implementation(self, requested_experts: str | None) -> str:
        """Accept transformers' names for its implementations of experts; ours has only one, with the same results."""
        if requested_experts not in (None, *EXPERTS_IMPLEMENTATIONS):
            raise ModelError(
                f'experts_implementation "{requested_experts}" is not supported: use one of {EXPERTS_IMPLEMENTATIONS}, '
                "all of which run the experts as these classes do"
            )
        return requested_experts or "grouped_mm"

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, DeepseekV2Router):
            init.normal_(module.weight, mean=0.0, std=std)
            if (bias := getattr(module, CORRECTION_BIAS)) is not None:
                init.zeros_(bias)
        elif isinstance(module, DeepseekV2Experts):
            init.normal_(module.gate_up_proj, mean=0.0, std=std)
            init.normal_(module.down_proj, mean=0.0, std=std)


class DeepseekV2Model(DeepseekV2PreTrainedModel):
    """Embeddings, decoder layers and the final norm. If the checkpoint has a head, loading ignores it."""

    other_heads = ("lm_head.", "score.")
    keeps_balance = True  # marks the backbone for `collect_balance` and routing replay, under any wrapper

    def __init__(self, config: DeepseekV2Config, quantization: Quantization | None = None):
        super().__init__(config)
        check_config(config)  # again, because from_pretrained sets its keywords after the config's own check
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        shared = {"scaling": softmax_scale(config), "sizes": config.attention_sizes}
        attention = partial(ATTENTIONS[config.uses_latents], config, **shared)
        self.rotary_emb = RotaryEmbedding(config)
        self.layers = nn.ModuleList(
            DeepseekV2DecoderLayer(config, layer_idx, attention) for layer_idx in range(config.num_hidden_layers)
        )
        self.norm = DeepseekV2RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.ledger: BalanceLedger | None = None
        self.recordings: tuple[Routes, ...] = ()
        self.replayed_routes: Iterator[list[torch.Tensor]] | None = None
        self.post_init()
        self.store_in(quantization)

    @without_default_cache
    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_router_logits: bool | None = None,
        balance_in_loss: bool = False,
        prefix_documents: torch.Tensor | None = None,
        read: Places | None = None,
        **kwargs: Any,
    ) -> DeepseekV2ModelOutput:
        """Like the stock forward. In training it also computes the balance losses; here rather than in the layers, so
        that gradient checkpointing does not count them twice.

        balance_in_loss: whether the caller adds them to the loss; if nothing does, one warning is logged.
        prefix_documents: [documents] of one packed row, the number of the earlier document that each of them continues,
            such as the prompt of several answers, or -1. It attends to that one too, and to what that one continues.
            For the balance losses each document is a sequence: a prompt counts once.
        read: (rows [R], columns [R]) of the only tokens whose last hidden state is used, which is then [1, R, D]. The
            last layer computes no others, but for the latents of all. Not in training, nor while routes are recorded or
            replayed.

        Raises:
            ModelError: a setting of the config was changed to an unsupported value, or the attention implementation
                cannot continue documents.
            ValueError: not exactly one of input_ids and inputs_embeds is given, or prefix_documents with several rows.
        """
        check_settings(self.config)
        only_one(input_ids, inputs_embeds)
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        assert inputs_embeds is not None
        if use_cache and past_key_values is None:
            past_key_values = LatentCache(self.config)
        rows, queries = inputs_embeds.shape[:2]
        if prefix_documents is not None and rows > 1:
            raise ValueError(f"prefix_documents are of one packed row, not of {rows}")
        boundaries = {name: kwargs.pop(name, None) for name in BOUNDARIES}
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        documents = documents_with_cache(past_key_values, position_ids, attention_mask, boundaries, (rows, queries))
        if position_ids is None:
            position_ids = (torch.arange(queries, device=inputs_embeds.device) + past).unsqueeze(0)
        positions: Any = position_ids
        seen = (attention_mask, past_key_values, documents, prefix_documents)
        plan = plan_attention(self.config, inputs_embeds, *seen, read)
        layers: list[Any] = list(self.layers)
        moe_layers = sum(layer.is_moe for layer in layers)
        top_k = self.config.num_experts_per_tok or 0
        upcoming = iter(next_routes(self.replayed_routes, moe_layers, (rows, queries, top_k)) or [])

        hidden, routers = inputs_embeds, []
        position_embeddings = self.rotary_emb(positions)
        needless = self.gradient_checkpointing and (past_key_values is not None or not torch.is_grad_enabled())
        with without_checkpointing(layers) if needless else nullcontext():
            for layer in layers:
                hidden, logits, experts = layer(
                    hidden,
                    next(upcoming, None) if layer.is_moe else None,
                    read if layer is layers[-1] else None,
                    position_embeddings=position_embeddings,
                    plan=plan,
                    past_key_values=past_key_values,
                    position_ids=positions,
                    **kwargs,
                )
                if logits is not None:
                    routers.append(RouterOutput(logits, experts))
        for routes in self.recordings:
            routes.append([r.experts.detach().view(rows, queries, top_k) for r in routers])
        real = attention_mask[:, -queries:] if attention_mask is not None and attention_mask.ndim == 2 else None
        wanted = self.config.output_router_logits if output_router_logits is None else output_router_logits
        return DeepseekV2ModelOutput(
            last_hidden_state=self.norm(hidden),
            past_key_values=past_key_values,
            router_logits=tuple(r.logits for r in routers) if wanted else None,
            aux_loss=self.balance(routers, (rows, queries), real, documents, balance_in_loss),
        )

    def balance(
        self,
        routers: list[RouterOutput],
        shape: tuple[int, int],
        real: torch.Tensor | None,
        documents: torch.Tensor | None,
        in_loss: bool,
    ) -> torch.Tensor | None:
        """The sum of the balance losses in a training forward, otherwise None; also recorded in the ledger if there is
        one."""
        if not (self.training and torch.is_grad_enabled() and routers):
            return None
        losses = balance_losses(self.config, routers, shape, real, documents)
        if self.ledger is not None:
            self.ledger.add(losses, expert_counts(routers, real))
        elif losses and not in_loss and not torch.compiler.is_compiling():
            logger.warning_once(LOST_BALANCE)
        return torch.stack(list(losses.values())).sum() if losses else None


class DeepseekV2ForCausalLM(DeepseekV2PreTrainedModel, GenerationMixin):
    """The language model. In training with labels, `loss` is cross-entropy (nats) plus the balance losses."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: DeepseekV2Config, quantization: Quantization | None = None):
        super().__init__(config)
        self.model = DeepseekV2Model(config)
        self.vocab_size = config.vocab_size
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()
        self.store_in(quantization)

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        uses_latent_cache = generation_config.use_cache is not False and generation_config.cache_implementation is None
        if uses_latent_cache and model_kwargs.get("past_key_values") is None:
            model_kwargs["past_key_values"] = LatentCache(self.config)
            return None
        stock: Any = super()
        return stock._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Any,
    ) -> MoeCausalLMOutputWithPast:
        """Like the stock forward, plus `aux_loss`.

        With `num_items_in_batch` (Trainer under gradient accumulation) both losses are this micro-batch's share; the
        balance losses are weighted by its number of labels. In training with labels the full logits are computed only
        when they are accessed.
        """
        items, shifted = kwargs.get("num_items_in_batch"), kwargs.get("shift_labels")
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            balance_in_loss=labels is not None,
            **kwargs,
        )
        hidden, loss, logits, make_logits = outputs.last_hidden_state, None, None, None
        trains = self.training and torch.is_grad_enabled() and not torch.compiler.is_compiling()
        if labels is not None and trains and isinstance(logits_to_keep, int) and logits_to_keep == 0:
            loss = blockwise_loss(self.lm_head, hidden, labels, self.vocab_size, items, shifted)
            make_logits = partial(self.lm_head, hidden)
        else:
            keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.lm_head(hidden[:, keep, :].contiguous())  # as in our Linear, since the head may be another's
            if labels is not None:
                loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.vocab_size, **kwargs)
        if labels is not None and outputs.aux_loss is not None and self.model.ledger is None:
            targets = labels[:, 1:] if shifted is None else shifted
            share = 1.0 if items is None else (targets != IGNORED).sum() / items
            loss = loss + outputs.aux_loss * share
        return causal_lm_output(
            make_logits,
            loss=loss,
            aux_loss=outputs.aux_loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits,
        )


class DeepseekV2ForSequenceClassification(DeepseekV2PreTrainedModel):
    """A score (or class logits), in float32, computed at the last real token of each row, or of each packed document.

    `logits` is [B, num_labels]. In a packed batch (position_ids that restart, cu_seq_lens or seq_idx) it is
    [documents, num_labels], in the order of the rows, and `labels` has one entry per document. Padding marked in
    attention_mask gets no score.
    """

    new_heads = ("score.",)
    other_heads = ("lm_head.",)
    accepts_loss_kwargs = False  # Trainer then divides the loss, a mean over rows, by the number of micro-batches

    def __init__(self, config: DeepseekV2Config, quantization: Quantization | None = None):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = DeepseekV2Model(config)
        self.score = WideLinear(config.hidden_size, config.num_labels or 1, bias=False)
        self.post_init()
        self.store_in(quantization)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutputWithPast:
        """Like the stock forward, but padding is taken from attention_mask if there is one, since a real token may have
        the padding id (often pad = eos).

        Rows with a mask are computed as packed documents without padding, so that the padding side does not affect
        scores; no cache is returned then, and `use_cache=True` prevents it. In training with labels, `loss` includes
        the balance losses.
        """
        rows = None  # all that are found
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        inputs = only_one(input_ids, inputs_embeds)
        least = STEADY_TOKENS if rounds_apart(self.model.embed_tokens.weight) else 0
        if past_key_values is None and position_ids is None and self._packs(use_cache, kwargs):
            real: Any = real_runs(attention_mask, (inputs.shape[0], inputs.shape[1]))
            if real is not None:
                packed: Any
                positions: Any
                packed, positions = packed_rows(inputs, real, least)
                input_ids, inputs_embeds = (packed, None) if inputs_embeds is None else (input_ids, packed)
                inputs = packed
                position_ids, attention_mask, use_cache = positions, torch.ones_like(positions), False
                rows = len(real)
        boundaries = (None, {}) if past else (position_ids, kwargs)  # with a filled cache each row is one sequence
        shape = (inputs.shape[0], inputs.shape[1])
        places = scored_tokens(input_ids, attention_mask, *boundaries, self.config.pad_token_id, shape)
        few = not (torch.is_grad_enabled() or torch.compiler.is_compiling() or self._asks_for_tokens(kwargs))
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            balance_in_loss=labels is not None,
            read=repeated(places, least) if few else None,
            **kwargs,
        )
        hidden = outputs.last_hidden_state
        pooled = self.score((hidden[0, : len(places[0])] if few else hidden[places])[:rows])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=pooled, labels=labels, pooled_logits=pooled, config=self.config)
            if outputs.aux_loss is not None and self.model.ledger is None:
                loss = loss + outputs.aux_loss
        return SequenceClassifierOutputWithPast(
            loss=loss,
            logits=pooled,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _asks_for_tokens(self, kwargs: dict[str, Any]) -> bool:
        """Whether the call asks for values of all tokens, or of the batch's shape."""
        values = [kwargs.get(name, getattr(self.config, name, None)) for name in BATCH_SHAPED]
        routes = self.model.recordings or self.model.replayed_routes is not None
        return bool(routes) or any(value is not None and value is not False for value in values)

    def _packs(self, use_cache: bool | None, kwargs: dict[str, Any]) -> bool:
        """Whether a padded batch may be computed as packed documents: not if the caller passes or requests tensors of
        the batch's shape, and not if attention would build a mask over all tokens of the batch."""
        bounded = any(kwargs.get(name) is not None for name in BOUNDARIES)
        if use_cache or bounded or torch.compiler.is_compiling() or self._asks_for_tokens(kwargs):
            return False
        return (self.config._attn_implementation or "eager").startswith(("sdpa", "flash"))
