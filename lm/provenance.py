"""Which code a run is made by: the commit, and what differs from it.

A tree is dirty when a tracked file differs from the commit, staged or not, or a program (*.py, *.sh) is there that git neither
tracks nor ignores: it can be imported as well.
"""

import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lm.files import whole_file

ROOT = Path(__file__).parent.parent
PROGRAMS = ("*.py", "*.sh")
LITERAL = {"GIT_LITERAL_PATHSPECS": "1"}  # names of files are no patterns
NAMED = 8  # files, in a message
ELSEWHERE = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE")  # variables that a hook sets, of whatever repository it is of


@dataclass(frozen=True)
class Tree:
    """The code as it is on the disk."""

    commit: str | None  # None: it is not known, and `unknown` says why
    unknown: str = ""
    changed: tuple[str, ...] = ()  # files that differ from the commit
    diff: bytes = b""  # `git apply` on the commit makes the tree of it

    @property
    def record(self) -> dict[str, Any]:
        """What is written down of it: the commit, and whether something differs from it; null where that is not known."""
        return {"commit": self.commit, "dirty": None if self.commit is None else bool(self.changed)}

    @property
    def differs(self) -> str:
        """Which files differ from which commit."""
        more = f" and {len(self.changed) - NAMED} more" if len(self.changed) > NAMED else ""
        return f"{', '.join(self.changed[:NAMED])}{more} differ from commit {self.commit[:7]}"


def read_tree(dirty: bool, root: Path = ROOT) -> Tree:
    """The commit that `root` is a checkout of, and what differs from it.

    Raises: ValueError if something does and `dirty` does not allow it, or if git cannot tell.
    """
    try:
        top, index, commit = _git(root, "rev-parse", "--show-toplevel", "--git-path", "index", "HEAD").decode().splitlines()
        if Path(top).resolve() != root.resolve():
            return Tree(None, f"{root} is a folder of the repository {top}, not its root")
    except FileNotFoundError:
        return Tree(None, "there is no git")
    except subprocess.CalledProcessError as error:  # no checkout, or one of another owner, which git does not read
        return Tree(None, _said(error))
    try:
        tree = _compare(root, commit, root / index)
    except subprocess.CalledProcessError as error:
        raise ValueError(
            f"git cannot tell what differs from commit {commit[:7]} in {root} ({_said(error)}), it must be known: mend the"
            " checkout, or train from a copy of it without .git"
        ) from error
    if tree.changed and not dirty:
        raise ValueError(
            f"{tree.differs}, a committed tree is needed for a run that can be repeated: commit, or pass --dirty, which keeps"
            " the diff in the run's folder"
        )
    return tree


def _compare(root: Path, commit: str, index: Path) -> Tree:
    """What differs from `commit`, by way of a copy of the index: the user's own stays as it is."""
    with tempfile.TemporaryDirectory() as folder:
        if index.exists():
            shutil.copy2(index, folder)  # with its time, by which git knows the files that may have changed just after it
        own = {"GIT_INDEX_FILE": f"{folder}/index"}
        found = _git(root, "ls-files", "-z", "--others", "--exclude-standard", "--", *PROGRAMS, **own)
        programs = [name for name in found.split(b"\0") if name and not _is_of_a_model(root / os.fsdecode(name))]
        if added := b"\0".join(programs):
            _git(root, "add", "--intent-to-add", "--pathspec-from-file=-", "--pathspec-file-nul", given=added, **own, **LITERAL)
        _git(root, "update-index", "-q", "--really-refresh", **own, fails=True)  # its code says whether anything differs
        compare = ("diff-index", "--no-ext-diff")  # unlike `git diff` it obeys no settings that `git apply` does not know
        names = _git(root, *compare, "--name-only", "-z", commit, **own).decode(errors="replace")
        if not names:
            return Tree(commit)
        diff = _git(root, *compare, "--patch", "--binary", commit, **own)
    return Tree(commit, changed=tuple(names.split("\0")[:-1]), diff=diff)


def _is_of_a_model(program: Path) -> bool:
    """Whether it is the class that transformers copies to a model's weights, and auto_map names: nothing here imports it."""
    config = program.parent / "config.json"
    return (
        config.is_file()
        and f'"{program.stem}.' in config.read_text(errors="replace")
        and any(program.parent.glob("*.safetensors"))
    )


def _git(root: Path, *command: str, given: bytes | None = None, fails: bool = False, **variables: str) -> bytes:
    environment = {name: value for name, value in os.environ.items() if name not in ELSEWHERE} | variables
    whole = ["git", "--no-optional-locks", "-c", "core.quotePath=false", *command]
    return subprocess.run(whole, cwd=root, input=given, env=environment, capture_output=True, check=not fails).stdout


def _said(error: subprocess.CalledProcessError) -> str:
    return error.stderr.decode(errors="replace").strip().partition("\n")[0]


def keep_diff(folder: Path, diff: bytes) -> Path | None:
    """Write `diff` into the run's folder unless that has the same already, and return its file; None for none.

    The first is uncommitted.diff; others, of code that was changed before the run went on, are uncommitted_2.diff and so on.
    """
    if not diff:
        return None
    number, path = 1, folder / "uncommitted.diff"
    while path.exists():
        if path.read_bytes() == diff:
            return path
        number += 1
        path = folder / f"uncommitted_{number}.diff"
    with whole_file(path) as partial:
        partial.write_bytes(diff)
    return path


def worth_saying(tree: Tree, began_with: str | None, diff: Path | None) -> list[str]:
    """A line for each thing that whoever starts or continues the run should know of its code.

    Args:
        began_with: the commit at the run's first start.
        diff: where the difference from the commit was kept.
    """
    lines = []
    if tree.commit is None:
        lines.append(f"the commit is not known ({tree.unknown}): no record tells what code this is")
    if diff is not None:
        lines.append(f"--dirty: {tree.differs}; {diff} has the difference")
    if began_with != tree.commit:
        lines.append(f"the run began with commit {began_with} and goes on with {tree.commit}")
    return lines
