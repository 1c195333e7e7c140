"""Fingerprints of what a run depends on besides its recipe and data; a run resumes only if they are unchanged."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from conversations.errors import ToolkitError
from conversations.reading.locating import locate
from conversations.run_files import REWARD_STATS
from conversations.sections import StageRecipe, TrainingRecipe
from deepseek_v2_modeling.adapters import CONFIG, WEIGHTS
from deepseek_v2_modeling.loading import ModelSource, read_settings
from recipes.files import file_sha256
from recipes.processes import world_size
from recipes.runs.foundation import expert_choice, source_of
from recipes.runs.models import MERGE_DIR
from recipes.runs.training_fields import setting

WHOLE = 64 << 20  # files up to this size are read completely, larger ones are sampled once per STRIDE
PIECE, STRIDE = 1 << 20, 16 << 20
ADAPTER = (WEIGHTS, CONFIG)
TOKENIZER = (
    "tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "special_tokens_map.json", "tokenizer_config.json",
)  # fmt: skip
# Keys that record where a file came from, not its content.
ORIGINS = ("_name_or_path", "base_model_name_or_path", "transformers_version", "peft_version", "chat_template")
EXTENT = ("processes", "global batch")
MERGED = "merged base model"


def fingerprints(recipe: StageRecipe, source: ModelSource) -> dict[str, dict[str, str]]:
    """{part: {path, sha256 of its content}} of everything a run starts from, except its data."""
    base, folder = source.base, Path(source.tokenizer_dir)
    paths_and_hashes = {"base model": (base, _model(base))}
    if source.adapter:
        paths_and_hashes["adapter"] = (str(source.own_dir), _files(source.own_dir, ADAPTER))
    paths_and_hashes["tokenizer"] = (str(folder), _files(folder, TOKENIZER))
    paths_and_hashes["chat template"] = (str(folder), _template(folder))
    if not isinstance(recipe, TrainingRecipe):
        paths_and_hashes["generation config"] = (base, _files(Path(base), ("generation_config.json",)))
    for use in recipe.other_models():
        if (other_source := source_of(use)) is not None:
            paths_and_hashes[f"{use.kind} {use.key.removesuffix('.model')}"] = (
                use.path,
                _other(other_source, use.stats),
            )
    if isinstance(recipe, TrainingRecipe) and (choice := expert_choice(recipe)) is not None:
        paths_and_hashes["experts file"] = (str(recipe.chosen_experts_file), _hash(sorted(choice.layers.items())))
    for part, path in recipe.files().items():
        paths_and_hashes[part] = (path, _hash([file_sha256(file) for file in locate(Path(path)).paths]))
    return {part: {"path": path, "sha256": content} for part, (path, content) in paths_and_hashes.items()}


def merged_base(run_dir: Path) -> dict[str, dict[str, str]]:
    """Fingerprint of the base model with the adapter merged for a run; empty if there is none (yet)."""
    folder = run_dir / MERGE_DIR
    return {MERGED: {"path": str(folder), "sha256": _model(str(folder))}} if folder.is_dir() else {}


def extent(recipe: TrainingRecipe) -> dict[str, int]:
    """The number of processes and the global batch size of an update."""
    batch = setting(recipe, "per_device_train_batch_size") * setting(recipe, "gradient_accumulation_steps")
    return dict(zip(EXTENT, (world_size(), batch * world_size()), strict=True))


def check_same_start(run_dir: Path, before: Mapping[str, Any], now: Mapping[str, Any], spread: bool = False) -> None:
    """Compare what a run began with to what it would resume with.

    spread: whether another number of processes may go on with it, if the global batch is the same.

    Raises:
        ToolkitError: a model, a tokenizer, a template, an experts file or (if `now` has it) the number of processes has
            changed.
    """
    processes, batch = EXTENT
    compared = batch if spread else processes
    if compared in now and (before.get(compared) or now[compared]) != now[compared]:
        raise ToolkitError(
            f"{run_dir} cannot be resumed: it began with {before[processes]} processes (global batch "
            f"{before.get(batch, 'unknown')}) and there are {now[processes]} now (global batch {now[batch]}); start it "
            f"with {before[processes]} again, or choose another output_dir"
        )
    old, new = before.get("files"), now["files"]
    if not old or not new:  # a process other than the main one, or a run of a version that did not record files
        return
    remade = {MERGED} - (old.keys() & new.keys())  # merging again gives the same result
    parts = [part for part in {**old, **new} if part not in remade]
    changed = [part for part in parts if _content_of(old, part) != _content_of(new, part)]
    if changed:
        path = {**old, **new}[changed[0]]["path"]
        also_changed = f", and so have: {', '.join(changed[1:])}" if changed[1:] else ""
        raise ToolkitError(
            f"{run_dir} cannot be resumed: the {changed[0]} ({path}) has changed since the run began{also_changed}; "
            "put the old one back, or choose another output_dir"
        )


def _content_of(files: Mapping[str, Any], part: str) -> str | None:
    return files.get(part, {}).get("sha256")


def _other(source: ModelSource, with_stats: bool) -> str:
    own = source.own_dir
    adapter = _files(own, ADAPTER) if source.adapter else None
    return _hash([_model(source.base), adapter, _files(own, [REWARD_STATS] * with_stats)])


def _model(base: str) -> str:
    """Hash of a model directory's weights and config; for a hub name, the commit."""
    folder = Path(base)
    if not folder.is_dir():
        return str(getattr(read_settings(base), "_commit_hash", None))
    return _files(folder, [*sorted(path.name for path in folder.glob("*.safetensors")), "config.json"])


def _template(folder: Path) -> str:
    files = [folder / "chat_template.jinja", folder / "tokenizer_config.json"]
    texts = [file.read_text(encoding="utf-8", errors="replace") if file.is_file() else "" for file in files]
    return _hash(texts[0] or (_object(files[1]).get("chat_template") if texts[1] else ""))


def _files(folder: Path, names: Iterable[str]) -> str:
    """A hash of those files that exist; in configs, keys that only record the origin are ignored."""
    return _hash([[name, _content(folder / name)] for name in names if (folder / name).is_file()])


def _content(path: Path) -> Any:
    if path.name.endswith("config.json"):
        return {key: value for key, value in _object(path).items() if key not in ORIGINS}
    size = path.stat().st_size
    if size <= WHOLE:
        return file_sha256(path)
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        for start in (*range(0, size, STRIDE), size - PIECE):
            file.seek(start)
            digest.update(file.read(PIECE))
    return digest.hexdigest()


def _object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ToolkitError(f"{path}: not readable JSON ({error})") from error
    return value if isinstance(value, dict) else {}


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
