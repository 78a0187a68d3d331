"""HTML and SVG from function calls; text is escaped unless it is markup already.

>>> element("td", "a < b", class_="quiet")
'<td class="quiet">a &lt; b</td>'
"""

from __future__ import annotations

import html

_VOID = frozenset({"br", "link", "meta"})


class Html(str):
    """Text that is markup already."""

    __slots__ = ()


Child = str | int | None
Attribute = str | int | bool | None


def element(name: str, /, *children: Child, **attributes: Attribute) -> Html:
    """One element. An attribute's trailing underscore is dropped, the others become hyphens; None and False drop it."""
    told = "".join(_attribute(key, value) for key, value in attributes.items())
    if name in _VOID:
        return Html(f"<{name}{told}>")
    return Html(f"<{name}{told}>{join(*children)}</{name}>")


def join(*children: Child) -> Html:
    return Html("".join(text if isinstance(text, Html) else escape(str(text)) for text in children if text is not None))


def escape(text: str) -> str:
    return html.escape(text, quote=True)


def _attribute(key: str, value: Attribute) -> str:
    if value is None or value is False:
        return ""
    name = key.rstrip("_").replace("_", "-")
    return f" {name}" if value is True else f' {name}="{escape(str(value))}"'
