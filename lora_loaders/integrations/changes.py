"""Changes to attributes of classes and modules, noted so that all of them can be taken back."""

from dataclasses import dataclass, field
from typing import Any

ABSENT = object()


@dataclass
class Changes:
    """What was put where, and what stood there; owners are classes or modules."""

    done: list[tuple[Any, str, Any]] = field(default_factory=list[tuple[Any, str, Any]])

    def put(self, owner: Any, name: str, value: Any) -> None:
        """Set an attribute of the owner itself."""
        self.done.append((owner, name, vars(owner).get(name, ABSENT)))
        setattr(owner, name, value)

    def take(self, owner: Any, name: str) -> None:
        """Delete an attribute of the owner itself, so that an inherited one shows; does nothing if it has none."""
        if name in vars(owner):
            self.done.append((owner, name, vars(owner)[name]))
            delattr(owner, name)

    def undo(self) -> None:
        """Take everything back, the last change first."""
        while self.done:
            owner, name, before = self.done.pop()
            if before is not ABSENT:
                setattr(owner, name, before)
            elif name in vars(owner):
                delattr(owner, name)
