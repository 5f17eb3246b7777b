"""The schema with a user's own classes, as far as they are imported."""

import json

from sslrun.config.annotations import describe
from sslrun.config.component import Component
from sslrun.config.schema_reader import Schema

SHIPPED = "sslrun."  # what the modules of classes that ship begin with


def with_own_classes(schema: Schema) -> Schema:
    """A schema of classes that ship, together with the classes from other modules that are imported. It imports none.

    Args:
        schema: a schema with `$defs`.
    """
    definitions: Schema = dict(schema.get("$defs", {}))
    for kind in Component.__subclasses__():
        if all(cls.__module__.startswith(SHIPPED) for cls in kind.registry.values()):
            continue
        narrower = [cls for name, cls in kind.registry.items() if f"{kind.kind}:{name}" in definitions]
        for base in (kind, *narrower):
            for name, definition in _definitions(base).items():
                known: Schema = definitions.get(name) or definition
                if "oneOf" in known:  # only some modules that ship may be imported
                    added = [option for option in definition["oneOf"] if option not in known["oneOf"]]
                    known = {**known, "oneOf": [*known["oneOf"], *added]}
                definitions[name] = known
    return {**schema, "$defs": definitions}


def _definitions(base: type) -> Schema:
    """The definitions of a kind or of a class of one, as schema.json would have them: tuples as lists."""
    definitions: Schema = json.loads(json.dumps(describe(base)["$defs"], default=str))
    return definitions
