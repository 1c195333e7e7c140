"""HTML pages: jinja templates of the folder templates, escaped, an unknown name an error. One file, nothing fetched."""

import re
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from recipes.files import write_text

# Characters that HTML or UTF-8 forbids, and those that reorder the text around them.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]")


def write_html(path: Path, template: str, **values: Any) -> None:
    """Write the page of `template`, a file name such as "report.html.jinja", whole or not at all.

    Raises:
        OSError: it cannot be written.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).with_name("templates")),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    write_text(path, _UNPRINTABLE.sub("\ufffd", environment.get_template(template).render(**values)))
