"""From a path that a user names to what it stands for: a model, an adapter on its base, and the tokenizer of both.

Nothing but configs, tokenizers and headers is read here; each of them once.
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

from ..configuration import DeepseekV2Config, check_file_values
from ..errors import ModelError
from .adapter_config import CONFIG, WEIGHTS, read_adapter_config
from .tensor_files import WEIGHT_FILES, TensorInfo, read_header
from .tokenizer_files import TEMPLATE, TOKENIZER_CONFIG, plain_template, write_tokenizer_config

Head = Literal["causal_lm", "score"]
TASKS: dict[Head, str] = {"causal_lm": "CAUSAL_LM", "score": "SEQ_CLS"}  # PEFT's task_type
# Of a run directory; with MANIFEST and without FINAL the run has not finished.
FINAL, MANIFEST, REWARD_STATS = "final", "manifest.json", "reward_stats.json"
# Beside the weights: what `AutoTokenizer` and `generate` read, and a reward model's statistics.
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
    """An adapter in PEFT's layout, or in another, as its config and its header have it; no tensor is read.

    config: adapter_config.json. base: the model that it names. weights: the file of the tensors. header: {tensor: type
    and shape}, shapes: {tensor: shape} of it.
    """

    directory: Path
    config: Mapping[str, Any]
    base: str | None
    head: Head
    weights: Path
    header: Mapping[str, TensorInfo]
    shapes: Mapping[str, tuple[int, ...]]


def read_adapter(directory: str | Path) -> AdapterSource:
    """Raises ModelError when the config or the header of the weights cannot be used."""
    directory = Path(directory)
    config = read_adapter_config(directory)
    header = read_header(directory / WEIGHTS)
    return AdapterSource(
        directory,
        config,
        base=config.get("base_model_name_or_path"),
        head="score" if config.get("task_type") == TASKS["score"] else "causal_lm",
        weights=directory / WEIGHTS,
        header=header,
        shapes={name: info.shape for name, info in header.items()},
    )


@dataclass(frozen=True)
class ModelSource:
    """base: a model directory or hub name. adapter: the adapter on top of it, or None."""

    base: str
    adapter: AdapterSource | None = None

    @cached_property
    def settings(self) -> DeepseekV2Config:
        """The base's config; to be copied before it is changed. Raises ModelError as `read_settings`."""
        return read_settings(self.base)

    @property
    def tokenizer_dir(self) -> str:
        own = self.adapter is not None and (self.adapter.directory / TOKENIZER_CONFIG).is_file()
        return str(self.adapter.directory) if self.adapter and own else self.base

    @property
    def own_dir(self) -> Path:
        """Where the files of what was trained last are: the adapter's directory, or the model's."""
        return self.adapter.directory if self.adapter else Path(self.base)


def is_hub_name(path: str | os.PathLike[str]) -> bool:
    """Whether a string can be OWNER/NAME of the hub: nothing else is ever asked of it, with the user's token.

    A name without a slash, and what looks like a path on this machine (`./a`, `~/a`, `runs/final`, or a directory
    that is here by its first part), is not one.
    """
    text = os.fspath(path)
    if len(text) > _LONGEST_NAME or not _HUB_NAME.fullmatch(text) or "--" in text or ".." in text:
        return False
    owner, _, name = text.partition("/")
    return not _OURS.fullmatch(name) and not Path(owner).is_dir() and not text.endswith((".git", ".ipynb"))


def resolve_source(path: str | os.PathLike[str]) -> ModelSource:
    """What a path stands for: a model directory, an adapter, a run directory (its final/), or a hub name.

    Raises:
        ModelError: the directory holds nothing usable; the message says what is missing.
    """
    directory = Path(path)
    if not directory.exists():
        if is_hub_name(path):
            return ModelSource(os.fspath(path))  # or a mistyped path: loading tells
        raise ModelError(f"{path}: no such directory; make a model with `dsv2 init {path} --preset tiny`")
    if (directory / FINAL).is_dir():
        directory = directory / FINAL
    elif stages := sorted(final.parent.name for final in directory.glob(f"*/{FINAL}")):
        raise ModelError(f"{path} is a chain's directory: name one of its stages, such as {directory / stages[0]}")
    elif (directory / MANIFEST).is_file():
        raise ModelError(f"{path}: this run has no final/ yet; finish it first, or name one of its checkpoints")
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
    """The config of a model directory or hub name. Raises ModelError when there is none, or of another model."""
    file = f"{base}/config.json"
    try:
        values, _ = DeepseekV2Config.get_config_dict(base)
        check_file_values(values, DeepseekV2Config)
        quantised = values.get("quantization_config") or values.get("compression_config")
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


def read_model_config(base: str) -> DeepseekV2Config:
    """`read_settings` of an adapter's base. Raises ModelError when it is not there, or of another model."""
    if not Path(base).is_dir() and not is_hub_name(base):
        raise ModelError(f"{base}: this base model does not exist; put it back, or correct base_model_name_or_path")
    return read_settings(base)


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
                "is never run here. Save the tokenizer as a tokenizer.json, and remove auto_map from its config"
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


def base_directory(base: str) -> Path:
    """The directory of a model's files; a hub name is fetched."""
    if Path(base).is_dir():
        return Path(base)
    patterns = ["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt"]
    try:
        return Path(snapshot_download(base, allow_patterns=patterns))
    except (OSError, ValueError) as error:
        raise ModelError(f"{base}: it cannot be fetched from the hub ({str(error).splitlines()[0]})") from error


def copy_side_files(own: Path, base: Path | None, directory: Path) -> None:
    """Tokenizer and template of the adapter where it has its own, else the base's; reward statistics of the adapter
    only, whose head they belong to; the rest from where it is."""
    places = [own] if base is None else [own, base]
    with_tokenizer = [place for place in places if (place / TOKENIZER_CONFIG).is_file()][:1]
    own_places = {"generation_config.json": places, REWARD_STATS: [own]}
    for name in SIDE_FILES:
        having = [place for place in own_places.get(name, with_tokenizer) if (place / name).is_file()]
        if having:
            copy_plain(having[0] / name, directory / name)


def copy_plain(source: Path, target: Path) -> None:
    """A side file as it is, but for what another machine or another renderer could not use."""
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
    """A JSON object. Raises ModelError for anything else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path}: not readable JSON ({error})") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path}: not a JSON object")
    return value
