"""Changes to attributes of classes and modules, noted so that all of them can be taken back."""

from dataclasses import dataclass, field
from typing import Any

ABSENT = object()


@dataclass
class Changes:
    """What was put where, and what stood there; owners are classes or modules."""

    done: list[tuple[Any, str, Any]] = field(default_factory=list[tuple[Any, str, Any]])
    _places: set[tuple[int, str]] = field(default_factory=set[tuple[int, str]])

    def has(self, owner: Any, name: str) -> bool:
        """Whether something was put there."""
        return (id(owner), name) in self._places

    def put(self, owner: Any, name: str, value: Any) -> None:
        """Set an attribute of the owner itself."""
        self.done.append((owner, name, vars(owner).get(name, ABSENT)))
        self._places.add((id(owner), name))
        setattr(owner, name, value)

    def undo(self) -> None:
        """Take everything back, the last change first."""
        self._places.clear()
        while self.done:
            owner, name, before = self.done.pop()
            if before is not ABSENT:
                setattr(owner, name, before)
            elif name in vars(owner):
                delattr(owner, name)
