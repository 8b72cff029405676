"""The texts of the report and of the model card, which read as they stand here."""

import shlex
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from utils import code, escape, public


def fill(name: str, **values: Any) -> str:
    """The text of `templates/<name>`. What is put into it is shown as text, whoever wrote it.

    Escaped for HTML, or in `*.md.jinja` for one line of Markdown, unless it is marked `safe`.
    """

    def text(value: Any) -> Markup:
        return value if isinstance(value, Markup) else Markup(escape(value))

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        **{"finalize": text} if name.endswith(".md.jinja") else {},
    )
    environment.filters |= {
        "code": lambda text, language: Markup(code(language, str(text))),
        "public": lambda value: public(str(value)),
        "python": lambda value: Markup(repr(value)),
        "shell": lambda value: Markup(shlex.quote(value)),
    }
    return environment.get_template(name).render(values)
