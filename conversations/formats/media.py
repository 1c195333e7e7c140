"""Images, audio and video in rows: the model reads text only, so these are refused by name."""

import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from conversations.formats.bad_row import BadRow

_NAME = re.compile(
    r"(?:^|_)(?:images?|imgs?|pictures?|photos?|audios?|videos?|pixel_values|input_audio)"
    r"(?:_(?:paths?|urls?|files?|file_?names?|list|bytes|base64|b64|data))?$"
)
# How the datasets library stores images and audio.
_STRUCTS = ({"bytes", "path"}, {"array", "sampling_rate"})
_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".wav", ".mp3", ".flac", ".ogg", ".mp4", ".avi", ".mov")


def refuse_media(values: Mapping[str, Any], label: str) -> None:
    """Raises BadRow for a key that holds an image, audio or video (empty values and numbers do not)."""
    for key, value in values.items():
        if value in (None, "", [], {}, [None]) or isinstance(value, (bool, int, float)):
            continue
        if _names_media(key) or _is_media(value):
            raise BadRow(
                f"{label} has {key}: images, audio and video cannot be trained on: the model reads text only"
                + f"; if it contains text, map it: columns: {{other: {key}}}" * (label == "the row")
            )


@lru_cache(maxsize=4096)
def _names_media(key: str) -> bool:
    return bool(_NAME.search(str(key).lower()))


def _is_media(value: Any) -> bool:
    if isinstance(value, list):
        return bool(value) and _is_media(value[0])
    if isinstance(value, dict):
        is_path = set(value) == {"path"} and str(value["path"]).lower().endswith(_SUFFIXES)
        return is_path or set(value) == {"bytes"} or any(keys <= value.keys() for keys in _STRUCTS)
    return isinstance(value, (bytes, bytearray))
