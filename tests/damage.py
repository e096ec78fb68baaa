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


def list_again(folder: Path, *names: str, within: str = "meta.json") -> None:
    """Put size and SHA-256 of these files, as they are now, into meta.json or manifest.json."""
    sums = listed(folder, [folder / name for name in names])

    def change(meta: dict) -> None:
        for name in names:
            meta["files"][name] = meta["files"].get(name, {}) | sums[name]

    change_meta(folder, change, within)


def flip(path: Path, at: int) -> None:
    """Flip one bit of the byte `at`."""
    path.write_bytes(flipped(path.read_bytes(), at))


def flipped(content: bytes, at: int) -> bytes:
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]
