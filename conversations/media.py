"""Pictures, sounds and films in rows: the model reads text alone, so these are refused by name."""

from collections.abc import Mapping
from typing import Any

from conversations.badrow import BadRow

_KINDS = ("image", "audio", "video")
KEYS = frozenset(
    name for kind in _KINDS for base in (kind, f"{kind}s") for name in (base, f"{base}_path", f"{base}_url")
) | {"image_paths", "image_urls", "video_paths", "audio_paths", "pixel_values", "input_audio", "image_file"}
# How the library datasets stores a picture, and a sound.
_STRUCTS = ({"bytes", "path"}, {"array", "sampling_rate"})
_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".wav", ".mp3", ".flac", ".ogg", ".mp4", ".avi", ".mov")


def refuse_media(values: Mapping[str, Any], what: str) -> None:
    """Raises BadRow for a key that holds a picture, a sound or a film (what is empty holds none)."""
    for key, value in values.items():
        if value in (None, "", [], {}):
            continue
        if key in KEYS or _is_media(value):
            raise BadRow(f"{what} has {key}: images, audio and video cannot be trained, the model reads text alone")


def _is_media(value: Any) -> bool:
    if isinstance(value, list):
        return bool(value) and _is_media(value[0])
    if isinstance(value, dict):
        is_path = set(value) == {"path"} and str(value["path"]).lower().endswith(_SUFFIXES)
        return is_path or set(value) == {"bytes"} or any(keys <= value.keys() for keys in _STRUCTS)
    return isinstance(value, (bytes, bytearray))
