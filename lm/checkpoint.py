"""Checkpoints that are whole or absent, written beside the training loop, and believed only after their checksums agree.

RUN/checkpoints/step_00000200/
    config.json, generation_config.json, model.safetensors   what AutoModelForCausalLM.from_pretrained loads
    optimizer.safetensors   one tensor for each moment: "<parameter>/<moment>"
    state.json              what the next step needs beside these (no RNG state: draws are functions of seed and step)
    manifest.json           size and SHA-256 of each file above, written last

Nothing is pickled. Only the main process writes; every process reads.
"""

import shutil
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lm.files import read_json, sha256, whole_folder, write_json
from lm.models import load_model

FORMAT = "checkpoint-1"


class Checkpoints:
    """The checkpoints of one run: saved in the background, the newest `keep` kept, the newest good one found again."""

    def __init__(self, folder: Path, keep: int):
        self.folder, self.keep = folder, keep
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: deque[Future] = deque()

    def save(self, step: int, model: PreTrainedModel, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        """Copy everything now, write it in the background. Waits only if two writes are not done yet."""
        self._wait_for_all_but(1)
        weights, moments = snapshot(model), _moments(model, optimizer)

        def write(folder: Path) -> None:
            model.save_pretrained(folder, state_dict=weights)
            safetensors.torch.save_file(moments, folder / "optimizer.safetensors")
            write_json(folder / "state.json", {"step": step} | state)

        def job() -> None:
            path = self.folder / f"step_{step:08d}"
            if path.exists() and damage(path):
                _set_aside(path, "damaged")  # for whoever wants to know what happened; a good one is replaced in one piece
            _write_folder(path, write)
            if fault := damage(path):
                raise OSError(f"{path} reads back damaged ({fault})")
            self._prune()

        self._pending.append(self._writer.submit(job))

    def save_model(self, path: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, about: dict) -> None:
        """Write model and tokenizer alone, in the background, as a folder that transformers loads; replaces `path`."""
        self._wait_for_all_but(1)
        weights = snapshot(model)

        def write(folder: Path) -> None:
            model.save_pretrained(folder, state_dict=weights)
            tokenizer.save_pretrained(folder)
            write_json(folder / "about.json", about)

        self._pending.append(self._writer.submit(_write_folder, path, write))

    def wait(self) -> None:
        """Return once nothing is being written.

        Raises: RuntimeError if a write failed; what was there before is untouched.
        """
        self._wait_for_all_but(0)

    def _wait_for_all_but(self, number: int) -> None:
        while len(self._pending) > number:
            try:
                self._pending.popleft().result()
            except (OSError, safetensors.SafetensorError) as error:
                raise RuntimeError(
                    f"could not write to {self.folder.parent} ({error}): make room or mend the disk, then run the same"
                    " command again; it goes on from the newest good checkpoint"
                ) from error

    def failed(self) -> bool:
        """Whether a background write has failed since; `wait` then raises."""
        return any(write.done() and write.exception() is not None for write in self._pending)

    def paths(self) -> list[Path]:
        """Every checkpoint under its final name, oldest first, good or not."""
        return sorted(path for path in self.folder.glob("step_*") if path.name[5:].isdigit())

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
            if int(path.name[5:]) > step:
                _set_aside(path, "damaged" if damage(path) else "left")

    def _prune(self) -> None:
        """Remove all but the newest `keep`; the newest was read back whole a moment ago, so a good one always stays."""
        for path in self.paths()[: -self.keep]:
            shutil.rmtree(path)


def snapshot(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A copy of the weights in CPU memory that later updates do not touch."""
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in model.state_dict().items()}


def _moments(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    return {
        f"{name}/{moment}": value.detach().to("cpu", copy=True)
        for name, parameter in model.named_parameters()
        for moment, value in optimizer.state.get(parameter, {}).items()
    }


def _write_folder(path: Path, write: Callable[[Path], None]) -> None:
    with whole_folder(path) as folder:
        write(folder)
        files = {file.name: {"size": file.stat().st_size, "sha256": sha256(file)} for file in sorted(folder.iterdir())}
        write_json(folder / "manifest.json", {"format": FORMAT, "files": files})


def _set_aside(path: Path, why: str) -> None:
    """Rename a checkpoint so that it is no longer taken for one, and nothing is lost."""
    number = 1
    while (aside := path.with_name(f"{path.name}.{why}_{number}")).exists():
        number += 1
    path.rename(aside)


def damage(path: Path) -> str | None:
    """What is wrong with the files of one checkpoint, or None if they are as they were written."""
    try:
        manifest = read_json(path / "manifest.json", "the training script")
        if manifest["format"] != FORMAT:
            return f"format {manifest['format']!r}, this version reads {FORMAT!r}"
        for name, expected in manifest["files"].items():
            file = path / name
            if not file.is_file():
                return f"{name} is missing"
            if (size := file.stat().st_size) != expected["size"]:
                return f"{name} has {size} bytes, {expected['size']} were written"
            if sha256(file) != expected["sha256"]:
                return f"{name} has changed: its SHA-256 is not the one written"
    except (OSError, ValueError) as error:
        return str(error)
    except (KeyError, TypeError, AttributeError) as error:
        return f"manifest.json is not one ({error!r})"
    return None


def load_checkpoint(path: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Put weights and moments back, bit for bit, and return state.json. The caller has made sure that `path` is good."""
    model.load_state_dict(load_model(path).state_dict())  # transformers renames weights on disk, and knows how to undo it
    moments = safetensors.torch.load_file(path / "optimizer.safetensors")
    optimizer.state.clear()
    for name, parameter in model.named_parameters():
        prefix = f"{name}/"
        own = {key.removeprefix(prefix): value for key, value in moments.items() if key.startswith(prefix)}
        if own:
            optimizer.state[parameter] = {
                moment: value if value.ndim == 0 and not _on_device(optimizer) else value.to(parameter.device)
                for moment, value in own.items()
            }
    return read_json(path / "state.json", "the training script")


def _on_device(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the optimizer counts its steps on the device, as fused and capturable ones do."""
    return any(group.get("fused") or group.get("capturable") for group in optimizer.param_groups)
