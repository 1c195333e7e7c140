"""Renders the HTML pages from the Jinja templates in templates/: values are escaped, unprintable characters replaced,
and an undefined name is an error."""

import re
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

# Characters that HTML or UTF-8 forbids, and bidirectional controls, which reorder the text around them.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]")


def render_page(template: str, **values: Any) -> str:
    """Render the page from `template`, a file name such as "report.html.jinja"."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).with_name("templates")),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return _UNPRINTABLE.sub("\ufffd", environment.get_template(template).render(**values))
