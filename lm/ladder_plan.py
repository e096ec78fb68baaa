"""The plan of a ladder: every recipe at every size with every seed, each trained as DataDecide trains that size.

A recipe is a pack (build_pretrain.py) in a folder of them; its name is the folder's. LADDER/<recipe>/<size>/seed<k> is the run
folder of a cell. Sizes are rungs ("4M" is the preset olmo-4m) or other presets by their names.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lm.args import check
from lm.estimate import Memory, Setup
from lm.models import non_embedding_parameters, num_parameters, on_paper
from lm.presets import PRESETS, Olmo, datadecide_settings
from lm.shards import Pack

OLMO_SETTINGS = {  # of every run of DataDecide's ladder: Magnusson et al., arXiv 2504.11393, appendix, and scripts/ladder.py
    "schedule": "cosine",
    "min_lr_ratio": 0.01,
    "weight_decay": 0.05,
    "decay": "all",
    "adam_beta1": 0.9,
    "adam_beta2": 0.95,
    "adam_eps": 1e-8,
    "max_grad_norm": 1.0,
}


@dataclass(frozen=True)
class Cell:
    """One run of a ladder, before it is made."""

    recipe: str
    size: str
    seed: int
    pack: Path
    folder: Path
    model: str
    parameters: int  # all but the input embedding, as DataDecide counts
    all_parameters: int
    lr: float
    batch: int
    warmup_steps: int
    steps: int
    seq_len: int
    vocab_rows: int

    @property
    def name(self) -> str:
        return f"{self.recipe}/{self.size}/seed{self.seed}"

    @property
    def tokens(self) -> int:
        return self.steps * self.batch * self.seq_len

    @property
    def flops(self) -> float:
        """Of training: 6 N D (Kaplan et al., arXiv 2001.08361), as DataDecide reckons."""
        return 6.0 * self.parameters * self.tokens

    def hours(self, peak_tflops: float, mfu: float) -> float:
        """Hours of one device that reaches this share of so many teraflops per second."""
        return self.flops / (peak_tflops * 1e12 * mfu) / 3600

    def memory(self, setup: Setup) -> float:
        """Bytes on a device, as estimated for this setup."""
        found = Memory(on_paper(self.model, self.vocab_rows, self.seq_len).config, setup)
        return sum(found.needs(found.activations(setup.micro_batch, setup.accumulates)).device.values())

    def settings(self) -> dict[str, object]:
        """The arguments of pretrain.py that make this cell."""
        own = {"c4_dir": self.pack, "output_dir": self.folder, "model": self.model, "seed": self.seed, "lr": self.lr}
        own |= {"effective_batch": self.batch, "warmup_steps": self.warmup_steps, "total_steps": self.steps}
        return own | OLMO_SETTINGS | {"pptrain_checkpoint": "none", "shuffle": True}


def find_recipes(folder: Path, names: Sequence[str] = ()) -> dict[str, Pack]:
    """The packs in a folder by name, these or all.

    Raises: FileNotFoundError if there are none; ValueError unless they are finished and of one tokenizer and block length.
    """
    found = (path.parent for name in ("meta.json", "progress.json") for path in folder.glob(f"*/{name}"))
    there = sorted(found, key=lambda path: path.name)
    packs = {path.name: Pack(path) for path in there if not names or path.name in names}
    if unfinished := [name for name, pack in packs.items() if not pack.finished]:
        raise ValueError(f"{', '.join(unfinished)} in {folder} are not packed to the end: wait, or name the others with --only")
    if missing := [name for name in names if name not in packs]:
        found = ", ".join(path.name for path in there) or "none"
        raise FileNotFoundError(f"no recipe {', '.join(missing)} in {folder} (found: {found}): make it with build_pretrain.py")
    if not packs:
        raise FileNotFoundError(
            f"no packs in {folder}: make some with build_pretrain.py --output_dir {folder}/NAME, or let it finish"
        )
    kinds = {}
    for name, pack in packs.items():
        header = pack.header
        kinds[name] = header["tokenizer"]["fingerprint"][:12], header["vocab_size"], pack.seq_len
    if len(set(kinds.values())) > 1:
        listed = "; ".join(f"{name}: tokenizer {t}, {v} ids, blocks of {s}" for name, (t, v, s) in kinds.items())
        raise ValueError(f"the recipes in {folder} are not of one tokenizer and block length ({listed}): pack them alike")
    return packs


def model_of(size: str) -> str:
    """The preset of a size: of 4M olmo-4m. Raises: ValueError if there is none."""
    for name in (f"olmo-{size.lower()}", size):
        if name in PRESETS:
            return name
    rungs = ", ".join(name.removeprefix("olmo-").upper() for name in PRESETS if name.startswith("olmo-"))
    raise ValueError(f"--sizes {size} is no rung ({rungs}) and no preset of lm/presets.py: pass one of these")


@functools.cache
def count(model: str, vocab_size: int, seq_len: int) -> tuple[int, int, int]:
    """Parameters without the input embedding, all parameters, and rows of the head."""
    built = on_paper(model, vocab_size, seq_len)
    return non_embedding_parameters(built), num_parameters(built), built.config.vocab_size


def make_plan(
    packs: dict[str, Pack],
    sizes: Sequence[str],
    seeds: int,
    folder: Path,
    tokens_per_parameter: float = 100.0,
    tokens: int | None = None,
    batch: int | None = None,
) -> list[Cell]:
    """Every cell, the smallest sizes first, so that a plan that is stopped has whole sizes.

    Args:
        tokens_per_parameter: length of a run, as DataDecide's "5xC" (5 x 20 tokens); `tokens`: of every run instead.
        batch: rows of a step instead of the formula's.

    Raises: ValueError, all faults together, if a size is unknown or a run shorter than a step.
    """
    faults, cells = [], []
    for size in sizes:
        for name, pack in packs.items():
            for seed in range(seeds):
                try:
                    cells.append(_cell(name, pack, size, seed, folder, tokens_per_parameter, tokens, batch))
                except ValueError as error:
                    faults.append(str(error))
    check(list(dict.fromkeys(faults)))
    return sorted(cells, key=lambda cell: cell.parameters)


def too_short(packs: dict[str, Pack], cells: Sequence[Cell]) -> list[str]:
    """What is missing of each recipe that the longest of its runs would read more than once."""
    faults = []
    for name, pack in packs.items():
        longest = max((cell for cell in cells if cell.recipe == name), key=lambda cell: cell.steps * cell.batch)
        if (needed := longest.steps * longest.batch) > pack.num_blocks:
            faults.append(
                f"{name} at {longest.size} needs {needed:,} blocks, {pack.folder} has {pack.num_blocks:,}: pack more, pass a"
                " lower --tokens_per_parameter, or --allow_epochs to read it more than once"
            )
    return faults


def _cell(
    recipe: str, pack: Pack, size: str, seed: int, folder: Path, per_parameter: float, tokens: int | None, batch: int | None
) -> Cell:
    model = model_of(size)
    parameters, everything, vocab_rows = count(model, pack.header["vocab_size"], pack.seq_len)
    preset = PRESETS[model]
    is_published = isinstance(preset, Olmo) and parameters == preset.parameters
    scaled_from = preset.scaled_from if is_published else parameters
    lr, own_batch, warmup_steps, steps = datadecide_settings(scaled_from, pack.seq_len, per_parameter)
    batch = batch or own_batch
    if batch != own_batch or tokens is not None:
        tokens = per_parameter * scaled_from if tokens is None else tokens
        warmup_steps, steps = (round(count / (batch * pack.seq_len)) for count in (scaled_from, tokens))
    if steps < 1:
        raise ValueError(f"{size} would train for less than a step of {batch} rows: pass more tokens, or a lower --batch")
    return Cell(
        recipe=recipe,
        size=size,
        seed=seed,
        pack=pack.folder,
        folder=folder / recipe / size / f"seed{seed}",
        model=model,
        parameters=parameters,
        all_parameters=everything,
        lr=lr,
        batch=batch,
        warmup_steps=min(warmup_steps, steps // 10),  # of a short run, which would be over before
        steps=steps,
        seq_len=pack.seq_len,
        vocab_rows=vocab_rows,
    )


def by_size(cells: Sequence[Cell]) -> list[list[Cell]]:
    """The cells of each size, in the plan's order."""
    sizes = dict.fromkeys(cell.size for cell in cells)
    return [[cell for cell in cells if cell.size == size] for size in sizes]


def rows_of_plan(cells: Sequence[Cell], peak_tflops: float, mfu: float) -> list[list[str]]:
    """The plan as cells of a table, a line for each size and one for all."""
    rows = [["size", "runs", "parameters", "lr", "batch", "warmup", "steps", "tokens", "FLOPs", "hours", "hours of all"]]
    for group in by_size(cells):
        one, hours = group[0], group[0].hours(peak_tflops, mfu)
        settings = [f"{one.lr:.3g}", str(one.batch), str(one.warmup_steps), f"{one.steps:,}", f"{one.tokens:,}"]
        costs = [f"{one.flops:.3g}", f"{hours:.3g}", f"{hours * len(group):.3g}"]
        rows.append([one.size, str(len(group)), f"{one.parameters:,}", *settings, *costs])
    tokens, flops = sum(cell.tokens for cell in cells), math.fsum(cell.flops for cell in cells)
    hours = math.fsum(cell.hours(peak_tflops, mfu) for cell in cells)
    return [*rows, ["all", str(len(cells)), *[""] * 5, f"{tokens:,}", f"{flops:.3g}", "", f"{hours:.3g}"]]
