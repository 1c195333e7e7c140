"""`dsv2 init`: writes a seeded random model with its tokenizer, in hub layout."""

from pathlib import Path

from conversations.errors import ToolkitError
from recipes.lock import hold_path


def make_model(directory: Path, preset: str, seed: int) -> None:
    """Write a random model of a preset, atomically.

    Raises:
        ToolkitError: the directory is not empty, or another process is writing to it.
        ModelError: the preset does not exist, or the disk is full.
    """
    if directory.is_file() or (directory.is_dir() and any(directory.iterdir())):
        raise ToolkitError(f"{directory} already exists and is not empty; choose another directory")
    from conversations.rendering.template import install_template
    from deepseek_v2_modeling import build_model, preset_config
    from deepseek_v2_modeling.loading import save_directory
    from deepseek_v2_modeling.training import quiet_libraries
    from recipes.runs.preset_tokenizer import build_tokenizer

    quiet_libraries()
    model_type = preset_config(preset).model_type
    tokenizer = build_tokenizer(preset, model_type)
    install_template(tokenizer, model_type)
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    model = build_model(preset, seed, **ids)
    assert len(tokenizer) <= model.config.vocab_size, (preset, len(tokenizer))
    with hold_path(directory):
        save_directory(model, tokenizer, directory)


def describe_model(directory: Path) -> str:
    """One line about a model directory: its size and structure."""
    from deepseek_v2_modeling.loading import load_base

    model = load_base(str(directory))
    config = model.config
    count = sum(parameter.numel() for parameter in model.parameters())
    experts = f"{config.n_routed_experts} routed and {config.n_shared_experts} shared experts"
    return (
        f"{directory}: {count:,} parameters, {config.num_hidden_layers} layers, "
        f"{experts if config.n_routed_experts else 'all dense'}, vocabulary {config.vocab_size}"
    )
