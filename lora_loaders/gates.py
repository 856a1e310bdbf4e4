"""One gate a model: a forward sees the adapters before a change or after it, and changes come one after the other.

A reader-writer lock in the forward's hooks, and not a published copy: what a forward reads are the slots' tensors; they
are written in place so that compiled graphs never recompile, and a second set of them would double their memory. A
forward waits only while a change is being applied; planning happens outside. No lock is stored in the model, so that it
pickles and copies as before. Compiled code cannot wait, and hooks that are traced into a graph do nothing: a model that
is compiled as a whole is led through its gate from outside, by hooks of the wrapper or before its compiled call.

torch runs no hook after a forward that KeyboardInterrupt, SystemExit or CancelledError ended, or whose thread died. So
what a forward left is believed only while its call is found on its thread's stack. That is looked up where something
was left or would be waited for, and costs nothing else.
"""

import sys
import threading
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import ExitStack, contextmanager
from functools import wraps
from itertools import takewhile
from types import FrameType
from typing import Any, TypeVar, cast
from weakref import WeakKeyDictionary, WeakSet, ref

import torch
from torch import nn

from .collecting import uncollected
from .errors import AdapterStateError
from .layers.walks import forget, remembered
from .layout import unwrapped
from .offloading import in_step

LOOK_AGAIN = 0.1
"""Seconds after which one that waits looks whether those it waits for were interrupted: they tell nobody."""


class _Compiled:
    """What `model.compile()` made of a model's call, which goes through the model's gate."""

    def __init__(self, model: nn.Module, call: Callable[..., Any]) -> None:
        self._orig_mod, self.call = model, call

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        _enter(self._orig_mod)
        try:
            return self.call(*args, **kwargs)
        finally:
            _leave(self._orig_mod)


# By name: the code of a frame that was compiled in part is another object.
CALLS = {
    (code.co_name, code.co_filename)
    for code in (nn.Module._call_impl.__code__, _Compiled.__call__.__code__)  # pyright: ignore[reportPrivateUsage]
}


def _calls(model: nn.Module | None, frame: FrameType | None) -> int:
    """How many calls of a model are under way on the stack that ends in this frame."""
    count = 0
    is_inner = False
    while frame is not None:
        if (frame.f_code.co_name, frame.f_code.co_filename) in CALLS:
            called = frame.f_locals.get("self")
            if called is model:
                count += 1
                is_inner = True
            elif getattr(called, "_orig_mod", None) is model:
                count += not is_inner  # the call of what is compiled may be a frame of its own within this one
                is_inner = False
        frame = frame.f_back
    return count


class Gate:
    """Many forwards or one change at a time; a thread may run forwards in its change, and change in its forward.

    A scale is each thread's own; only where the forward reads it from where all threads do, as compiled code does,
    forwards of different scales take turns.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = ref(model)
        self._condition = threading.Condition()
        self._forwards: dict[int, int] = {}
        self._changer: int | None = None
        self._depth = 0
        self._waiting = 0
        self._waits_in_forward = False
        """Whether one of those waits within a forward of its own; no second one may, each would wait for the other."""
        self._scale = 1.0
        self._scaled: dict[int, list[tuple[float, bool]]] = {}
        """Thread -> the scale outside of each use of another one, and whether that use is a forward."""
        self.turn = threading.RLock()
        """Held by the pipeline's call that the model's scheduled weights follow: they can follow one at a time."""
        self.has_bases = False
        """Whether a change is under way for which weights that are kept on disk were read into memory."""
        self.wrappers: WeakSet[nn.Module] = WeakSet()
        """What `torch.compile` made of the model, as far as it was met."""
        self.version = 0
        """How many changes there were; what was planned before another one is planned again."""

    def enter_forward(self, is_watched: Callable[[], bool]) -> None:
        """Wait for changes by other threads, those that wait too, and hold further ones back."""
        me = threading.get_ident()
        with self._condition:
            if me in self._forwards and self._own_calls() == 1:  # this one: an earlier one was interrupted
                del self._forwards[me]
            if self._changer != me and me not in self._forwards:
                self._condition.wait_for(lambda: self._changer is None and not self._waiting)
            if is_watched():
                self._forwards[me] = self._forwards.get(me, 0) + 1

    def leave_forward(self) -> None:
        """The forward is over, or failed."""
        me = threading.get_ident()
        with self._condition:
            depth = self._forwards.get(me, 0)
            if depth > 1:
                self._forwards[me] = depth - 1
            else:
                self._forwards.pop(me, None)
                self._condition.notify_all()

    def enter_change(self, *, may_wait: bool = True) -> bool:
        """Wait until no other thread changes the model or runs it; False where that must not be waited for.

        Raises:
            AdapterStateError: it would wait for a forward that waits for this thread's own.
        """
        me = threading.get_ident()
        with self._condition:
            if self._changer != me:
                if not may_wait and not self._is_free():
                    return False
                is_in_forward = me in self._forwards and self._own_calls() > 0
                if is_in_forward and self._waits_in_forward:
                    raise AdapterStateError(
                        "two threads change one model, each within a forward of it: they would wait for each other",
                        mend="Change it between forwards, or in one thread.",
                        state="Nothing was changed.",
                    )
                self._waiting += 1
                self._waits_in_forward |= is_in_forward
                try:
                    self._wait_for(self._is_free)
                finally:
                    self._waiting -= 1
                    self._waits_in_forward &= not is_in_forward
                    self._condition.notify_all()
                self._changer = me
            self._depth += 1
            return True

    def _is_free(self) -> bool:
        return self._changer is None and not self._running(self._forwards)

    def _wait_for(self, is_free: Callable[[], bool]) -> None:
        while not self._condition.wait_for(is_free, LOOK_AGAIN):
            pass

    def _own_calls(self) -> int:
        return _calls(self._model(), sys._getframe())  # pyright: ignore[reportPrivateUsage]

    def _running(self, threads: Iterable[int]) -> set[int]:
        """Those of these threads, but for this one, that are within a forward of the model."""
        others = set(threads) - {threading.get_ident()}
        frames = sys._current_frames() if others else {}  # pyright: ignore[reportPrivateUsage]
        return {thread for thread in others if _calls(self._model(), frames.get(thread))}

    def _scaling(self) -> set[int]:
        """The other threads that use a scale now: in a forward, or around several."""
        around = {thread for thread, uses in self._scaled.items() if not all(is_forward for _, is_forward in uses)}
        alive = {thread.ident for thread in threading.enumerate()} if around else set[int | None]()
        return self._running(self._scaled) | ((around & alive) - {threading.get_ident()})

    def enter_scale(
        self,
        scale: float,
        outer: float,
        write: Callable[[float], None],
        is_common: Callable[[], bool],
        *,
        is_forward: bool,
    ) -> int:
        """Begin a forward with this scale, or another use of it.

        Args:
            scale: the factor.
            outer: this thread's factor of before.
            write: puts a factor where all threads read it.
            is_common: whether the forward reads it there. Then it waits for other threads' forwards of another scale.
            is_forward: whether it is one.

        Returns:
            How many uses this one is within.
        """
        me = threading.get_ident()
        with self._condition:
            # One that holds a scale already must not wait for another that does the same.
            if me not in self._scaled and self._scaled and scale != self._scale and is_common():
                self._wait_for(lambda: self._scale == scale or not self._scaling())
            uses = self._scaled.setdefault(me, [])
            uses.append((outer, is_forward))
            self._write_scale(scale, write)
            return len(uses) - 1

    def drop_interrupted(self, *, entering: bool) -> float | None:
        """Forget the uses of a scale by forwards of this thread that ended without a word.

        Args:
            entering: whether the last call on the stack has not told its scale yet.

        Returns:
            The thread's scale of before them; None if there are none.
        """
        me = threading.get_ident()
        if me not in self._scaled:
            return None
        with self._condition:
            uses, left = self._scaled[me], self._own_calls() - entering
            for depth, (outer, is_forward) in enumerate(uses):
                left -= is_forward
                if left < 0:
                    del uses[depth:]
                    if not uses:
                        del self._scaled[me]
                    return outer
        return None

    def leave_scale(self, depth: int = -1) -> float:
        """The use is over, or failed: what this thread's scale is again, to be told to `left_scale`.

        Args:
            depth: what `enter_scale` gave; the last one's by default.
        """
        with self._condition:
            uses = self._scaled.get(threading.get_ident(), [])
            if len(uses) > 1 and depth < 0:
                self.drop_interrupted(entering=False)
            if not uses[depth:]:  # forgotten since
                return 1.0
            outer, _ = uses[depth]
            del uses[depth:]
            return outer

    def left_scale(self, scale: float, write: Callable[[float], None]) -> None:
        """What all threads read follows, and those that wait go on."""
        me = threading.get_ident()
        with self._condition:
            if not self._scaled.get(me):
                self._scaled.pop(me, None)
            self._write_scale(scale, write)
            self._condition.notify_all()

    def forget_scale(self) -> None:
        """This thread's forwards end without a word: their hooks are gone."""
        with self._condition:
            self._scaled.pop(threading.get_ident(), None)
            self._condition.notify_all()

    def _write_scale(self, scale: float, write: Callable[[float], None]) -> None:
        """Write it unless another thread's forward reads there, or it stands there already."""
        if scale != self._scale and not self._scaling():
            self._scale = scale
            write(scale)

    @property
    def is_outermost(self) -> bool:
        """Whether the change that was entered last is not within another."""
        return self._depth == 1

    def leave_change(self, *, changed: bool = True) -> None:
        """The change is complete, undone, or never began."""
        with self._condition:
            self._depth -= 1
            if self._depth == 0:
                self._changer = None
                self.version += changed
                self._condition.notify_all()


_GATES: WeakKeyDictionary[nn.Module, Gate] = WeakKeyDictionary()
_MAKING = threading.Lock()


def gate_of(model: nn.Module) -> Gate:
    """The model's gate."""
    with _MAKING:
        return _GATES.get(model) or _GATES.setdefault(model, Gate(model))


def uncompiled(model: nn.Module) -> nn.Module:
    """The model that a wrapper of `torch.compile` runs, and known as compiled from here on; any other as it is."""
    own = unwrapped(model)
    if own is not model:
        gate_of(own).wrappers.add(model)
        keep_watching(own)
    return own


def _enter_changes(gates: Sequence[Gate]) -> None:
    """Enter all of these changes; none is held while another is waited for, since a forward may run other models'."""
    first = 0
    while gates:
        order = [*gates[first:], *gates[:first]]
        entered = list(takewhile(lambda gate, head=order[0]: gate.enter_change(may_wait=gate is head), order))
        if len(entered) == len(order):
            return
        for gate in entered:
            gate.leave_change(changed=False)
        first = gates.index(order[len(entered)])


@contextmanager
def changing(models: Iterable[nn.Module], *, reads_bases: bool = False) -> Generator[None]:
    """The only change of these models while the block lasts, with no forward of them under way; see `in_step`."""
    with uncollected(), remembered(), ExitStack() as stack:
        own = {gate_of(model): model for model in sorted(models, key=id)}
        _enter_changes(list(own))
        for gate in own:
            stack.callback(gate.leave_change)
        for gate, model in own.items():
            if gate.is_outermost:
                forget()
                keep_watching(model)
            if gate.is_outermost or (reads_bases and not gate.has_bases):
                stack.callback(setattr, gate, "has_bases", gate.has_bases)
                gate.has_bases = stack.enter_context(in_step(model, reads_bases=reads_bases))
        yield


def versions(models: Iterable[nn.Module]) -> list[int]:
    """How often each model was changed so far."""
    return [gate_of(model).version for model in models]


Method = TypeVar("Method", bound=Callable[..., Any])


def exclusive(*, reads_bases: bool = False) -> Callable[[Method], Method]:
    """Make a function of a model, its first argument, the only change while it runs; see `changing`."""

    def wrap(function: Method) -> Method:
        @wraps(function)
        def run(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
            with changing([model], reads_bases=reads_bases):
                return function(model, *args, **kwargs)

        return cast(Method, run)

    return wrap


HOOKS = "_lora_gate_hooks"
"""Where a model keeps the handles of its gate's hooks."""
COMPILED = "_compiled_call_impl"
"""Where torch keeps what `model.compile()` makes of its call."""


def watch_forwards(model: nn.Module) -> None:
    """Lead each forward of this model through its gate, compiled or not; does nothing where that is done."""
    for called in (model, *gate_of(model).wrappers):
        if HOOKS not in vars(called):
            vars(called)[HOOKS] = [
                called.register_forward_pre_hook(_enter, prepend=True),
                called.register_forward_hook(_leave, always_call=True),
            ]
    call: Any = getattr(model, COMPILED)
    if call is not None and not isinstance(call, _Compiled):
        vars(model)[COMPILED] = _Compiled(model, call)


def keep_watching(model: nn.Module) -> None:
    """`watch_forwards` again where it was: the model may have been compiled since."""
    if HOOKS in vars(model):
        watch_forwards(model)


def unwatch_forwards(model: nn.Module) -> None:
    """Take the hooks away again."""
    for called in (model, *gate_of(model).wrappers):
        for hook in vars(called).pop(HOOKS, ()):
            hook.remove()
    call: Any = getattr(model, COMPILED)
    if isinstance(call, _Compiled):
        vars(model)[COMPILED] = call.call


def _enter(model: nn.Module, args: object = ()) -> None:
    if not torch.compiler.is_compiling():
        own = unwrapped(model)
        # The last adapter may have gone while this forward waited, and the hook that would end it with it.
        gate_of(own).enter_forward(lambda: HOOKS in vars(own))


def _leave(model: nn.Module, args: object = (), output: object = None) -> None:
    if not torch.compiler.is_compiling():
        gate_of(unwrapped(model)).leave_forward()
