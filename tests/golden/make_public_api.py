"""Write the signatures of everything public to `public_api.txt`, which `tests/test_public_api.py` compares with the code.

Run `python -m tests.golden.make_public_api` after a change that is meant, and read the difference before committing it.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PATH = Path(__file__).parent / "public_api.txt"
ROOMS = ("core", "datasets", "get", "model", "module", "pl", "tl")


def signature(thing: Any) -> str:
    """Signature with annotations, without addresses and the names of private modules."""
    return re.sub(r" at 0x\w+|ldvae_ext\.(\w+\.)*_\w+\.", "", str(inspect.signature(thing)))


def members(name: str, cls: type) -> Iterator[str]:
    """Public methods, properties and fields that the package defines for a class."""
    for attribute in sorted(dir(cls)):
        if attribute.startswith("_") and attribute != "__init__":
            continue
        member = inspect.getattr_static(cls, attribute)
        function = getattr(member, "__func__", member)
        owner = getattr(function, "__module__", "") or ""
        if isinstance(member, property):
            owner = (member.fget.__module__ if member.fget else "") or ""
            if owner.startswith("ldvae_ext"):
                yield f"{name}.{attribute}: property"
        elif callable(getattr(cls, attribute, None)) and owner.startswith("ldvae_ext"):
            yield f"{name}.{attribute}{signature(getattr(cls, attribute))}"


def public_api() -> list[str]:
    """One line for each public name, sorted."""
    import ldvae_ext

    lines = []
    for room in ROOMS:
        where = getattr(ldvae_ext, room)
        for name in getattr(where, "__all__", [n for n in vars(where) if not n.startswith("_")]):
            thing = getattr(where, name)
            if inspect.isclass(thing):
                lines += [f"{room}.{name}: class", *members(f"{room}.{name}", thing)]
            elif callable(thing) and thing.__module__.startswith("ldvae_ext"):
                lines.append(f"{room}.{name}{signature(thing)}")
    return sorted(set(lines))


if __name__ == "__main__":
    PATH.write_text("\n".join(public_api()) + "\n")
