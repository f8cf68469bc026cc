"""The syntax tree of FHIRPath and its parser (http://hl7.org/fhirpath/N1, grammar in appendix A).

The parser is a hand-written operator-precedence parser. It starts in microseconds and reports the position of an
error in the expression.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal
from functools import lru_cache

from fhir_assets.errors import FhirPathError


@dataclass(frozen=True, slots=True)
class Syntax:
    """A node of the syntax tree; ``at`` is its offset in the expression."""

    at: int


@dataclass(frozen=True, slots=True)
class Literal(Syntax):
    """A literal with its FHIR type, and a ``unit`` if it is a quantity. The type of ``{}`` is ``empty``."""

    type: str
    value: str | bool | int | Decimal | None
    unit: str | None = None


@dataclass(frozen=True, slots=True)
class Member(Syntax):
    """``base.name``, or ``name`` on the focus."""

    base: Syntax | None
    name: str


@dataclass(frozen=True, slots=True)
class Call(Syntax):
    """``base.name(arguments)``, or ``name(arguments)`` on the focus."""

    base: Syntax | None
    name: str
    arguments: tuple[Syntax, ...]


@dataclass(frozen=True, slots=True)
class Special(Syntax):
    """One of ``$this``, ``$index`` and ``$total``."""

    name: str


@dataclass(frozen=True, slots=True)
class Constant(Syntax):
    """``%name``."""

    name: str


@dataclass(frozen=True, slots=True)
class Index(Syntax):
    """``base[index]``."""

    base: Syntax
    index: Syntax


@dataclass(frozen=True, slots=True)
class Operation(Syntax):
    """``left operator right``."""

    operator: str
    left: Syntax
    right: Syntax


@dataclass(frozen=True, slots=True)
class Sign(Syntax):
    """``+operand``, ``-operand``."""

    operator: str
    operand: Syntax


@dataclass(frozen=True, slots=True)
class TypeTest(Syntax):
    """``operand is type``, ``operand as type``."""

    operator: str
    operand: Syntax
    type: str


_TOKEN = re.compile(
    r"""
      (?P<space>\s+ | //[^\n]* | /\*.*?\*/)
    | (?P<datetime>@\d{4}(?:-\d\d(?:-\d\d)?)?T(?:\d\d(?::\d\d(?::\d\d(?:\.\d+)?)?)?)?(?:Z|[+-]\d\d:\d\d)?)
    | (?P<date>@\d{4}(?:-\d\d(?:-\d\d)?)?)
    | (?P<time>@T\d\d(?::\d\d(?::\d\d(?:\.\d+)?)?)?)
    | (?P<number>\d+(?:\.\d+)?)
    | (?P<string>'(?:[^'\\]|\\.)*')
    | (?P<delimited>`(?:[^`\\]|\\.)*`)
    | (?P<special>\$(?:this|index|total)\b)
    | (?P<constant>%(?:[A-Za-z_][A-Za-z0-9_-]*|'(?:[^'\\]|\\.)*'|`(?:[^`\\]|\\.)*`))
    | (?P<word>[A-Za-z_][A-Za-z0-9_]*)
    | (?P<symbol><=|>=|!=|!~|[-+*/&|<>=~.,()\[\]{}])
    """,
    re.VERBOSE | re.DOTALL,
)
_ESCAPE = re.compile(r"\\(u[0-9A-Fa-f]{4}|[`\"'\\/fnrt])")
_ESCAPED = {"f": "\f", "n": "\n", "r": "\r", "t": "\t"}
_UNITS = {
    unit + plural
    for unit in ("year", "month", "week", "day", "hour", "minute", "second", "millisecond")
    for plural in ("", "s")
}
_PRECEDENCE = {
    operator: level
    for level, operators in enumerate(
        (
            ("implies",),
            ("or", "xor"),
            ("and",),
            ("in", "contains"),
            ("=", "~", "!=", "!~"),
            ("<=", "<", ">", ">="),
            ("|",),
            ("is", "as"),
            ("+", "-", "&"),
            ("*", "/", "div", "mod"),
        ),
        start=1,
    )
    for operator in operators
}
_SIGN_PRECEDENCE = 11


@dataclass(frozen=True, slots=True)
class _Token:
    kind: str
    text: str
    at: int


def _unescape(text: str) -> str:
    """Replace the escapes of a text. Raises FhirPathError if the result is no text that Postgres can store."""

    def replace(match: re.Match[str]) -> str:
        escape = match[1]
        return chr(int(escape[1:], 16)) if len(escape) > 1 else _ESCAPED.get(escape, escape)

    unescaped = _ESCAPE.sub(replace, text)
    try:
        unescaped = unescaped.encode("utf-16", "surrogatepass").decode("utf-16")
    except UnicodeDecodeError:
        raise FhirPathError("a text has half of a surrogate pair, which is no character") from None
    if "\0" in unescaped:
        raise FhirPathError("a text has the character NUL (U+0000), which no text in Postgres can contain")
    return unescaped


def _tokens(text: str) -> Iterator[_Token]:
    at = 0
    while at < len(text):
        match = _TOKEN.match(text, at)
        if match is None:
            raise FhirPathError(f'cannot read the expression "{text}" at character {at + 1}: "{text[at : at + 10]}"')
        if match.lastgroup and match.lastgroup != "space":
            yield _Token(match.lastgroup, match[0], at)
        at = match.end()
    yield _Token("end", "", at)


class _Parser:
    def __init__(self, text: str) -> None:
        self.text = text
        self.tokens = list(_tokens(text))
        self.position = 0

    @property
    def token(self) -> _Token:
        return self.tokens[self.position]

    def fail(self, expected: str) -> FhirPathError:
        actual = f'"{self.token.text}"' if self.token.text else "the end"
        return FhirPathError(
            f'cannot read the expression "{self.text}" at character {self.token.at + 1}: '
            f"expected {expected}, found {actual}"
        )

    def accept(self, *symbols: str) -> _Token | None:
        token = self.token
        if token.kind in ("symbol", "word") and token.text in symbols:
            self.position += 1
            return token
        return None

    def expect(self, symbol: str) -> None:
        if not self.accept(symbol):
            raise self.fail(f'"{symbol}"')

    def next(self) -> _Token:
        token = self.token
        self.position += 1
        return token

    def parse(self) -> Syntax:
        tree = self.parse_expression(0)
        if self.token.kind != "end":
            raise self.fail("an operator or the end")
        return tree

    def parse_expression(self, floor: int) -> Syntax:
        if sign := self.accept("+", "-"):
            left: Syntax = Sign(sign.at, sign.text, self.parse_expression(_SIGN_PRECEDENCE))
        else:
            left = self.parse_invocations(self.parse_term())
        while self.token.kind in ("symbol", "word"):
            operator = self.token.text
            level = _PRECEDENCE.get(operator, 0)
            if level <= floor:
                break
            at = self.next().at
            if operator in ("is", "as"):
                left = TypeTest(at, operator, left, self.parse_type_name())
            else:
                left = Operation(at, operator, left, self.parse_expression(level))
        return left

    def parse_type_name(self) -> str:
        name = self.parse_identifier()
        while self.accept("."):
            name += f".{self.parse_identifier()}"
        return name

    def parse_identifier(self) -> str:
        token = self.token
        if token.kind == "word":
            self.position += 1
            return token.text
        if token.kind == "delimited":
            self.position += 1
            return _unescape(token.text[1:-1])
        raise self.fail("a name")

    def parse_invocations(self, base: Syntax) -> Syntax:
        while True:
            if self.accept("."):
                if self.token.kind == "special":
                    token = self.next()
                    base = Special(token.at, token.text)
                else:
                    base = self.parse_invocation(base)
            elif at := self.accept("["):
                base = Index(at.at, base, self.parse_expression(0))
                self.expect("]")
            else:
                return base

    def parse_invocation(self, base: Syntax | None) -> Syntax:
        at = self.token.at
        name = self.parse_identifier()
        if not self.accept("("):
            return Member(at, base, name)
        arguments: list[Syntax] = []
        if not self.accept(")"):
            arguments.append(self.parse_expression(0))
            while self.accept(","):
                arguments.append(self.parse_expression(0))
            self.expect(")")
        return Call(at, base, name, tuple(arguments))

    def parse_term(self) -> Syntax:
        token = self.token
        at = token.at
        if token.kind in ("word", "delimited") and token.text not in ("true", "false"):
            return self.parse_invocation(None)
        if self.accept("("):
            inner = self.parse_expression(0)
            self.expect(")")
            return inner
        if self.accept("{"):
            self.expect("}")
            return Literal(at, "empty", None)
        self.position += 1
        match token.kind:
            case "word":
                return Literal(at, "boolean", token.text == "true")
            case "string":
                return Literal(at, "string", _unescape(token.text[1:-1]))
            case "date" | "time" | "datetime":
                return self.parse_date_or_time(token)
            case "number":
                return self.parse_number(token)
            case "special":
                return Special(at, token.text)
            case "constant":
                name = token.text[1:]
                return Constant(at, _unescape(name[1:-1]) if name[0] in "'`" else name)
        self.position -= 1
        raise self.fail("a term")

    def parse_date_or_time(self, token: _Token) -> Literal:
        type_ = {"date": "date", "time": "time", "datetime": "dateTime"}[token.kind]
        return Literal(token.at, type_, token.text.lstrip("@").removeprefix("T").removesuffix("T"))

    def parse_number(self, token: _Token) -> Literal:
        value = Decimal(token.text) if "." in token.text else int(token.text)
        if self.token.kind == "string":
            return Literal(token.at, "Quantity", value, _unescape(self.next().text[1:-1]))
        if self.token.kind == "word" and self.token.text in _UNITS:
            return Literal(token.at, "Quantity", value, self.next().text.removesuffix("s"))
        return Literal(token.at, "decimal" if "." in token.text else "integer", value)


@lru_cache(maxsize=4096)
def parse(expression: str) -> Syntax:
    """Parse an expression. Raises FhirPathError with the position of the error and the expected token.

    The result is cached: the views of the types share most of their paths.
    """
    return _Parser(expression).parse()


def find_specials(tree: Syntax) -> Iterator[str]:
    """Yield each ``$this``, ``$index`` and ``$total`` in a tree."""
    if isinstance(tree, Special):
        yield tree.name
    for name in tree.__slots__:
        inner = getattr(tree, name)
        for child in inner if isinstance(inner, tuple) else (inner,):
            if isinstance(child, Syntax):
                yield from find_specials(child)
