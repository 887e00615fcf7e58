"""The templates of this package's pages."""

from __future__ import annotations

from typing import Any

from fintune import __version__


def fill(name: str, **context: Any) -> str:
    """Fill a template; in HTML all data are escaped, our own SVG and JSON blocks come in as they are.

    Args:
        name: A file of ``templates/``.
        context: What it names; a name that is missing is an error.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

    environment = Environment(
        loader=PackageLoader("fintune.report"),
        autoescape=select_autoescape(disabled_extensions=("md.j2",), default=True),
        undefined=StrictUndefined,
        trim_blocks=True,
    )
    return environment.get_template(name).render(version=__version__, **context)
