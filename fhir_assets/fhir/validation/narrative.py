"""Narrative XHTML: formatting elements only, no active content (https://hl7.org/fhir/R4/narrative.html)."""

import re
from xml.parsers import expat

from fhir_assets.fhir.validation.issues import Severity

Problem = tuple[str, str, Severity]
"""The violated rule, a message and the severity."""

XHTML = "http://www.w3.org/1999/xhtml"

_ELEMENTS = (
    "a abbr acronym address area b bdo big blockquote br caption cite code col colgroup dd del dfn div dl dt em h1 h2 "
    "h3 h4 h5 h6 hr i img ins kbd li map ol p pre q samp small span strong sub sup table tbody td tfoot th thead tr tt "
    "u ul var"
)
ELEMENTS = frozenset(_ELEMENTS.split())
"""The allowed elements: chapters 7 to 11 (without 9.4) and 15 of HTML 4.0, ``a`` and ``img``."""

_ATTRIBUTES = (
    "abbr accesskey align alt axis bgcolor border cellpadding cellspacing char charoff charset cite class clear "
    "color colspan compact coords datetime dir frame headers height href hreflang hspace id ismap lang longdesc name "
    "nohref noshade nowrap rel rev rowspan rules scope shape size span src start style summary tabindex title type "
    "usemap valign value vspace width xml:lang xml:space xmlns"
)
ATTRIBUTES = frozenset(_ATTRIBUTES.split())

_LINKS = frozenset({"href", "src", "cite", "longdesc", "usemap"})
_HIDDEN = re.compile(r"[\x00-\x20]+")
_ACTIVE = re.compile(r"(?i)(javascript|vbscript|livescript|file):|data:(?!image/(png|gif|jpeg|bmp|webp)[;,])")
_ACTIVE_STYLE = re.compile(r"(?i)expression\(|javascript:|vbscript:|@import|-moz-binding|behavior:")


class _Reader:
    """Receives the parser's events for one div and keeps the first problem."""

    def __init__(self) -> None:
        self.depth = 0
        self.is_empty = True
        self.has_content = False
        self.problem: Problem | None = None

    def start(self, name: str, attributes: dict[str, str]) -> None:
        if self.depth:
            self.is_empty = False
        elif name != "div" or attributes.get("xmlns") != XHTML:
            self._refuse("primitive", f"expected one div in the namespace {XHTML}")
        self.depth += 1
        if name not in ELEMENTS:
            self._refuse("invariant:txt-1", "an element that narrative may not contain")
        if name == "img":
            self.has_content = True
        for attribute, value in attributes.items():
            if attribute not in ATTRIBUTES:
                self._refuse("invariant:txt-1", "an attribute that narrative may not contain")
            elif attribute in _LINKS and _ACTIVE.match(_HIDDEN.sub("", value)):
                self._refuse("invariant:txt-1", "a link to active content")
            elif attribute == "style" and _ACTIVE_STYLE.search(_HIDDEN.sub("", value)):
                self._refuse("invariant:txt-1", "a style with active content")

    def end(self, _name: str) -> None:
        self.depth -= 1

    def text(self, data: str) -> None:
        self.is_empty = False
        if not self.has_content and data.strip():
            self.has_content = True

    def refuse_declaration(self, *_: object) -> None:
        self._refuse("invariant:txt-1", "a declaration or processing instruction, which narrative may not contain")

    def _refuse(self, rule: str, message: str) -> None:
        if self.problem is None:
            self.problem = rule, message, "error"


def check_xhtml(text: str) -> Problem | None:
    """Return the first problem of a narrative div, None if it is valid.

    The rule is ``primitive`` if the text is not one well-formed div, ``invariant:txt-1`` for forbidden content and
    ``invariant:txt-2`` for a div without content. The latter is a warning if the div holds white space or empty
    elements, as in two examples of the specification.
    """
    reader = _Reader()
    parser = expat.ParserCreate("utf-8")
    parser.buffer_text = True
    parser.StartElementHandler = reader.start
    parser.EndElementHandler = reader.end
    parser.CharacterDataHandler = reader.text
    parser.StartDoctypeDeclHandler = reader.refuse_declaration
    parser.ProcessingInstructionHandler = reader.refuse_declaration
    parser.EntityDeclHandler = reader.refuse_declaration
    if "<!DOCTYPE" in text:  # before the parser expands an entity to gigabytes
        return "invariant:txt-1", "a document type declaration, which narrative may not contain", "error"
    try:
        parser.Parse(text.encode(), True)
    except (expat.ExpatError, UnicodeEncodeError):
        return reader.problem or (
            "primitive",
            "expected well-formed XHTML, without named entities of HTML",
            "error",
        )
    if reader.problem is None and not reader.has_content:
        return "invariant:txt-2", "narrative without any content", "error" if reader.is_empty else "warning"
    return reader.problem
