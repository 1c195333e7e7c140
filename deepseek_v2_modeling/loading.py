"""From a path that a user names to a model ready to answer, score or train, and back to a directory."""

import json
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import torch
from huggingface_hub.errors import StrictDataclassError
from peft import LoraConfig, PeftModel
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.conversion_mapping import get_model_conversion_mapping

from .adapters.chosen_experts import chosen_in_file
from .adapters.loading import WEIGHTS, is_adapter, load_adapter, read_adapter_config, saves_embeddings
from .adapters.lora import Number, apply_lora, check_targets, lora_config, train_in_float32
from .checkpoints.generation_files import check_generation
from .checkpoints.hub_names import is_hub_name
from .checkpoints.strict import match_sources
from .checkpoints.tensor_files import WEIGHT_FILES, base_headers, whole_directory
from .checkpoints.tokenizer_files import save_tokenizer
from .config_values import check_file_values, check_sizes
from .configuration import DeepseekV2Config, check_config
from .errors import ModelError
from .esft.choice import ExpertChoice
from .esft.full_weights import train_chosen_experts
from .modeling import DeepseekV2ForCausalLM, DeepseekV2ForSequenceClassification

Head = Literal["causal_lm", "score"]
HEADS: dict[str, tuple[type[PreTrainedModel], str]] = {
    "causal_lm": (DeepseekV2ForCausalLM, "CAUSAL_LM"),
    "score": (DeepseekV2ForSequenceClassification, "SEQ_CLS"),
}


@dataclass(frozen=True)
class ModelSource:
    """base: a model directory or hub name. adapter: a PEFT directory on top of it, or None."""

    base: str
    adapter: str | None = None

    @property
    def tokenizer_dir(self) -> str:
        if self.adapter and (Path(self.adapter) / "tokenizer_config.json").is_file():
            return self.adapter
        return self.base


@dataclass(frozen=True)
class LoraSettings:
    """What a recipe's `lora` section says."""

    targets: tuple[str, ...]
    r: int | Mapping[str, int] = 16
    alpha: Number | Mapping[str, Number] | None = None
    dropout: float = 0.0
    rslora: bool = False

    def config(self, task_type: str) -> LoraConfig:
        return lora_config(self.targets, self.r, self.alpha, self.rslora, task_type, self.dropout)


def resolve_source(path: str | os.PathLike[str]) -> ModelSource:
    """What a path stands for: a model directory, an adapter, a run directory (its final/), or a hub name.

    Raises:
        ModelError: the directory holds nothing usable; the message says what is missing.
    """
    directory = Path(path)
    if not directory.exists():
        if is_hub_name(path):
            return ModelSource(os.fspath(path))  # or a mistyped path: loading tells
        raise ModelError(f"{path}: there is no such directory; make a model with `dsv2 init {path} --preset tiny`")
    if (directory / "final").is_dir():
        directory = directory / "final"
    elif stages := sorted(final.parent.name for final in directory.glob("*/final")):
        raise ModelError(f"{path} is a chain's directory: name one of its stages, such as {directory / stages[0]}")
    elif (directory / "manifest.json").is_file():
        raise ModelError(f"{path}: this run has no final/ yet; finish it first, or name one of its checkpoints")
    if is_adapter(directory):
        base = read_adapter_config(directory).get("base_model_name_or_path")
        if not base:
            raise ModelError(f"{directory}/adapter_config.json: base_model_name_or_path is empty; name the base model")
        if not Path(base).is_dir() and not is_hub_name(base):
            raise ModelError(
                f"{directory}: its base model {base} is not there; put it back, or correct base_model_name_or_path in "
                "adapter_config.json"
            )
        if Path(base).is_dir() and is_adapter(base):
            raise ModelError(f"{directory}: its base {base} is an adapter itself; merge that one first")
        return ModelSource(base, str(directory))
    if not (directory / "config.json").is_file():
        raise ModelError(f"{directory}: no config.json and no adapter_config.json; this is no model directory")
    if not any((directory / name).is_file() for name in WEIGHT_FILES):
        raise ModelError(f"{directory}: no weights; {' or '.join(WEIGHT_FILES)} is missing (only safetensors is read)")
    return ModelSource(str(directory))


def load_tokenizer(source: ModelSource) -> PreTrainedTokenizerBase:
    """The adapter's own tokenizer where it has one, else the base's. Raises ModelError for one that cannot be used."""
    where = source.tokenizer_dir
    if Path(where, "config.json").is_file():
        read_settings(where)  # transformers reads it too, without bounds
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(where, trust_remote_code=False)
        tokenizer("words", truncation=True)  # some files fail only here
    except Exception as error:  # tokenizers raises bare Exceptions, transformers whatever a wrong value leads to
        if "trust_remote_code" in str(error):
            raise ModelError(
                f"{where}: auto_map names code for the tokenizer that comes with the model; such code "
                "is never run here. Save the tokenizer as a tokenizer.json, and take auto_map out of its config"
            ) from error
        raise ModelError(f"{where}: no tokenizer can be loaded ({reason(error)})") from error
    if tokenizer.eos_token_id is None:
        raise ModelError(f"{where}: the tokenizer has no eos_token, which ends every answer")
    tokenizer.padding_side = "left"  # generation; training pads on its own
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # padding is told by masks; it needs some id
    return tokenizer


def reason(error: Exception) -> str:
    """What a library says in an exception, in one line."""
    said = " ".join(str(error).split())
    plain = isinstance(error, OSError | ValueError | StrictDataclassError) and said
    return said if plain else f"{type(error).__name__}: {said}"


def read_settings(base: str) -> DeepseekV2Config:
    """The config of a model directory or hub name. Raises ModelError when there is none, or of another model."""
    file = f"{base}/config.json"
    try:
        values, _ = DeepseekV2Config.get_config_dict(base)
        check_file_values(values, DeepseekV2Config)
        quantised = any(values.get(key) is not None for key in ("quantization_config", "compression_config"))
    except ModelError as error:
        raise ModelError(f"{file}: {error}") from error
    except OSError as error:
        raise ModelError(f"{base}: {str(error).splitlines()[0]}") from error
    except Exception as error:  # of values of any type and depth
        raise ModelError(f"{file}: it cannot be read ({reason(error)})") from error
    if quantised:
        raise ModelError(f"{file}: quantization_config: the weights are quantised; name the original model")
    try:
        settings = DeepseekV2Config.from_pretrained(base)
    except ModelError as error:
        raise ModelError(f"{base}: {str(error).splitlines()[0]}") from error
    except Exception as error:  # the constructors of transformers trust their values
        raise ModelError(f"{file}: {reason(error)}") from error
    return settings


def load_base(
    base: str,
    head: Head = "causal_lm",
    dtype: str | torch.dtype = "float32",
    attn_implementation: str | None = None,
    config: Mapping[str, Any] | None = None,
) -> PreTrainedModel:
    """A checkpoint in hub layout, every tensor accounted for.

    config: settings to override, e.g. {"aux_loss_alpha": 0.003}; unknown ones are errors.
    """
    settings = apply_settings(read_settings(base), head, config)
    check_generation(base, settings.vocab_size)
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    return HEADS[head][0].from_pretrained(base, config=settings, dtype=dtype, attn_implementation=attn_implementation)


def apply_settings(settings: DeepseekV2Config, head: Head, config: Mapping[str, Any] | None) -> DeepseekV2Config:
    """The settings with the overrides of a recipe's `model.config` in them. Raises ModelError for wrong ones."""
    unknown = [key for key in config or {} if not hasattr(settings, key)]
    if unknown:
        raise ModelError(f'model.config: DeepSeek-V2 has no setting "{unknown[0]}"')
    changes = {**({"num_labels": 1} if head == "score" else {}), **(config or {})}
    try:
        check_sizes(changes)
        for key, value in changes.items():
            setattr(settings, key, value)
        check_config(settings)
    except (ModelError, StrictDataclassError) as error:
        raise ModelError(f"model.config: {' '.join(str(error).split())}") from error
    return settings


def check_lora_targets(settings: DeepseekV2Config, lora: LoraSettings, head: Head) -> None:
    """Raises ModelError for a LoRA target that matches nothing in a model of these settings, of which none is made."""
    check_targets(meta_model(settings, head), lora.config(HEADS[head][1]))


def meta_model(settings: DeepseekV2Config, head: Head) -> Any:
    """The model's structure without weights. Raises ModelError where the settings make none."""
    try:
        with torch.device("meta"):
            return HEADS[head][0](settings)
    except Exception as error:  # an unknown hidden_act, a pad_token_id beyond the words, ...
        raise ModelError(
            f"{settings.name_or_path}/config.json: no model can be made of it ({type(error).__name__}: {error})"
        ) from error


def check_weights(base: str, settings: DeepseekV2Config, head: Head) -> None:
    """Match the tensors of a model directory to the model, from the headers of its files alone, as loading does.

    Raises:
        ModelError: a file that is missing or cut short, or tensors that are missing, unexpected or misshapen.
    """
    model = meta_model(settings, head)
    found = {name: info for header in base_headers(Path(base)).values() for name, info in header.items()}
    mapping = get_model_conversion_mapping(model)
    match_sources(
        model,
        found,
        SimpleNamespace(weight_mapping=mapping, ignore_mismatched_sizes=False, pretrained_model_name_or_path=base),
    )


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, settings: DeepseekV2Config, where: str) -> None:
    """Raises ModelError for a tokenizer with ids that the embeddings have no row for."""
    largest = max(tokenizer.get_vocab().values(), default=-1)
    if largest >= settings.vocab_size:
        raise ModelError(
            f"{where}: the tokenizer has ids up to {largest:,}, and the model's embeddings have "
            f"{settings.vocab_size:,} rows (vocab_size in config.json); use the model's own tokenizer"
        )


def load_model(
    source: ModelSource,
    *,
    head: Head = "causal_lm",
    dtype: str = "float32",
    attn_implementation: str | None = None,
    config: Mapping[str, Any] | None = None,
) -> PreTrainedModel | PeftModel:
    """A frozen model in eval mode, adapter included: for answering, scoring, evaluating."""
    model: Any = load_base(source.base, head, dtype, attn_implementation, config)
    if source.adapter:
        model = load_adapter(model, source.adapter, trainable=False, task_type=HEADS[head][1])
    return model.requires_grad_(False).eval()


def same_adapter(config: Mapping[str, Any], wanted: LoraConfig) -> bool:
    """Whether a saved adapter config has the targets, ranks and scaling of the wanted one."""
    fields: Iterable[str] = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora")
    lists: Iterable[str] = ("target_modules", "target_parameters")
    return all((config.get(f) or 0) == (getattr(wanted, f) or 0) for f in fields) and all(
        set(config.get(f) or ()) == set(getattr(wanted, f) or ()) for f in lists
    )


def same_experts(adapter: str, base: str, wanted: ExpertChoice | None) -> bool:
    """Whether an adapter was trained on just the wanted routed experts; None wants all of them."""
    count = read_settings(base).n_routed_experts or 0
    trained = chosen_in_file(Path(adapter) / WEIGHTS, count)
    return trained == (dict(wanted.layers) if wanted else dict.fromkeys(trained, tuple(range(count))))


def merge_into(source: ModelSource, out_dir: Path, dtype: str) -> str:
    """Writes the base with the adapter merged to out_dir, unless it is there already. Returns out_dir.

    Raises:
        ModelError: out_dir is the base itself, or cannot be written.
    """
    from .adapters.merge import merge_lora  # which loads through this file

    if out_dir.resolve() == Path(source.base).resolve():
        raise ModelError(
            f"{source.adapter}: its base model is {out_dir}, where this run merges the two; choose another output_dir"
        )
    if not out_dir.exists():
        assert source.adapter is not None
        merge_lora(source.adapter, out_dir, dtype)
    return str(out_dir)


def prepare_trainable(
    source: ModelSource,
    *,
    lora: LoraSettings | None,
    merge_dir: Path,
    experts: ExpertChoice | None = None,
    head: Head = "causal_lm",
    dtype: str = "float32",
    attn_implementation: str | None = None,
    config: Mapping[str, Any] | None = None,
) -> PreTrainedModel | PeftModel:
    """A model ready for a trainer. Trainable weights are float32 whatever `dtype` (that of frozen weights) is.

    An adapter goes on with the same targets, ranks and experts; with others, or for full fine-tuning, it is merged
    into `merge_dir` first. experts: those that train (of the routed ones); without LoRA everything else is frozen.
    """
    task = HEADS[head][1]
    wanted = lora.config(task) if lora else None
    if source.adapter and not (
        wanted is not None
        and same_adapter(read_adapter_config(source.adapter), wanted)
        and same_experts(source.adapter, source.base, experts)
    ):
        source = ModelSource(merge_into(source, merge_dir, dtype))
    model: Any = load_base(source.base, head, dtype if lora or experts else "float32", attn_implementation, config)
    if wanted is None or lora is None:
        if experts is not None:
            train_chosen_experts(model, experts)
            train_in_float32(model)
        return model.train()
    if source.adapter:
        adapted = load_adapter(model, source.adapter, True, lora.dropout, task, experts)
    else:
        adapted = apply_lora(model, wanted, experts=experts)
    return adapted.train()


def save_directory(
    model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, out_dir: Path, dtype: str | None = None
) -> None:
    """Writes a model (hub layout) or an adapter (PEFT's layout), with its tokenizer, in one atomic step.

    Raises:
        ModelError: out_dir is there already and not empty, its disk is full, or it cannot be written.
    """
    with whole_directory(out_dir) as temporary:
        if isinstance(model, PeftModel):
            embeddings = saves_embeddings(model)
            model.save_pretrained(str(temporary), save_embedding_layers=embeddings, selected_adapters=["default"])
        else:
            state = None
            if dtype is not None:
                wanted = getattr(torch, dtype)
                state = {k: v.to(wanted) if v.is_floating_point() else v for k, v in model.state_dict().items()}
            model.save_pretrained(str(temporary), state_dict=state)
            if dtype is not None:
                path = temporary / "config.json"
                config = json.loads(path.read_text(encoding="utf-8"))
                path.write_text(json.dumps({**config, "dtype": dtype}, indent=2) + "\n", encoding="utf-8")
        save_tokenizer(tokenizer, temporary)


def save_final(
    model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, out_dir: Path, dtype: str | None = None
) -> None:
    """`save_directory` for a run's final/; the reference adapter of RL ("ref") is not part of it."""
    if out_dir.exists():
        shutil.rmtree(out_dir)
    save_directory(model, tokenizer, out_dir, dtype)
