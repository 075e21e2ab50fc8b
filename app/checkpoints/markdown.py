"""Render Markdown from templates. The filter `cell` escapes text of clients."""

import json
from pathlib import Path

from jinja2 import Environment, StrictUndefined

from emender.schemas.text import escape_markdown


def render_markdown(template: Path, **context: object) -> str:
    environment = Environment(
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    environment.filters.update(cell=escape_markdown, json=json.dumps)
    return environment.from_string(template.read_text(encoding="utf-8")).render(context)
