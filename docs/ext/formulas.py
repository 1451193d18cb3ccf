"""Formulas as MathML, which browsers draw by themselves: a hook of mkdocs, run on each page.

In the text a formula is LaTeX between `$` or `$$`, as GitHub reads it. pymdownx.arithmatex finds them.
"""

import html
import re

from latex2mathml.converter import convert
from mkdocs.exceptions import PluginError

SLASH, TIGHT = "<mo>&#x0002F;</mo>", '<mo lspace="0" rspace="0">&#x0002F;</mo>'
INLINE = re.compile(r'<span class="arithmatex">\\\((.*?)\\\)</span>', re.DOTALL)
BLOCK = re.compile(r'<div class="arithmatex">\\\[(.*?)\\\]</div>', re.DOTALL)


def on_page_content(page_html: str, **_: object) -> str:
    """The page with its formulas drawn. A formula that is none stops the build."""
    shown = INLINE.sub(lambda match: drawn(match.group(1), "inline"), page_html)
    return BLOCK.sub(lambda match: f'<div class="formula">{drawn(match.group(1), "block")}</div>', shown)


def drawn(latex: str, display: str) -> str:
    """LaTeX, escaped as HTML, as MathML."""
    try:
        return convert(html.unescape(latex).strip(), display=display).replace(SLASH, TIGHT)
    except Exception as error:
        raise PluginError(f"this is no formula: {latex.strip()} ({error!r})") from error
