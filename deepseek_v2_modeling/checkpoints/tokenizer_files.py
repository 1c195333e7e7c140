"""Saves tokenizers with the files of their source, changing only the keys that have changed.

transformers 5 replaces the source's class name by its own, adds machine-specific keys and drops `add_bos_token`;
llama.cpp's converter and transformers 4 then reject the directory.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from transformers import PreTrainedTokenizerBase

TOKENIZER_CONFIG, TEMPLATE = "tokenizer_config.json", "chat_template.jinja"
# Copied unchanged, unless tokens were added.
VOCABULARY = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt")
SPECIAL_TOKENS = "special_tokens_map.json"
NAMES_OF_TOKENS = (SPECIAL_TOKENS, "added_tokens.json")
TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
# Keys that are specific to this machine, or refer to code that is not copied.
NOT_KEPT = ("auto_map", "backend", "is_local", "local_files_only", "name_or_path")
# A tag that only transformers' renderer knows; it marks the assistant's tokens.
_MARK = re.compile(r"(\{%[-+]?\s*)(end)?generation(\s*[-+]?%\})")


def plain_template(template: str) -> str:
    """The template without `{% generation %}`, which other renderers reject; it renders the same text."""
    return _MARK.sub(lambda mark: f"{mark[1]}{'endif' if mark[2] else 'if true'}{mark[3]}", template)


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
    """Write a tokenizer with its source's files, updated by changes to the template, special tokens and vocabulary.

    A tokenizer that was created in memory, or whose source no longer exists, is saved as by transformers, but with a
    class name that every version knows.
    """
    tokenizer.save_pretrained(str(directory))
    saved = json.loads((directory / TOKENIZER_CONFIG).read_text(encoding="utf-8"))
    source = _source_files(tokenizer)
    if TOKENIZER_CONFIG in source:
        original = json.loads(source[TOKENIZER_CONFIG].read_text(encoding="utf-8"))
        changed = _changed_tokens(tokenizer, original, saved)
        config = {**original, **changed}
    else:
        changed = {}
        config = dict(saved)
        if config.get("tokenizer_class") == "TokenizersBackend":
            config["tokenizer_class"] = "PreTrainedTokenizerFast"
    if (directory / TEMPLATE).is_file():
        text = plain_template((directory / TEMPLATE).read_text(encoding="utf-8"))
        (directory / TEMPLATE).write_text(text, encoding="utf-8")
        if "chat_template" in config:  # some readers use this key, others the file
            config["chat_template"] = text
    write_tokenizer_config(config, directory / TOKENIZER_CONFIG)
    if TOKENIZER_CONFIG in source and not _has_new_tokens(tokenizer, source):
        for name in (*VOCABULARY, *NAMES_OF_TOKENS):
            if name in source:
                (directory / name).write_bytes(source[name].read_bytes())
    if changed and (listed := directory / SPECIAL_TOKENS).is_file():  # which counts instead of tokenizer_config.json
        tokens = json.loads(listed.read_text(encoding="utf-8"))
        listed.write_text(json.dumps({**tokens, **changed}, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_tokenizer_config(config: Mapping[str, Any], path: Path) -> None:
    """Write tokenizer_config.json without machine-specific keys and references to code that is not copied."""
    portable = {key: value for key, value in config.items() if key not in NOT_KEPT}
    text = json.dumps(portable, indent=2, ensure_ascii=False) + "\n"
    path.write_text(
        text, encoding="utf-8", errors="backslashreplace"
    )  # lone surrogates are written as \\ud800, as in JSON


def _source_files(tokenizer: PreTrainedTokenizerBase) -> dict[str, Path]:
    """{name: file} of the directory, or of the cached hub model, that a tokenizer was loaded from."""
    source = str(tokenizer.name_or_path or "")
    names = (TOKENIZER_CONFIG, *VOCABULARY, *NAMES_OF_TOKENS)
    if not source:
        return {}
    if Path(source).is_dir():
        return {name: path for name in names if (path := Path(source, name)).is_file()}
    try:
        cached = {name: try_to_load_from_cache(source, name) for name in names}
    except ValueError:  # not a hub name: a directory that no longer exists
        return {}
    return {name: Path(path) for name, path in cached.items() if isinstance(path, str)}


def _text(token: Any) -> str | None:
    return token.get("content") if isinstance(token, dict) else token


def _changed_tokens(tokenizer: Any, original: Mapping[str, Any], saved: Mapping[str, Any]) -> dict[str, Any]:
    """The special tokens that differ from the source, in the form in which transformers writes them."""
    return {
        key: saved.get(key)
        for key in TOKENS
        if getattr(tokenizer, key, None) is not None and getattr(tokenizer, key) != _text(original.get(key))
    }


def _has_new_tokens(tokenizer: Any, source: Mapping[str, Path]) -> bool:
    """Whether tokens were added after loading, so that the source's tokenizer.json is out of date."""
    if "tokenizer.json" not in source:
        return False
    content = json.loads(source["tokenizer.json"].read_text(encoding="utf-8"))
    added = {token["content"] for token in content.get("added_tokens", ())}
    vocabulary = content.get("model", {}).get("vocab", {})
    return any(token not in added and token not in vocabulary for token in tokenizer.get_added_vocab())
