"""Rejects, with a ModelError, calls of `from_pretrained` for models that look loadable but would compute wrong results
or none: of another architecture, quantised or divided by transformers, or without weights that are read here."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..configuration import FP8_BLOCK, check_model_type, is_block_fp8
from ..errors import ModelError
from .tensor_files import WEIGHT_FILES, shards_named

# Fields of a BitsAndBytesConfig and the values that mean what is done here, by the quantization that it says.
_BITSANDBYTES: dict[str, dict[str, tuple[Any, ...]]] = {
    "nf4": {
        "bnb_4bit_quant_type": ("nf4",),
        "bnb_4bit_use_double_quant": (False, None),
        "bnb_4bit_quant_storage": ("uint8", None),
        "llm_int8_skip_modules": (None, ["lm_head"]),
        "llm_int8_enable_fp32_cpu_offload": (False, None),
    },
    "int8": {
        "llm_int8_skip_modules": (None, ["lm_head"]),
        "llm_int8_enable_fp32_cpu_offload": (False, None),
        "llm_int8_has_fp16_weight": (False, None),
    },
}
PARALLEL = ("distributed_config", "tp_plan", "tp_size", "device_mesh")


def _method(settings: Any) -> str:
    """The name of a quantization method, from a settings object or from the mapping in a config.json."""
    if isinstance(settings, Mapping):
        return str(settings.get("quant_method") or "quantised")
    method = getattr(settings, "quant_method", "quantised")
    return str(getattr(method, "value", method))


def check_quantization(where: Any, settings: Any) -> None:
    """Raise ModelError if there are quantization settings."""
    if settings:
        raise ModelError(
            f"{where}: quantization_config ({_method(settings)}) is not supported: transformers' quantisers pass over "
            "these classes' layers and experts. Load a checkpoint in bf16, float16 or float32, without it, or in fp8 "
            f"with blocks of {FP8_BLOCK} x {FP8_BLOCK}, as DeepSeek-V3's"
        )


def asked_quantization(path: Any, keywords: dict[str, Any], scheme: str | None) -> str | None:
    """The quantization that the keywords of `from_pretrained` ask for: its own, or bitsandbytes' settings, which are
    taken out of the keywords.

    Raises:
        ModelError: the settings say anything that is not done here, or both are given.
    """
    settings = keywords.get("quantization_config")
    if not settings or _method(settings) != "bitsandbytes":
        return scheme
    values = settings if isinstance(settings, Mapping) else settings.to_dict()
    found = "nf4" if values.get("load_in_4bit") else "int8"
    if scheme not in (None, found):
        raise ModelError(f'{path}: quantization is "{scheme}", and quantization_config says {found}: leave one out')
    dtype = str(keywords.get("dtype")).removeprefix("torch.")
    computed = {"bnb_4bit_compute_dtype": (dtype, "float32", None)} if found == "nf4" else {}
    for key, allowed in {**_BITSANDBYTES[found], **computed}.items():
        if (value := values.get(key)) not in allowed:
            raise ModelError(
                f"{path}: quantization_config: {key} is {value!r}: with {found} only {allowed[0]!r} is supported"
            )
    del keywords["quantization_config"]
    return found


def check_keywords(path: Any, keywords: Mapping[str, Any]) -> None:
    """Raise ModelError if the keywords of `from_pretrained` ask for another quantization or a parallel plan."""
    check_quantization(
        path, keywords.get("quantization_config") or keywords.get("load_in_8bit") or keywords.get("load_in_4bit")
    )
    for name in PARALLEL:
        if keywords.get(name) is not None:
            raise ModelError(
                f"{path}: {name} is not supported: these classes have no plan for tensor, expert or pipeline "
                'parallelism; device_map="auto" spreads the layers over several devices'
            )


def check_source(config_class: Any, path: Any, keywords: Mapping[str, Any]) -> None:
    """Check the config of a checkpoint before it is used, even if another config is passed (`config=`).

    Raises:
        ModelError: it belongs to another architecture, or is quantised.
    """
    check_quantization(path, getattr(keywords.get("config"), "quantization_config", None))
    if path is None or (
        Path(path).is_dir() and not (Path(path) / (keywords.get("subfolder") or "") / "config.json").is_file()
    ):
        return  # a state dict, or an adapter's directory
    hub = ("cache_dir", "local_files_only", "proxies", "revision", "subfolder", "token")
    try:
        values, _ = config_class.get_config_dict(path, **{name: keywords[name] for name in hub if name in keywords})
    except (OSError, ValueError):
        return  # `from_pretrained` raises its own error
    check_model_type(values, config_class.model_type, os.fspath(path))
    if not is_block_fp8(settings := values.get("quantization_config")):
        check_quantization(path, settings)


def check_directory(path: Any, subfolder: str) -> None:
    """Raise ModelError for a local directory without safetensors files (transformers would read other formats too), or
    with an unreadable index of shards."""
    if path is None or not Path(path).is_dir():
        return
    folder = Path(path) / subfolder
    if not any(folder.glob("*.safetensors*")):
        raise ModelError(f"{path}: no weights; {' or '.join(WEIGHT_FILES)} is missing (only safetensors is read)")
    single, index = (folder / name for name in WEIGHT_FILES)
    if index.is_file() and not single.is_file():
        shards_named(index)
