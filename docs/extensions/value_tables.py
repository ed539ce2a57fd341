"""Tables of typed values, made from their declarations.

`config-reference` shows every value of the config; `fields` those of one class, by its full name.
"""

import importlib
import typing
from typing import Any

from docutils import nodes
from docutils.statemachine import StringList
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from hpc_xvr.config import Config


class ConfigReference(SphinxDirective):
    """One heading and one table for each section of the config."""

    def run(self) -> list[nodes.Node]:
        lines: list[str] = []
        for name, field in Config.model_fields.items():
            section = model_of(field.annotation)
            assert section is not None, f"{name} is not a section"
            lines += section_lines(name, section)
        return parsed(self, lines)


class Fields(SphinxDirective):
    """The table of one class."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        module, _, name = self.arguments[0].rpartition(".")
        return parsed(self, table(getattr(importlib.import_module(module), name)))


def parsed(directive: SphinxDirective, lines: list[str]) -> list[nodes.Node]:
    """What Markdown lines become in the page."""
    parent = nodes.section()
    parent.document = directive.state.document
    directive.state.nested_parse(StringList(lines, "fields"), 0, parent, match_titles=True)
    return parent.children


def section_lines(name: str, section: type[BaseModel]) -> list[str]:
    """Markdown of one section, and of the sections it nests by name (`simulate.cameras.NAME`)."""
    about = (section.__doc__ or "").strip()
    lines = [f"## `{name}`", "", *([about, ""] if about else []), *table(section)]
    for key, field in section.model_fields.items():
        nested = model_of(field.annotation)
        if nested is not None:
            lines += section_lines(f"{name}.{key}.NAME", nested)
    return lines


def table(section: type[BaseModel]) -> list[str]:
    """A line for each value."""
    rows = [row(key, field) for key, field in section.model_fields.items()]
    return ["| key | values | default | meaning |", "|---|---|---|---|", *rows, ""]


def row(key: str, field: FieldInfo) -> str:
    """One value: its name, type and range, default and docstring."""
    meaning = " ".join((field.description or "").split())
    cells = [f"`{key}`", values(field), default(field), meaning]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def values(field: FieldInfo) -> str:
    """Type and range in words."""
    limits = [limit for rule in field.metadata if (limit := limit_of(rule))]
    return type_of(field.annotation) + (f", {', '.join(limits)}" if limits else "")


def limit_of(rule: Any) -> str:
    for attribute, sign in (("gt", "&gt;"), ("ge", "&ge;"), ("lt", "&lt;"), ("le", "&le;")):
        if (bound := getattr(rule, attribute, None)) is not None:
            return f"{sign} {bound:g}"
    return ""


def type_of(kind: Any) -> str:
    """A type as a reader of YAML would put it."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Annotated:
        limits = [limit for rule in args[1:] for limit in rules_of(rule)]
        return f"{type_of(args[0])}{' ' if limits else ''}{', '.join(limits)}"
    if origin is typing.Literal:
        return ", ".join(f"`{value}`" for value in args)
    if origin in (list, tuple):
        inside = [type_of(arg) for arg in args if arg is not Ellipsis]
        return f"list of {inside[0]}" if origin is list else f"[{', '.join(inside)}]"
    if origin is dict:
        return f"{type_of(args[0])}: {type_of(args[1])}"
    if args:  # a union
        return " or ".join(dict.fromkeys(type_of(arg) for arg in args))
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return "section, see below"
    names = {"int": "integer", "float": "number", "str": "text", "bool": "true or false"}
    name = getattr(kind, "__name__", str(kind))
    return {**names, "NoneType": "null", "Path": "path"}.get(name, name)


def rules_of(rule: Any) -> list[str]:
    """Limits inside an annotation, where pydantic has not taken it apart."""
    return [limit for part in getattr(rule, "metadata", [rule]) if (limit := limit_of(part))]


def default(field: FieldInfo) -> str:
    if field.is_required():
        return "must be given"
    value = field.get_default(call_default_factory=True)
    if value is None:
        return "null"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, dict):
        return "`{" + ", ".join(f"{k}: {plain(v)}" for k, v in value.items()) + "}`"
    if isinstance(value, (list, tuple)):
        return "`[" + ", ".join(str(plain(v)) for v in value) + "]`"
    return f"`{value:g}`" if isinstance(value, float) else f"`{value}`"


def plain(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return "{" + ", ".join(f"{k}: {v}" for k, v in value.model_dump().items() if v) + "}"
    return value


def model_of(kind: Any) -> type[BaseModel] | None:
    """The section in an annotation, if there is one."""
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return kind
    return next((m for arg in typing.get_args(kind) if (m := model_of(arg))), None)


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_directive("config-reference", ConfigReference)
    app.add_directive("fields", Fields)
    return {"parallel_read_safe": True}
