"""What a table with `type = "ClassName"` becomes.

A room declares one base class, `class Transform(Component, kind="transforms")`; every class below it is known to
configs by its class name from the moment it is defined. Its constructor is its schema: keyword arguments with type
annotations, described in the `Args:` section of the class docstring. Nothing here needs torch.
"""

from typing import Any, ClassVar


class Component:
    """Base of everything that a config can name.

    A direct subclass gives `kind` (the word of `sslrun list KIND`) and, where the field has another habit, the key that
    names the class (`tag`, "type" by default, "policy" for learning-rate schedules). A class that configs may not name
    (a base of others, one that only code can construct) says `listed=False`; its subclasses are listed again.
    """

    kind: ClassVar[str]
    tag: ClassVar[str]
    registry: ClassVar[dict[str, type]]
    names_itself: ClassVar[bool] = True
    """Whether a table names its class even where a key asks for one class alone: `[eval.knn]` does not."""

    def __init_subclass__(
        cls, *, kind: str | None = None, tag: str = "type", listed: bool = True, **kwargs: Any
    ) -> None:
        super().__init_subclass__(**kwargs)
        if kind is not None:
            cls.kind, cls.tag, cls.registry = kind, tag, {}
            return
        if not listed:
            return
        other = cls.registry.get(cls.__name__)
        if other is not None and other.__module__ != cls.__module__:
            raise TypeError(f"two {cls.kind} are called {cls.__name__}: {other.__module__} and {cls.__module__}")
        cls.registry[cls.__name__] = cls
