"""Imported before all else by a program that somebody waits for: the garbage collector looks away while the rest is imported.

Importing torch and transformers makes about a million objects, all of which stay; the collector would go through them again
and again, an eighth of the time. Nor does it look at them later: they are frozen, which also lets forked loaders share them.
"""

import gc

gc.disable()


def end_of_imports() -> None:
    """The collector works again, on what is made from now on."""
    gc.freeze()
    gc.enable()
