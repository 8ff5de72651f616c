"""What accelerated objects of all libraries have in common: their class, state, copies and packed weights.

An object keeps its identity, parameters and configuration. Only its class changes, to a subclass created here in which the
methods of a *surface* (`drop_in`, `dictionaries`, `sparse_coder`) override the library's.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any

from darkmatter_ext.runtime.inputs import InputError
from darkmatter_ext.saes.drop_in_state import State

_STATE = "_darkmatter_state"


# An accelerated class has a class of its library after the class below: `super()` there, which type checkers cannot know.
if TYPE_CHECKING:
    from typing import Any as Library
else:
    Library = object


class Accelerated(Library):
    """What every accelerated object has. Created by `accelerate`, never by hand."""

    _architecture: Any  # a Packing
    _library: str  # its name in `stats`

    @property
    def _fast(self) -> State:
        state = self.__dict__.get(_STATE)
        if state is None or state.owner() is not self:  # built as type(sae)(cfg), or from another object's attributes
            state = self.__dict__[_STATE] = State(self, self._architecture, self._library)
        return state

    def __reduce_ex__(self, protocol: Any) -> tuple:
        """For copies and pickles: everything except packed weights and counts, which each object has for itself."""
        rebuild, arguments, attributes, *rest = super().__reduce_ex__(protocol)
        assert isinstance(attributes, dict)
        attributes = {name: value for name, value in attributes.items() if name != _STATE}
        plain = plain_class(type(self))
        if type(self) is _classes.get(plain):  # not importable by name
            rebuild, arguments = _new_accelerated, (plain, _surfaces[plain])
        return (rebuild, arguments, attributes, *rest)

    # Methods that change weights in ways that the checks cannot see

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        self._fast.forget()
        return super()._apply(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Same as torch; also repacks the weights."""
        self._fast.forget()
        return super().load_state_dict(*args, **kwargs)


Surface = Callable[[type], tuple[type[Accelerated], dict[str, Any]]]  # a library's class -> methods, other members

_classes: dict[type, type] = {}  # a library's class -> its accelerated subclass
_surfaces: dict[type, Surface] = {}  # and the surface that made it


def plain_class(cls: type) -> type:
    """The library's class that an accelerated class stands for."""
    return next(base for base in cls.__mro__ if not issubclass(base, Accelerated))


def _without_acceleration(cls: type) -> type:
    """The plain class. For a class later derived from an accelerated one (as torch's parametrize does), its plain twin."""
    plain = plain_class(cls)
    if cls is _classes.get(plain):
        return plain
    members = {name: value for name, value in vars(cls).items() if name not in ("__dict__", "__weakref__")}
    bases = tuple(_without_acceleration(base) if issubclass(base, Accelerated) else base for base in cls.__bases__)
    return types.new_class(cls.__name__, bases, exec_body=lambda n: n.update(members))


def _accelerated_class(plain: type, surface: Surface) -> type:
    """The subclass of a library's class that `accelerate` gives its objects."""
    if plain not in _classes:
        methods, members = surface(plain)
        members = {"__module__": plain.__module__, **members}
        _surfaces[plain] = surface
        _classes[plain] = types.new_class(plain.__name__, (methods, plain), exec_body=lambda n: n.update(members))
    return _classes[plain]


def _new_accelerated(plain: type, surface: Surface) -> Any:
    return object.__new__(_accelerated_class(plain, surface))


def make_accelerated(module: Any, surface: Surface) -> None:
    """Give an object its accelerated class, in place. Raises ValueError if the surface rejects its class."""
    module.__class__ = _accelerated_class(type(module), surface)


def make_plain(module: Any) -> None:
    """The inverse of `make_accelerated`."""
    vars(module).pop(_STATE, None)
    module.__class__ = _without_acceleration(type(module))


def class_named(plain: type, names: Collection[tuple[str, str]]) -> tuple[str, str] | None:
    """Which of the (module, class) names a class or its nearest base has, even if another package bundles the library."""
    for base in plain.__mro__:
        for module, name in names:
            if base.__name__ == name and f".{base.__module__}".endswith(f".{module}"):
                return module, name
    return None


def require_own_methods(plain: type, name: str, parameters: dict[str, tuple[str, ...]]) -> None:
    """Require that a class inherits its methods from the library's class `name`, with these parameters besides self.

    Raises ValueError if it has its own, or if the library's version is not one of those known here.
    """
    base = next(base for base in plain.__mro__ if base.__name__ == name)
    for method, expected in parameters.items():
        own = getattr(plain, method)
        if own is not getattr(base, method):
            why = f"its {method} is not that of {name}"
        elif tuple(inspect.signature(own).parameters)[1:] != expected:
            why = f"the {method} of {name} has other arguments than {', '.join(expected)}: an unknown version"
        else:
            continue
        raise InputError(f"sae: must be an SAE that can be accelerated, got {plain.__name__} ({why})")
