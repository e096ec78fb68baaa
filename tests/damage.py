"""Changes to a folder of data that its checksums do not tell, so that what is checked behind them is reached."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lm.files import listed, write_sealed


def change_meta(folder: Path, change: Callable[[dict], Any], name: str = "meta.json") -> None:
    """Change what the file says, and seal it anew."""
    meta = json.loads((folder / name).read_text())
    del meta["sha256"]
    change(meta)
    write_sealed(folder / name, meta)


def list_again(folder: Path, *names: str) -> None:
    """Put size and SHA-256 of these files, as they are now, into meta.json."""
    sums = listed(folder, [folder / name for name in names])

    def change(meta: dict) -> None:
        for name in names:
            meta["files"][name] = meta["files"].get(name, {}) | sums[name]

    change_meta(folder, change)


def flip(path: Path, at: int) -> None:
    """Flip one bit of the byte `at`."""
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)
