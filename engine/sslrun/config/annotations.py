"""Type annotations as JSON Schema: of a dataclass, a component's base class, a list of floats, and so on.

The descriptions of keys come from the `Args:` or `Attributes:` section of class docstrings.
"""

import dataclasses
import inspect
import math
import re
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

from sslrun.config.component import Component
from sslrun.config.schema_reader import DEFAULT_OF, PATH, Schema
from sslrun.errors import UsageError

REQUIRED = inspect.Parameter.empty

_SCALARS = {bool: "boolean", int: "integer", float: "number", str: "string"}
_SECTION = re.compile(r"^(?:Args|Attributes):\n((?:[ \t]+.*\n|\n)*)", re.MULTILINE)
_ITEM = re.compile(r"^    (\w+)(?: \([^)]*\))?: *((?:.*\n)(?:     +.*\n|\n(?=     ))*)", re.MULTILINE)


class DefaultOf(NamedTuple):
    """Mark of an annotation, `Annotated[int | None, DefaultOf("arch", ...)]`: what None stands for.

    `key` is another key of the table, and `values` has the default for each of its values.
    """

    key: str
    values: Mapping[str, Any]


class Parameter(NamedTuple):
    """One key of a table. `default` is REQUIRED where it must be given."""

    annotation: Any
    default: Any
    description: str


def describe(annotation: Any, module_prefix: str = "") -> Schema:
    """The schema of an annotation, with `$defs`; unions contain only classes whose module begins with the prefix.

    An annotation without a TOML equivalent accepts any value.
    """
    definitions: dict[str, Schema] = {}
    schema = _schema(annotation, definitions, module_prefix)
    return {**schema, "$defs": dict(sorted(definitions.items()))}


def parameters(cls: type) -> dict[str, Parameter]:
    """The keys that a dataclass or a component's constructor takes.

    `**kwargs` of a constructor stand for the parameters of the next constructor above it. A parameter without an
    annotation accepts any value.
    """
    documented = descriptions(cls)
    known: dict[str, Parameter] = {}
    for owner in cls.__mro__:
        constructor = owner.__dict__.get("__init__")
        if owner is object or constructor is None:
            continue
        hints = _hints(owner, constructor)
        taken = list(inspect.signature(constructor).parameters.values())[1:]
        for name, parameter in ((p.name, p) for p in taken if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)):
            default = _default(owner, parameter)
            known.setdefault(name, Parameter(hints.get(name, Any), default, documented.get(name, "")))
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in taken):
            break
    return known


def descriptions(cls: type) -> dict[str, str]:
    """The description of each parameter in the docstrings of a class and its bases; a subclass's wins."""
    texts: dict[str, str] = {}
    for owner in reversed(cls.__mro__):
        for section in _SECTION.finditer(inspect.cleandoc(owner.__doc__ or "") + "\n"):
            for item in _ITEM.finditer(section[1]):
                texts[item[1]] = " ".join(item[2].split())
    return texts


def is_component(annotation: Any) -> bool:
    """Whether an annotation is a kind of component, or a class of one."""
    return isinstance(annotation, type) and issubclass(annotation, Component) and annotation is not Component


def names_class(annotation: Any) -> bool:
    """Whether an annotation asks for a table that names its class."""
    if not is_component(annotation):
        return False
    return annotation.names_itself or annotation.registry.get(annotation.__name__) is not annotation


def _schema(annotation: Any, definitions: dict[str, Schema], prefix: str) -> Schema:
    origin, arguments = get_origin(annotation) or annotation, get_args(annotation)
    if origin is Annotated:
        marks: Schema = {PATH: True} if PATH in annotation.__metadata__ else {}
        for mark in annotation.__metadata__:
            if isinstance(mark, DefaultOf):
                marks[DEFAULT_OF] = {mark.key: dict(mark.values)}
        return {**_schema(arguments[0], definitions, prefix), **marks}
    if annotation is Path:
        return {"type": "string", PATH: True}
    if annotation in _SCALARS:
        return {"type": _SCALARS[annotation]}
    if origin is Literal:
        return {"enum": list(arguments)}
    if origin in (Union, types.UnionType):
        return _either([_schema(a, definitions, prefix) for a in arguments if a is not types.NoneType])
    if origin is tuple and arguments[-1:] != (...,):
        items = _either([_schema(a, definitions, prefix) for a in arguments])
        return {"type": "array", "items": items, "minItems": len(arguments), "maxItems": len(arguments)}
    if origin in (list, tuple, Sequence):
        return {"type": "array", "items": _schema(arguments[0] if arguments else Any, definitions, prefix)}
    if origin is dict:
        values = _schema(arguments[1] if arguments else Any, definitions, prefix)
        return {"type": "object", "additionalProperties": values}
    if names_class(annotation):
        return _union(annotation, definitions, prefix)
    if dataclasses.is_dataclass(annotation):
        return _define(origin.__name__, annotation, definitions, prefix)
    return {}


def _either(options: list[Schema]) -> Schema:
    flat = [inner for option in options for inner in option.get("anyOf", [option])]
    distinct = [option for place, option in enumerate(flat) if option not in flat[:place]]
    return distinct[0] if len(distinct) == 1 else {"anyOf": distinct}


def _union(base: Any, definitions: dict[str, Schema], prefix: str) -> Schema:
    """All classes below a component's base class that configs can name, one alternative each."""
    name = base.kind if "registry" in base.__dict__ else f"{base.kind}:{base.__name__}"
    if name not in definitions:
        definitions[name] = {"title": base.kind, "x-tag": base.tag, "oneOf": []}
        usable = [cls for cls in base.registry.values() if issubclass(cls, base) and cls.__module__.startswith(prefix)]
        for cls in sorted(usable, key=lambda cls: cls.__name__):
            option = _define(f"{base.kind}.{cls.__name__}", cls, definitions, prefix, base.tag)
            definitions[name]["oneOf"].append(option)
        root = next(cls for cls in base.__mro__ if "registry" in cls.__dict__)
        _union(root, definitions, prefix)  # `sslrun list` and the reference show the whole kind
    return {"$ref": f"#/$defs/{name}"}


def _define(name: str, cls: Any, definitions: dict[str, Schema], prefix: str, tag: str | None = None) -> Schema:
    """A class as a table with exactly its keys, and `tag`, the key that names the class, if there is one."""
    if name not in definitions:
        docs = _SECTION.sub("", inspect.cleandoc(cls.__doc__ or "") + "\n")
        summary, _, rest = docs.partition("\n\n")
        table: Schema = {"title": cls.__name__, "description": " ".join(summary.split()), "type": "object"}
        table |= {"x-docs": rest.strip("\n")} if rest.strip() else {}
        definitions[name] = table
        known = {key: _property(p, definitions, prefix) for key, p in parameters(cls).items()}
        required = [key for key, p in parameters(cls).items() if p.default is REQUIRED]
        if tag is not None:
            known = {tag: {"enum": [cls.__name__], "description": table["description"]}, **known}
            required = [tag, *required]
            table["x-module"] = cls.__module__
        table |= {"properties": known, "required": required, "additionalProperties": False}
    return {"$ref": f"#/$defs/{name}"}


def _property(parameter: Parameter, definitions: dict[str, Schema], prefix: str) -> Schema:
    schema = dict(_schema(parameter.annotation, definitions, prefix))
    if parameter.description:
        schema["description"] = parameter.description
    default = _as_table(parameter.default, parameter.annotation)
    if _is_plain(default):
        schema["default"] = default
    return schema


def _as_table(value: Any, annotation: Any) -> Any:
    """A dataclass instance or a component as the table that builds it, without its defaults; anything else as it is."""
    if isinstance(value, Path):
        return str(value)
    if not (dataclasses.is_dataclass(value) or isinstance(value, Component)):
        return value
    cls: Any = type(value)
    given = {name: getattr(value, name) for name, p in parameters(cls).items() if getattr(value, name) != p.default}
    is_named = is_component(cls) and (annotation is not cls or names_class(cls))
    return {cls.tag: cls.__name__, **given} if is_named else given


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    if isinstance(value, dict):
        return all(map(_is_plain, value.values()))
    return isinstance(value, bool | int | str) or (isinstance(value, float) and math.isfinite(value))


def _hints(owner: type, constructor: Any) -> dict[str, Any]:
    try:
        return get_type_hints(constructor, include_extras=True)
    except NameError as error:
        name = f"{owner.__module__}.{owner.__qualname__}"
        raise UsageError(f"{name}: an annotation is unknown at run time: {error}") from None


def _default(owner: type, parameter: inspect.Parameter) -> Any:
    """The default of a parameter; for a dataclass field with `default_factory`, a new value of it."""
    if dataclasses.is_dataclass(owner):
        field = owner.__dataclass_fields__.get(parameter.name)
        if field is not None and field.default_factory is not dataclasses.MISSING:
            return field.default_factory()
    return parameter.default
