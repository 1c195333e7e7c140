"""Resolves a path given by a user to a model, or an adapter on its base, and the tokenizer of both.

Only configs, tokenizers and headers are read here, each of them once.
"""

import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import snapshot_download
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ..configuration import CORRECTION_BIAS, DeepseekV2Config, check_file_values, check_model_type, is_block_fp8
from ..errors import ModelError
from ..family import CONFIGS, config_class
from .adapter_config import CONFIG, WEIGHTS, read_adapter_config
from .tensor_files import WEIGHT_FILES, TensorInfo, read_header
from .tokenizer_files import TEMPLATE, TOKENIZER_CONFIG, plain_template, write_tokenizer_config

Head = Literal["causal_lm", "score"]
TASKS: dict[Head, str] = {"causal_lm": "CAUSAL_LM", "score": "SEQ_CLS"}  # PEFT's task_type
# Names in a run directory; one with MANIFEST but without FINAL belongs to a run that has not finished.
FINAL, MANIFEST, REWARD_STATS = "final", "manifest.json", "reward_stats.json"
MODEL_CARD = "README.md"
SHARDS = "shards"  # in a checkpoint that several processes wrote in parts
# Files other than weights: those that `AutoTokenizer` and `generate` read, and a reward model's statistics.
SIDE_FILES = (
    "tokenizer.json", "tokenizer.model", TOKENIZER_CONFIG, "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", TEMPLATE, "chat_template.json", "generation_config.json",
    REWARD_STATS,
)  # fmt: skip
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9_][\w.-]*", re.ASCII)
_OURS = re.compile(r"final|base|checkpoint-\d+|epoch[-_]\d+|step[-_]\d+")  # directories of runs, ours and others'
_LONGEST_NAME = 96  # the hub's own limit


@dataclass(frozen=True)
class AdapterSource:
    """An adapter in any layout, described by its config and header; no tensor is read.

    config: adapter_config.json. base: the base model that it names. weights: the file of the tensors.
    header: {tensor: dtype and shape}.
    """

    directory: Path
    config: Mapping[str, Any]
    base: str | None
    head: Head
    weights: Path
    header: Mapping[str, TensorInfo]

    @cached_property
    def has_biases(self) -> bool:
        """Whether it has biases of routers."""
        return any(name.endswith(CORRECTION_BIAS) for name in self.header)


def read_adapter(directory: str | Path) -> AdapterSource:
    """Read an adapter's config and header. Raises ModelError if one of them cannot be used."""
    directory = Path(directory)
    config = read_adapter_config(directory)
    return AdapterSource(
        directory,
        config,
        base=config.get("base_model_name_or_path"),
        head="score" if config.get("task_type") == TASKS["score"] else "causal_lm",
        weights=directory / WEIGHTS,
        header=read_header(directory / WEIGHTS),
    )


@dataclass(frozen=True)
class ModelSource:
    """A model to load. base: a model directory or hub name. adapter: the adapter on it, or None."""

    base: str
    adapter: AdapterSource | None = None

    @cached_property
    def settings(self) -> DeepseekV2Config:
        """The base's config; copy it before changing it. Raises ModelError like `read_settings`."""
        return read_settings(self.base)

    @property
    def tokenizer_dir(self) -> str:
        has_own = self.adapter is not None and (self.adapter.directory / TOKENIZER_CONFIG).is_file()
        return str(self.adapter.directory) if self.adapter and has_own else self.base

    @property
    def own_dir(self) -> Path:
        """The directory of the last training's result: the adapter's if there is one, otherwise the model's."""
        return self.adapter.directory if self.adapter else Path(self.base)


def is_hub_name(path: str | os.PathLike[str]) -> bool:
    """Whether a string can be a hub name OWNER/NAME; nothing else is ever requested from the hub, since requests carry
    the user's token.

    Names without a slash, and strings that look like local paths (`./a`, `~/a`, `runs/final`, or a first part that is
    an existing directory), are not hub names.
    """
    text = os.fspath(path)
    if len(text) > _LONGEST_NAME or not _HUB_NAME.fullmatch(text) or "--" in text or ".." in text:
        return False
    owner, _, name = text.partition("/")
    return not _OURS.fullmatch(name) and not Path(owner).is_dir() and not text.endswith((".git", ".ipynb"))


def resolve_source(path: str | os.PathLike[str]) -> ModelSource:
    """Resolve a path: a model directory, an adapter, a run directory (its final/), or a hub name.

    Raises:
        ModelError: the path does not exist or contains no model; the message says what is missing.
    """
    directory = Path(path)
    if not directory.exists():
        if is_hub_name(path):
            return ModelSource(os.fspath(path))  # or a mistyped path, which loading reports
        raise ModelError(f"{path}: no such directory; make a model with `dsv2 init {path} --preset tiny`")
    if (directory / FINAL).is_dir():
        directory = directory / FINAL
    elif stages := sorted(final.parent.name for final in directory.glob(f"*/{FINAL}")):
        raise ModelError(f"{path} is a chain's directory: name one of its stages, such as {directory / stages[0]}")
    elif (directory / MANIFEST).is_file():
        raise ModelError(f"{path}: this run has no final/ yet; finish it first, or name one of its checkpoints")
    if (directory / SHARDS).is_dir():
        raise ModelError(
            f"{directory}: a checkpoint in parts, from which only its run can resume; make a model of it: "
            f"dsv2 merge {directory} OUT_DIR"
        )
    if (directory / CONFIG).is_file():
        adapter = read_adapter(directory)
        base = adapter.base
        if not base:
            raise ModelError(f"{directory}/adapter_config.json: base_model_name_or_path is empty; name the base model")
        if not Path(base).is_dir() and not is_hub_name(base):
            raise ModelError(
                f"{directory}: its base model {base} does not exist; put it back, or correct base_model_name_or_path "
                "in adapter_config.json"
            )
        if (Path(base) / CONFIG).is_file():
            raise ModelError(f"{directory}: its base {base} is an adapter itself; merge that one first")
        return ModelSource(base, adapter)
    if not (directory / "config.json").is_file():
        raise ModelError(f"{directory}: no config.json and no adapter_config.json; this is not a model directory")
    if not any((directory / name).is_file() for name in WEIGHT_FILES):
        raise ModelError(f"{directory}: no weights; {' or '.join(WEIGHT_FILES)} is missing (only safetensors is read)")
    return ModelSource(str(directory))


def read_settings(base: str) -> DeepseekV2Config:
    """The config of a model directory or hub name. Raises ModelError if there is none or it cannot be used."""
    file = f"{base}/config.json"
    try:
        values, _ = DeepseekV2Config.get_config_dict(base)
        cls = config_class(values.get("model_type") if isinstance(values, dict) else None)
        check_file_values(values, cls)
        quantised = values.get("quantization_config") or values.get("compression_config")
    except ModelError as error:
        raise ModelError(f"{file}: {error}") from error
    except OSError as error:
        raise ModelError(f"{base}: {_why_not_read(base, error)}") from error
    except Exception as error:  # values can have any type and depth
        raise ModelError(f"{file}: it cannot be read ({reason(error)})") from error
    check_model_type(values, cls.model_type, base, CONFIGS)  # transformers would read a part of a larger model's config
    if quantised and not is_block_fp8(quantised):
        raise ModelError(f"{file}: quantization_config: the weights are quantised; name the original model")
    try:
        settings = cls.from_pretrained(base)
    except ModelError as error:
        raise ModelError(f"{base}: {str(error).splitlines()[0]}") from error
    except Exception as error:  # transformers' constructors do not check their values
        raise ModelError(f"{file}: {reason(error)}") from error
    return settings


def read_model_config(base: str) -> DeepseekV2Config:
    """`read_settings` of an adapter's base. Raises ModelError if the base does not exist or cannot be used."""
    if not Path(base).is_dir() and not is_hub_name(base):
        raise ModelError(f"{base}: this base model does not exist; put it back, or correct base_model_name_or_path")
    return read_settings(base)


def load_tokenizer(source: ModelSource) -> PreTrainedTokenizerBase:
    """The adapter's own tokenizer if it has one, otherwise the base's. Raises ModelError if it cannot be used."""
    directory = source.tokenizer_dir
    if Path(directory, "config.json").is_file():
        read_settings(directory)  # transformers reads the config too, but without checks
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
        tokenizer("words", truncation=True)  # some files fail only here
    except Exception as error:  # tokenizers raises plain Exceptions, transformers whatever a wrong value leads to
        if "trust_remote_code" in str(error):
            raise ModelError(
                f"{directory}: auto_map names code for the tokenizer that comes with the model; such code "
                "is never run here. Save the tokenizer as a tokenizer.json, and remove auto_map from its config"
            ) from error
        if isinstance(error, OSError) and not Path(directory).exists():
            raise ModelError(f"{directory}: {_why_not_read(directory, error)}") from error
        raise ModelError(f"{directory}: no tokenizer can be loaded ({reason(error)})") from error
    if tokenizer.eos_token_id is None:
        raise ModelError(f"{directory}: the tokenizer has no eos_token, which ends every answer")
    tokenizer.padding_side = "left"  # for generation; training does its own padding
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # any id will do, since masks mark padding
    return tokenizer


def _why_not_read(base: str, error: OSError) -> str:
    cause = str(error).splitlines()[0].rstrip(".")
    return cause if Path(base).exists() else f"no such directory, and no model of this name on the hub ({cause})"


def reason(error: Exception) -> str:
    """The message of a library's exception, in one line, with its type unless that adds nothing."""
    message = " ".join(str(error).split())
    is_clear = isinstance(error, OSError | ValueError | StrictDataclassError) and message
    return message if is_clear else f"{type(error).__name__}: {message}"


def base_directory(base: str) -> Path:
    """The directory of a model's files; a hub model is downloaded. Raises ModelError if that fails."""
    if Path(base).is_dir():
        return Path(base)
    patterns = ["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt"]
    try:
        return Path(snapshot_download(base, allow_patterns=patterns))
    except (OSError, ValueError) as error:
        raise ModelError(f"{base}: it cannot be fetched from the hub ({str(error).splitlines()[0]})") from error


def copy_side_files(own: Path, base: Path | None, directory: Path) -> None:
    """Copy the files other than weights: tokenizer and template from the adapter if it has its own, otherwise from the
    base; reward statistics only from the adapter, because they belong to its head; generation_config.json from the
    first that has one."""
    directories = [own] if base is None else [own, base]
    with_tokenizer = [place for place in directories if (place / TOKENIZER_CONFIG).is_file()][:1]
    exceptions = {"generation_config.json": directories, REWARD_STATS: [own]}
    for name in SIDE_FILES:
        holders = [place for place in exceptions.get(name, with_tokenizer) if (place / name).is_file()]
        if holders:
            copy_plain(holders[0] / name, directory / name)


def copy_plain(source: Path, target: Path) -> None:
    """Copy such a file, without keys and template tags that other machines or renderers cannot use."""
    if source.name == TEMPLATE:
        try:
            text = source.read_text(encoding="utf-8")
        except ValueError as error:
            raise ModelError(f"{source}: not UTF-8 ({error})") from error
        target.write_text(plain_template(text), encoding="utf-8")
    elif source.name == TOKENIZER_CONFIG:
        config = read_object(source)
        if isinstance(template := config.get("chat_template"), str):
            config["chat_template"] = plain_template(template)
        write_tokenizer_config(config, target)
    else:
        shutil.copyfile(source, target)


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises ModelError if there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path}: not readable JSON ({error})") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path}: not a JSON object")
    return value
