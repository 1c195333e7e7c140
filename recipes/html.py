"""Renders the HTML pages from the Jinja templates in templates/: values are escaped, unprintable characters replaced,
and an undefined name is an error."""

import re
from base64 import b64encode
from hashlib import sha256
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

# Characters that HTML or UTF-8 forbids, and bidirectional controls, which reorder the text around them.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]")


_TEMPLATES = Path(__file__).with_name("templates")
_POLICY = Markup("default-src 'none'; style-src 'unsafe-inline'")


def template_text(name: str) -> str:
    """A file of templates/ as it is."""
    return (_TEMPLATES / name).read_text(encoding="utf-8")


def policy_of(script: str) -> Markup:
    """The content security policy of a page: it fetches nothing and runs nothing, but for this script if there is one,
    which may ask where the page came from."""
    digest = b64encode(sha256(script.encode()).digest()).decode()
    allowed = Markup(f"; script-src 'sha256-{digest}'; connect-src 'self'")
    return _POLICY + allowed if script else _POLICY


def render_page(template: str, **values: Any) -> str:
    """Render the page from `template`, a file name such as "report.html.jinja"."""
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return _UNPRINTABLE.sub(
        "\ufffd", environment.get_template(template).render({"policy": _POLICY, "script": "", **values})
    )
