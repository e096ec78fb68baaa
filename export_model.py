"""A trained model as a folder that transformers, lm-eval and others load anywhere: safetensors, tokenizer, and its card.

    python export_model.py S/pretrain --output_dir exported                      # a run's final model
    python export_model.py S/pretrain --checkpoint latest --output_dir exported --dtype bfloat16       # also written in parts

Reads   RUN/final, or RUN/checkpoints/step_* (whole, or in parts as --fsdp writes them), or a folder with a model
Writes  OUTPUT_DIR/{config.json, *.safetensors, tokenizer*, generation_config.json, README.md, manifest.json}, whole or not at
        all, and the Python file of a model class that transformers does not have
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from lm.args import check, parse
from lm.checkpoint import write_folder
from lm.models import load_model, num_parameters
from lm.tokenizer import load_tokenizer, save_tokenizer
from lm.trained import find_model, find_tokenizer, step_of

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PROBE = "The quick brown fox jumps over the lazy dog."


@dataclass(frozen=True, kw_only=True)
class Args:
    model: tyro.conf.Positional[str]
    """A run folder, or a folder that transformers loads."""
    output_dir: Path
    """Folder to be made; it must not exist."""
    checkpoint: str = "final"
    """Of a run: final, best, latest, or step_00000200."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of the weights as they are written."""
    max_shard_size: str = "5GB"
    """Largest file of weights."""


def card(args: Args, model: PreTrainedModel, step: int | None, run: dict[str, Any] | None) -> str:
    """README.md of the folder: what the model is, and what made it."""
    config = model.config
    facts = {
        "architecture": f"{type(model).__name__}{f' ({config.base})' if hasattr(config, 'base') else ''}",
        "parameters": f"{num_parameters(model):,}",
        "vocabulary": f"{config.vocab_size:,}",
        "context": getattr(config, "max_position_embeddings", None),
        "weights": args.dtype,
        "exported from": f"{args.model}, {args.checkpoint}",
    }
    if step is not None:
        facts["optimizer steps"] = f"{step:,}"
    if run is not None:
        facts |= {"commit": run.get("commit"), "command": f"`{run['command']}`", "started": run.get("started")}
    own = ", trust_remote_code=True" if hasattr(config, "auto_map") else ""
    lines = [f"- {name}: {value}" for name, value in facts.items() if value is not None]
    header = ["---", "library_name: transformers", "pipeline_tag: text-generation", "---", f"# {args.output_dir.name}", ""]
    use = ["", "```python", "from transformers import AutoModelForCausalLM, AutoTokenizer", ""]
    use += [f'model = AutoModelForCausalLM.from_pretrained("{args.output_dir.name}"{own})']
    use += [f'tokenizer = AutoTokenizer.from_pretrained("{args.output_dir.name}")', "```", ""]
    return "\n".join(header + lines + use)


@torch.no_grad()
def check_same(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    """Raise RuntimeError unless the folder's model gives the logits of this one, bit for bit."""
    ids = torch.tensor([tokenizer(PROBE).input_ids or [0]])
    again = AutoModelForCausalLM.from_pretrained(folder, dtype=model.dtype, trust_remote_code=False)
    if not torch.equal(again(ids).logits, model(ids).logits):
        raise RuntimeError(f"{folder} does not load as what was written: report it with the versions of torch and transformers")


def main(args: Args) -> None:
    source, name, run = find_model(args.model, args.checkpoint)
    faults = []
    if args.output_dir.exists():
        faults.append(f"{args.output_dir} exists, a new folder is needed: pass another --output_dir, or move it away")
    tokenizer_from = find_tokenizer(source, run["args"] if run else {})
    if tokenizer_from is None:
        faults.append(f"no tokenizer.json beside {source}: put the tokenizer of the model there")
    check(faults)
    tokenizer, model = load_tokenizer(tokenizer_from), load_model(source).eval()
    if len(tokenizer) > model.config.vocab_size:
        found = f"{tokenizer_from} has {len(tokenizer)} ids, {source} a vocabulary of {model.config.vocab_size}"
        raise ValueError(f"{found}: put the tokenizer that the model was trained with beside it")
    for parameter in model.parameters():  # buffers, such as rotary frequencies, stay as from_pretrained makes them
        parameter.data = parameter.data.to(DTYPES[args.dtype])

    def write(folder: Path) -> None:
        model.save_pretrained(folder, max_shard_size=args.max_shard_size)
        save_tokenizer(tokenizer, folder)
        (folder / "README.md").write_text(card(args, model, step_of(Path(source)), run), encoding="utf-8")
        check_same(folder, model, tokenizer)

    write_folder(args.output_dir, write)
    size = sum(path.stat().st_size for path in args.output_dir.iterdir())
    about = {"from": source, "checkpoint": name, "parameters": num_parameters(model), "dtype": args.dtype, "bytes": size}
    print(f"{args.output_dir}: {json.dumps(about)}")


if __name__ == "__main__":
    main(parse(Args))
