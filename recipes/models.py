"""From a recipe's model, lora and rewards sections to loaded models. Imports torch."""

import json
from pathlib import Path
from typing import Any

from conversations.errors import ToolkitError
from conversations.sections import LoraSection, ModelSection, TrainingRecipe
from conversations.template import install_template
from deepseek_v2_modeling.loading import (
    LoraSettings,
    ModelSource,
    load_model,
    load_tokenizer,
    prepare_trainable,
    resolve_source,
)
from deepseek_v2_modeling.lora import adapted_modules
from recipes.init import make_model
from recipes.ranks import is_main, say, wait_for_all


def ensure_model(path: str, preset: str | None, seed: int) -> None:
    """Make the preset's model at `path` when there is none, by the main process."""
    missing = preset is not None and not Path(path).exists()
    wait_for_all()
    if missing and preset is not None and is_main():
        say(f"{path} is not there: making it, preset {preset}, seed {seed}")
        make_model(Path(path), preset, seed)
    wait_for_all()


def open_source(section: ModelSection, seed: int) -> tuple[ModelSource, Any]:
    """The model's files, made from the preset where missing, and its tokenizer with our template."""
    ensure_model(section.path, section.preset, seed)
    source = resolve_source(section.path)
    tokenizer = load_tokenizer(source)
    install_template(tokenizer)
    return source, tokenizer


def lora_settings(section: LoraSection | None) -> LoraSettings | None:
    """The model floor's form of a `lora` section."""
    if section is None:
        return None
    return LoraSettings(tuple(section.targets), section.r, section.alpha, section.dropout, section.rslora)


def load_for_training(recipe: TrainingRecipe, source: ModelSource, run_dir: Path) -> Any:
    """The model as the stage trains it. A merge that it needs is written to <run_dir>/base, once."""
    section = recipe.model

    def load() -> Any:
        return prepare_trainable(
            source,
            lora=lora_settings(recipe.lora),
            merge_dir=run_dir / "base",
            head="score" if recipe.stage == "reward" else "causal_lm",  # pyright: ignore[reportAttributeAccessIssue]
            dtype=section.dtype,
            attn_implementation=section.attn_implementation,
            config=section.config,
        )

    return _main_first(load)


def load_frozen(section: ModelSection, source: ModelSource, head: Any) -> Any:
    """The model for evaluation or chat."""
    if head == "score":
        check_reward_model(section.path, source)
    return load_model(
        source,
        head=head,
        dtype=section.dtype,
        attn_implementation=section.attn_implementation,
        config=section.config,
    )


def check_reward_model(path: str, source: ModelSource) -> None:
    """Refuse a model without a trained score head: it would be given a random one.

    Raises:
        ToolkitError: the path is no reward model.
    """
    if source.adapter:
        kind = _read(Path(source.adapter) / "adapter_config.json").get("task_type")
        trained = kind == "SEQ_CLS"
    else:
        kinds = _read(Path(source.base) / "config.json").get("architectures") or ["ForSequenceClassification"]
        trained = any("SequenceClassification" in kind for kind in kinds)
    if not trained:
        raise ToolkitError(f"{path} is a chat model, not a reward model; train one with: dsv2 reward RECIPE")


def adapted_table(model: Any) -> list[dict[str, Any]]:
    """What LoRA adapts, for the manifest; for a model without adapters, how much of it is trained."""
    if hasattr(model, "peft_config"):
        return adapted_modules(model)
    parameters = list(model.parameters())
    return [
        {
            "projection": "all weights",
            "parameters": sum(p.numel() for p in parameters if p.requires_grad),
        }
    ]


def table_lines(rows: list[dict[str, Any]]) -> list[str]:
    """The table of adapted modules as text."""
    lines = []
    for row in rows:
        rank = f"{row['layers']} x rank {row['rank']}, alpha {row['alpha']:g}, " if "rank" in row else ""
        lines.append(f"  {row['projection']}: {rank}{row['parameters']:,} weights")
    return [f"trains {sum(row['parameters'] for row in rows):,} weights", *lines]


def _main_first(load: Any) -> Any:
    """The main process loads first: what it writes on the way, the others find."""
    if is_main():
        loaded = load()
        wait_for_all()
        return loaded
    wait_for_all()
    return load()


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
