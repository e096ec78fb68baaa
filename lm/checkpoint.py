"""Checkpoints that are whole or absent, written beside the training loop, and believed only after their checksums agree.

RUN/checkpoints/step_00000200/
    config.json, generation_config.json, model.safetensors   what AutoModelForCausalLM.from_pretrained loads
    optimizer.safetensors   one tensor for each moment: "<parameter>/<moment>"
    state.json              what the next step needs beside these (no RNG state: draws are functions of seed and step)
    manifest.json           size and SHA-256 of each file above, and a SHA-256 of itself; written last

Nothing is pickled, and nothing that is read can run code. Only the main process writes; every process reads.
"""

import hashlib
import json
import os
import shutil
import sys
import threading
from collections.abc import Callable, Mapping
from concurrent import futures
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import xxhash
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lm.checks import COUNT, Kinds, file_faults, kind_faults, list_faults
from lm.files import read_json, read_sealed, sync, whole_folder, write_json, write_sealed
from lm.models import load_weights
from lm.optim import Moments, group_of, moments_of, needed_moments, put_moments
from lm.tokenizer import save_tokenizer

FORMAT = "checkpoint-2"
MADE_BY = "the training script"
MAX_MANIFEST_BYTES = 2**20  # of a file that names a dozen others
NICENESS = 5  # of the thread that writes; at 19, the lowest priority, it hardly writes while training uses every core


class Checkpoints:
    """The checkpoints of one run: saved in the background, the newest `keep` kept, the newest good one found again.

    Training waits for a copy alone, made in CPU memory that is kept for the next one: new memory costs more time than the copy.
    It is that of one copy, with AdamW in float32 12 bytes for each parameter, and of a second from the first time on that a
    save finds another one still being written. It is page-locked if the model is on a GPU.
    """

    def __init__(self, folder: Path, keep: int, main: bool = True):
        self.folder, self.keep, self.main = folder, keep, main
        self._writer = futures.ThreadPoolExecutor(1, "checkpoint", initializer=_step_aside)
        self._pending: list[futures.Future] = []  # writes that are not done, or have failed
        self._idle: list[dict[str, torch.Tensor]] = []  # copies that no write reads any more

    def save(self, step: int, model: PreTrainedModel, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        """Copy everything now, write it in the background; nothing but in the main process. Waits only if two writes are not
        done yet."""
        if not self.main:
            return
        weights, moments = model.state_dict(), _moments(model, optimizer)
        without = [name for name, parameter in model.named_parameters() if not optimizer.state.get(parameter)]

        def write(folder: Path, copies: dict[str, torch.Tensor]) -> None:
            model.save_pretrained(folder, state_dict={name: copies[name] for name in weights})
            own, about = {name: copies[name] for name in moments}, {"without_moments": json.dumps(without)}
            safetensors.torch.save_file(own, folder / "optimizer.safetensors", about)
            write_json(folder / "state.json", {"step": step} | state)

        def publish(copies: dict[str, torch.Tensor]) -> None:
            path = self.folder / f"step_{step:08d}"
            self.set_aside_if_damaged(path)
            write_folder(path, lambda folder: write(folder, copies))
            self.prune()

        self._copy_and(publish, weights | moments)

    def save_model(self, path: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, about: dict) -> None:
        """Write model and tokenizer alone, in the background, as a folder that transformers loads; replaces `path`."""
        if not self.main:
            return

        def publish(copies: dict[str, torch.Tensor]) -> None:
            def write(folder: Path) -> None:
                model.save_pretrained(folder, state_dict=copies)
                save_tokenizer(tokenizer, folder)
                write_json(folder / "about.json", about)

            write_folder(path, write)

        self._copy_and(publish, model.state_dict())

    def _copy_and(self, publish: Callable[[dict[str, torch.Tensor]], None], tensors: Mapping[str, torch.Tensor]) -> None:
        """Copy the tensors now, and publish the copies in the background."""
        futures.wait(self._pending[:-1])  # so that there are two copies at most
        self._pending = [write for write in self._pending if not write.done() or write.exception()]
        memory = self._idle.pop() if self._idle else {}
        copy_into(memory, tensors)

        def job() -> None:
            try:
                publish({name: memory[name] for name in tensors})
            finally:
                self._idle.append(memory)

        self._pending.append(self._writer.submit(job))

    def wait(self) -> None:
        """Return once nothing is being written.

        Raises: RuntimeError if a write failed, whatever the reason; what was there before is untouched.
        """
        futures.wait(self._pending)
        failures = [write.exception() for write in self._pending if write.exception()]
        self._pending = []
        if not failures:
            return
        error, remedy = failures[0], "see above for what failed"
        if isinstance(error, (OSError, safetensors.SafetensorError)):
            remedy = "make room or mend the disk"
        raise RuntimeError(
            f"could not write to {self.folder.parent} ({error!s:.500}): {remedy}, then run the same command again; it goes on"
            " from the newest good checkpoint"
        ) from error

    def close(self) -> None:
        """Return once nothing is being written, whether that failed or not."""
        self._writer.shutdown()

    def idle(self, seconds: float = 0.0) -> bool:
        """Whether nothing is being written, now or at most these seconds from now."""
        return not futures.wait(self._pending, seconds).not_done

    def failed(self) -> bool:
        """Whether a background write has failed since; `wait` then raises."""
        return any(write.done() and write.exception() is not None for write in self._pending)

    def paths(self) -> list[Path]:
        """Every checkpoint under its final name, oldest first, good or not."""
        found = [path for path in self.folder.glob("step_*") if path.name.isascii() and path.name[5:].isdigit()]
        return sorted((path for path in found if path.is_dir()), key=_step_in_name)

    def newest_good(self) -> Path | None:
        """The newest checkpoint whose files all agree with its manifest; says which newer ones it passes over, and why."""
        for path in reversed(self.paths()):
            fault = damage(path)
            if fault is None:
                return path
            print(f"warning: {path} is damaged ({fault}): passing over it", flush=True)
        return None

    def leave_after(self, step: int) -> None:
        """Set aside every checkpoint newer than `step`: the run goes on from there, and must not return to them."""
        self.wait()
        for path in self.paths():
            if _step_in_name(path) > step:
                set_aside(path, "damaged" if damage(path) else "left")

    def put_back(self) -> None:
        """Give a checkpoint its name again that a kill caught while another of the same step took its place."""
        for old in self.folder.glob(".step_*.old"):
            if not (path := old.with_name(old.name[1:-4])).exists():
                old.rename(path)

    def set_aside_if_damaged(self, path: Path) -> None:
        """Keep a damaged checkpoint for whoever wants to know what happened; a good one is replaced in one piece."""
        if path.exists() and damage(path):
            set_aside(path, "damaged")

    def prune(self) -> None:
        """Remove all but the newest `keep`; the newest was read back whole a moment ago, so a good one always stays."""
        for left in self.folder.glob(".step_*"):  # by a kill
            shutil.rmtree(left)
        for path in self.paths()[: -self.keep]:
            gone = path.with_name(f".{path.name}.gone")  # what is half removed must not stand under its name
            path.rename(gone)
            shutil.rmtree(gone)


def copy_into(memory: dict[str, torch.Tensor], tensors: Mapping[str, torch.Tensor]) -> None:
    """Make memory[name] a copy of each tensor in CPU memory that later updates do not touch; memory of before is used again."""
    for name, tensor in tensors.items():
        kept = memory.get(name)
        if kept is None or (kept.shape, kept.dtype) != (tensor.shape, tensor.dtype):
            kept = memory[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        kept.copy_(tensor.detach(), non_blocking=True)
    if any(tensor.is_cuda for tensor in tensors.values()):
        torch.cuda.synchronize()  # once for all: the next update may begin


def _moments(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    return {
        f"{name}/{moment}": value
        for name, parameter in model.named_parameters()
        for moment, value in moments_of(optimizer, parameter).items()
    }


def _step_aside() -> None:
    """Give this thread a quarter of a core that training wants too: threads that share a step wait for the slowest of them."""
    if sys.platform == "linux":  # where a thread has a priority of its own
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)


class _Digests:
    """SHA-256, and XXH3, which takes a twelfth of its time and tells as well whether a disk gives back what it was given."""

    def __init__(self):
        self.sha256, self.xxh3 = hashlib.sha256(), xxhash.xxh3_128()

    def update(self, data: bytes) -> None:
        self.sha256.update(data)
        self.xxh3.update(data)


def _digests(file: Path, kind: Callable[[], Any]) -> Any:
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, kind)


def write_folder(path: Path, write: Callable[[Path], None]) -> None:
    """Write a folder and read it back before it gets its name. Raises: OSError if it is not what was written."""
    with whole_folder(path) as folder:
        write(folder)
        written = {file: _digests(file, _Digests) for file in sorted(folder.iterdir())}
        files = {
            file.name: {"size": file.stat().st_size, "sha256": found.sha256.hexdigest()} for file, found in written.items()
        }
        manifest = folder / "manifest.json"
        write_sealed(manifest, {"format": FORMAT, "files": files})
        written[manifest] = _digests(manifest, _Digests)
        for file in written:
            sync(file)
            _forget(file)
        for file, found in written.items():
            if _digests(file, xxhash.xxh3_128).digest() != found.xxh3.digest():
                raise OSError(f"{path}/{file.name} reads back as something else than was written")


def _forget(path: Path) -> None:
    """Take a file, which is synced, out of the page cache: what is read next comes from the disk."""
    if hasattr(os, "posix_fadvise"):  # not on macOS
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _step_in_name(path: Path) -> int:
    return int(path.name.removeprefix("step_"))


def set_aside(path: Path, why: str) -> None:
    """Rename a checkpoint or a model so that it is no longer taken for one, and nothing is lost."""
    number = 1
    while (aside := path.with_name(f"{path.name}.{why}_{number}")).exists():
        number += 1
    path.rename(aside)


def damage(path: Path) -> str | None:
    """What is wrong with the files of one checkpoint, or None if they are as they were written, and no others.

    A file that the manifest does not name is damage too, since transformers may read it as a part of the model. Hidden ones
    are left to the file systems and tools that make them.
    """
    try:
        manifest = path / "manifest.json"
        if manifest.is_file() and (size := manifest.stat().st_size) > MAX_MANIFEST_BYTES:
            return f"manifest.json has {size} bytes, no more than {MAX_MANIFEST_BYTES} are believed"
        files = read_sealed(manifest, MADE_BY, FORMAT).get("files")
        if not isinstance(files, dict) or not files:
            return f"manifest.json names {files!r:.80}, files are needed"
        if faults := list_faults("manifest.json", files) or file_faults(path, files):
            return faults[0]
        present = {file.name for file in path.iterdir() if not file.name.startswith(".")}
        if strange := sorted(present - files.keys() - {"manifest.json"}):
            return f"{strange[0]} is not in manifest.json, so it was not written with the rest: move it elsewhere"
    except (OSError, ValueError) as error:
        return str(error)
    return None


def read_fields(file: Path, kinds: Kinds) -> dict[str, Any]:
    """These fields of a JSON object, such as state.json, each of its kind; an int is a count.

    Raises: FileNotFoundError if there is no such file; ValueError naming it and each field that is missing or of another kind.
    """
    values = read_json(file, MADE_BY)
    counted = {name: COUNT if kind is int else kind for name, kind in kinds.items()}
    if faults := kind_faults(file, values, counted):
        raise ValueError(f"{'; '.join(faults)}: pass another checkpoint")
    return {name: values[name] for name in kinds}


def load_checkpoint(path: Path, model: PreTrainedModel, optimizer: torch.optim.Optimizer) -> None:
    """Put weights and moments back, bit for bit. The caller has made sure that `path` is good.

    Raises: ValueError, naming file and tensor, if they are not those of this model and optimizer; the model may have changed
        then, and the optimizer has not.
    """
    parameters, groups = dict(model.named_parameters()), group_of(optimizer)
    moments = _read_moments(path / "optimizer.safetensors", parameters, groups)
    load_weights(path, model)
    optimizer.state.clear()
    for name, own in moments.items():
        put_moments(optimizer, groups[parameters[name]], parameters[name], own)


def _read_moments(
    file: Path, parameters: dict[str, torch.nn.Parameter], groups: dict[torch.nn.Parameter, dict[str, Any]]
) -> dict[str, dict[str, torch.Tensor]]:
    """The moments of each parameter that has any."""
    try:
        with safetensors.safe_open(file, "pt") as opened:
            without = json.loads((opened.metadata() or {}).get("without_moments", "null"))
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118 - it is no dict
    except (OSError, ValueError, RecursionError, safetensors.SafetensorError) as error:
        raise ValueError(f"{file} cannot be read ({error!s:.200}): pass another checkpoint") from None
    moments: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        name, _, moment = key.rpartition("/")
        moments.setdefault(name, {})[moment] = tensor
    named = set(map(str, without)) if isinstance(without, list) else None
    if named is None or moments.keys() | named != parameters.keys() or moments.keys() & named:
        faults = [f"those of {', '.join(sorted(moments.keys() ^ parameters.keys())[:3])}"]
    else:
        faults = [
            fault
            for name, own in moments.items()
            for fault in _unfit(name, own, needed_moments(groups[parameters[name]], parameters[name]))
        ]
    if faults:
        raise ValueError(f"{file} does not fit the model ({'; '.join(faults[:3])}): pass another checkpoint")
    return moments


def _unfit(name: str, moments: dict[str, torch.Tensor], needed: Moments) -> list[str]:
    """What is wrong with the moments of one parameter."""
    if moments.keys() != needed.keys():
        return [f"{name} has the moments {', '.join(sorted(moments))}, {', '.join(sorted(needed))} are needed"]
    return [
        f"{name}/{moment} has shape {tuple(value.shape)} and {value.dtype}, {' and '.join(map(str, needed[moment]))} are needed"
        for moment, value in moments.items()
        if (tuple(value.shape), value.dtype) != needed[moment]
    ]
