"""Pages from Jinja templates: escaped, self-contained, without a network."""

from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from training.logging.format import duration_text, layer_name, token_text
from training.terminal import TEXT, printable

HERE = Path(__file__).parent  # the style, the charts and the report


def render_page(path: Path, **values: Any) -> str:
    """Return the page of the template at `path`, which may include the files of this folder."""
    return environment(path.parent).get_template(path.name).render(**values)


@cache
def environment(folder: Path) -> Environment:
    jinja = Environment(
        loader=FileSystemLoader([folder, HERE]),
        autoescape=True,
        finalize=lambda value: printable(value, TEXT) if type(value) is str else value,  # a bidi override moves text
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    jinja.filters |= {f.__name__: f for f in (duration_text, layer_name, token_text)}
    return jinja
