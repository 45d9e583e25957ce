"""An operator's schema from the annotations of the named tuple that holds its arguments."""

from __future__ import annotations

from typing import Annotated, Any, get_args, get_origin, get_type_hints

import torch

# What torch calls a Python type, where the annotation does not say so itself: Annotated[float, "Scalar"].
# Integers and lists of them may be torch.compile's symbols.
_NAMES = {
    torch.Tensor: "Tensor",
    torch.Tensor | None: "Tensor?",
    list[torch.Tensor]: "Tensor[]",
    int: "SymInt",
    list[int]: "SymInt[]",
    float: "float",
    bool: "bool",
    str: "str",
}


def arguments(call: type) -> str:
    """An operator's arguments, the fields of `call`, in their order. TypeError for a type without a name."""
    hints = get_type_hints(call, include_extras=True)
    return ", ".join(f"{_name(call, field, hint)} {field}" for field, hint in hints.items())


def _name(call: type, field: str, hint: Any) -> str:
    if get_origin(hint) is Annotated:
        return get_args(hint)[1]
    if hint not in _NAMES:
        raise TypeError(f"{call.__name__}.{field} is {hint}; allowed: {', '.join(map(str, _NAMES))}")
    return _NAMES[hint]
