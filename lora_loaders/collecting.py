"""Python's garbage collector waits while a model is changed."""

import gc
from collections.abc import Generator
from contextlib import contextmanager


@contextmanager
def uncollected() -> Generator[None]:
    """No cyclic garbage is looked for in the block.

    A load makes some 25,000 containers which all stay: each few hundred would send the collector through the young
    ones, and each quarter of the heap through everything that torch and diffusers have made. That was a third of a
    load's time, and found nothing.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
