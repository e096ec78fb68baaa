"""Which code a run is made by: refused where it is not committed, kept as a diff where that is allowed."""

import functools
import json
import os
import re
import signal
import subprocess
from pathlib import Path

import pytest
from training import TINY, events, flags

import lm.run
import train
from lm.args import parse
from lm.files import sha256
from lm.provenance import Tree, keep_diff, read_tree, worth_saying

GIT = ("git", "-c", "user.name=tests", "-c", "user.email=tests@localhost", "-c", "init.defaultBranch=main")


SETTINGS = "[diff]\nnoprefix = true\nexternal = true\n[color]\nui = always\n[core]\nquotePath = true\n"


def git(folder: Path, *command: str) -> str:
    return subprocess.run([*GIT, *command], cwd=folder, check=True, capture_output=True, text=True).stdout.strip()


def content(folder: Path) -> dict[str, tuple[bytes, bool]]:
    """The bytes of every file but git's, and whether it may be executed."""
    paths = [path for path in folder.rglob("*") if path.is_file() and ".git" not in path.relative_to(folder).parts]
    return {str(path.relative_to(folder)): (path.read_bytes(), os.access(path, os.X_OK)) for path in paths}


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """A checkout of a few files, all of them committed, in a home without settings."""
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = tmp_path / "tree"
    (folder / "lm").mkdir(parents=True)
    (folder / "train.py").write_text("lr = 1\nsteps = 2\n")
    (folder / "lm/step.py").write_text("clip = 1\n")
    (folder / "lm/draws.py").write_text("seed = 0\n")
    (folder / "notes.md").write_text("none\n")
    (folder / "image.png").write_bytes(bytes(range(256)))
    (folder / ".gitignore").write_text("/runs/\n")
    git(folder, "init")
    git(folder, "add", "-A")
    git(folder, "commit", "-m", "first")
    return folder


def test_a_committed_tree_has_its_commit_and_nothing_else(tree):
    (tree / "runs").mkdir()
    (tree / "runs/copy.py").write_text("ignored\n")
    (tree / "data.jsonl").write_text("no program\n")
    os.utime(tree / "train.py", (1, 1))  # touched, not changed
    assert read_tree(False, tree) == Tree(git(tree, "rev-parse", "HEAD"))
    assert read_tree(False, tree).record == {"commit": git(tree, "rev-parse", "HEAD"), "dirty": False}


CHANGES = {
    "edited": (lambda tree: (tree / "lm/step.py").write_text("clip = 2\n"), "lm/step.py"),
    "removed": (lambda tree: (tree / "train.py").unlink(), "train.py"),
    "staged": (lambda tree: [(tree / "notes.md").write_text("some\n"), git(tree, "add", "notes.md")], "notes.md"),
    "new and staged": (lambda tree: [(tree / "new.json").write_text("{}\n"), git(tree, "add", "new.json")], "new.json"),
    "new": (lambda tree: (tree / "lm/neu é.py").write_text("x = 1\n"), "lm/neu é.py"),
    "a new script": (lambda tree: (tree / "job.sh").write_text("true\n"), "job.sh"),
    "new and empty": (lambda tree: (tree / "lm/__init__.py").touch(), "lm/__init__.py"),
    "to be executed": (lambda tree: (tree / "train.py").chmod(0o755), "train.py"),
    "removed from the index": (lambda tree: git(tree, "rm", "--cached", "train.py") and edit(tree), "train.py"),
}


def edit(tree: Path) -> None:
    (tree / "train.py").write_text("lr = 1\nsteps = 3\n")


@pytest.mark.parametrize(("change", "name"), CHANGES.values(), ids=CHANGES)
def test_whatever_differs_from_the_commit_is_named(change, name, tree):
    change(tree)
    commit = git(tree, "rev-parse", "HEAD")[:7]
    message = f"^{name} differ from commit {commit}, a committed tree is needed .*: commit, or pass --dirty"
    with pytest.raises(ValueError, match=message):
        read_tree(False, tree)


def test_the_class_that_a_model_s_folder_has_is_no_program_of_the_tree(tree):
    model = tree / "exported"
    model.mkdir()
    (model / "psann.py").write_text("class of the model\n")
    with pytest.raises(ValueError, match=r"exported/psann.py differ"):
        read_tree(False, tree)
    (model / "config.json").write_text("{}\n")
    (model / "model.safetensors").touch()
    with pytest.raises(ValueError, match=r"exported/psann.py differ"):
        read_tree(False, tree)
    (model / "config.json").write_text('{"auto_map": {"AutoConfig": "psann.PsannConfig"}}\n')
    assert read_tree(False, tree) == Tree(git(tree, "rev-parse", "HEAD"))
    (tree / "lm/new.py").write_text("a program\n")
    with pytest.raises(ValueError, match=r"lm/new.py differ"):
        read_tree(False, tree)


def test_an_edit_in_the_moment_of_the_commit_is_noticed(tree):
    """Of the same size, and at the time that the index has of the file: git tells it by the time of the index."""
    git(tree, "config", "core.trustctime", "false")
    at = (10**9, 10**9)
    os.utime(tree / "lm/step.py", at)
    git(tree, "update-index", "--refresh")
    (tree / "lm/step.py").write_text("clip = 2\n")
    for path in ("lm/step.py", ".git/index"):
        os.utime(tree / path, at)
    with pytest.raises(ValueError, match="lm/step.py differ"):
        read_tree(False, tree)


def test_many_files_are_counted(tree):
    for number in range(20):
        (tree / f"{number:02}.py").touch()
    assert read_tree(True, tree).differs.startswith("00.py, 01.py, 02.py, 03.py, 04.py, 05.py, 06.py, 07.py and 12 more differ")


@pytest.mark.parametrize("settings", ["", SETTINGS])
def test_the_diff_on_the_commit_gives_the_tree_back(settings, tree, tmp_path):
    (tmp_path / ".gitconfig").write_text(settings)
    for change, _ in CHANGES.values():
        change(tree)
        if not (tree / "train.py").exists():
            edit(tree)
    (tree / "lm/draws.py").unlink()
    (tree / "image.png").write_bytes(bytes(range(255, -1, -1)) * 3)
    (tree / "lm/step.py").write_text("no newline, and \r\n a carriage return")
    index = (tree / ".git/index").read_bytes()
    found = read_tree(True, tree)
    assert (tree / ".git/index").read_bytes() == index
    git(tmp_path, "clone", "tree", "clone")
    git(tmp_path / "clone", "checkout", found.commit)
    git(tmp_path / "clone", "apply", str(keep_diff(tmp_path, found.diff)))
    assert content(tmp_path / "clone") == content(tree)


def test_what_is_no_checkout_has_no_commit_and_that_is_said(tree, tmp_path, monkeypatch):
    (tmp_path / "tarball").mkdir()
    inside = tree / "vendored"
    inside.mkdir()
    cases = {tmp_path / "tarball": "not a git repository", inside: "is a folder of the repository .*tree, not its root"}
    for root, why in cases.items():
        found = read_tree(False, root)
        assert found.record == {"commit": None, "dirty": None}
        (line,) = worth_saying(found, None, None)
        assert "the commit is not known" in line
        assert re.search(why, line)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert read_tree(False, tree) == Tree(None, "there is no git")


def test_a_checkout_of_another_owner_is_not_taken_for_clean(tree, monkeypatch):
    """git refuses to read it; GIT_TEST_ASSUME_DIFFERENT_OWNER makes it think so."""
    (tree / "train.py").write_text("changed\n")
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")
    found = read_tree(False, tree)
    assert found.record == {"commit": None, "dirty": None}
    assert "detected dubious ownership" in found.unknown


def test_the_variables_of_a_hook_name_no_other_repository(tree, tmp_path, monkeypatch):
    git(tmp_path, "init", "other")
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "other/.git"))
    monkeypatch.setenv("GIT_INDEX_FILE", str(tmp_path / "other/.git/index"))
    assert read_tree(False, tree).commit is not None


def test_each_other_diff_is_kept_once(tmp_path):
    diffs = {b"one": "uncommitted.diff", b"two": "uncommitted_2.diff", b"three": "uncommitted_3.diff"}
    for diff in (b"one", b"one", b"two", b"one", b"three", b"two"):
        assert keep_diff(tmp_path, diff) == tmp_path / diffs[diff]
    assert keep_diff(tmp_path, b"") is None
    assert {path.read_bytes(): path.name for path in tmp_path.iterdir()} == diffs


def test_a_tree_that_git_cannot_compare_is_refused(tree):
    (tree / ".git/index").write_bytes(b"no index")
    with pytest.raises(ValueError, match="^git cannot tell what differs from commit .*index file smaller than expected"):
        read_tree(True, tree)


@pytest.fixture
def run(tree, papers_dir, tmp_path, monkeypatch, capsys):
    """Train up to this many steps as if `tree` were the code; returns what was said."""
    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    handlers = [signal.getsignal(number) for number in numbers]
    monkeypatch.setattr(lm.run, "read_tree", functools.partial(read_tree, root=tree))
    settings = TINY | {"data_dir": papers_dir, "output_dir": tmp_path / "run", "force_cpu": True}
    del settings["dirty"]

    def go(steps: int, **changes) -> str:
        assert train.main(parse(train.Args, flags(**settings | {"token_budget": 288 * steps} | changes))) == 0
        return capsys.readouterr().out

    yield go
    for number, handler in zip(numbers, handlers, strict=True):
        signal.signal(number, handler)


def test_a_run_of_code_that_is_not_committed_is_refused_before_it_leaves_anything(run, tree, tmp_path):
    edit(tree)
    with pytest.raises(ValueError, match="train.py differ from commit"):
        run(2)
    assert not (tmp_path / "run").exists()


def test_a_run_has_its_commit_and_what_differs_from_it_on_record(run, tree, tmp_path):
    folder, first = tmp_path / "run", git(tree, "rev-parse", "HEAD")
    edit(tree)
    assert f"--dirty: train.py differ from commit {first[:7]}; {folder}/uncommitted.diff has the difference\n" in run(
        2, dirty=True
    )
    about = json.loads((folder / "run.json").read_text())
    assert (about["commit"], about["dirty"]) == (first, True)
    assert about["uncommitted_diff"] == {"file": "uncommitted.diff", "sha256": sha256(folder / "uncommitted.diff")}
    assert "+steps = 3" in (folder / "uncommitted.diff").read_text()

    (tree / "lm/step.py").write_text("clip = 2\n")
    said = run(3, dirty=True)
    assert "+clip = 2" in (folder / "uncommitted_2.diff").read_text()
    assert "the run began" not in said

    git(tree, "commit", "-a", "-m", "second")
    second = git(tree, "rev-parse", "HEAD")
    assert f"the run began with commit {first} and goes on with {second}\n" in run(4)
    starts = [event for event in events(folder) if event["event"] in ("started", "resumed")]
    assert [(event["commit"], event["dirty"]) for event in starts] == [(first, True), (first, True), (second, False)]
    assert json.loads((folder / "run.json").read_text()) == about
    assert {path.name for path in folder.glob("*.diff")} == {"uncommitted.diff", "uncommitted_2.diff"}
