"""Fine-tune a pretrained model to chat: loss on the assistant's tokens alone, packed conversations, trl's loop.

    python sft.py runs/tiny --data samples/conversations/train.jsonl --output_dir runs/tiny_chat
    accelerate launch --num_processes 8 sft.py runs/psann --data HuggingFaceH4/ultrachat_200k --data_split train_sft \
        --micro_batch 8 --effective_batch 64 --precision bf16 --output_dir runs/psann_chat
    python chat.py runs/tiny_chat                                                # talk to it

A row of the data has "messages": maybe a system message, then user and assistant in turns, {"role", "content"} each. The
tokenizer's chat template (train_tokenizer.py --chat) makes them ids. Row j of step s is conversation s * effective_batch + j of
a shuffled epoch, whatever the number of processes; its place in a row changes nothing for it. A step's loss is the mean over
all tokens that the assistant writes in it, the one that ends its turn included. Run the same command again to go on.

Reads   a run, a model folder or a hub name; JSON Lines (also .gz, .zst), Parquet, or a dataset of the hub
Writes  OUTPUT_DIR/{run.json, events.jsonl, logs/{train,eval,samples}.jsonl, checkpoints/step_*, final/, results.json}
Exits   0 when finished, 75 when stopped by SIGTERM, SIGUSR1 or Ctrl-C with a checkpoint written (see README)
"""

import hashlib
import math
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro
from accelerate import Accelerator
from transformers import GenerationConfig, PreTrainedModel
from transformers.utils import logging
from trl import SFTConfig

from lm.args import below, check, parse
from lm.chat_format import ChatFormat, Example
from lm.checkpoint import Checkpoints, read_fields
from lm.conversations import find_conversations, held_out_beside, read_conversations
from lm.files import read_json, sha256
from lm.micro_batch_size import with_micro_batch
from lm.models import architecture, ensure_positions, load_model, num_parameters
from lm.packing import attention_reach, sees_only_itself
from lm.recovery import find_checkpoint, refuse_another_run
from lm.replies import UNLIMITED, generation_config, reply
from lm.results import loss_and_perplexity, write_results
from lm.run import EXIT_STOPPED, Run, main_decides, open_run, run_and_exit, start_accelerator
from lm.runlog import records
from lm.schedule import ScheduleName
from lm.session import open_checkpoints, say_stopped, write_final
from lm.sft_batches import Collator, as_dataset, order_of, reply_loss
from lm.sft_trainer import ChatTrainer, Course
from lm.sharded_checkpoint import load_any
from lm.step import plan_batch
from lm.tokenizer import fingerprint, load_tokenizer
from lm.trained import find_config, find_model
from lm.trainer_args import LargeModelArgs, MicroBatch, fall_back, lay_out_memory, optimizer_of

HELD_OUT_SHARE = 0.02  # of the conversations, if no file of others is there
SAMPLES = 3  # held-out questions that are answered before and after
SAMPLE_TOKENS = 64


@dataclass(frozen=True, kw_only=True)
class Args(LargeModelArgs):
    """One run of fine-tuning."""

    model: tyro.conf.Positional[str]
    """A run (its final model), a folder that transformers loads, or a hub name; with a chat template."""
    data: str
    """Conversations: a file, a folder or a pattern (JSON Lines, Parquet), or the name of a dataset of the hub."""
    data_split: str = "train"
    """Of a dataset of the hub."""
    eval_data: str | None = None
    """Held-out conversations; by default the file called validation beside a --data file called train, else the last 2 percent
    of --data, which do not train then."""
    skip_bad_rows: bool = False
    """Leave out and count rows that are no conversations; without it the first ones end the run before it begins."""
    seq_len: int | None = None
    """Tokens of a conversation at most: what comes after its last reply that ends within them is cut, turn by turn. By default
    as many as the model has positions for, 2048 at most."""
    epochs: float = 1.0
    """Times that each conversation is trained on, to whole steps, rounded down."""

    micro_batch: MicroBatch = 8
    """Conversations in one forward pass of one process; they are packed, so a pass costs their tokens and no padding. auto: as
    many as fit into the free memory if all are of --seq_len tokens."""
    effective_batch: int | None = None
    """Conversations in one optimizer step over all processes; 32, unless --grad_accum is given."""
    lr: float = 3e-4
    schedule: ScheduleName = "cosine"
    warmup_steps: int | None = None
    """Optimizer steps of linear warm-up; 3 percent of all by default."""
    min_lr_ratio: float = 0.1
    weight_decay: float = 0.0
    adam_beta2: float = 0.999
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Arithmetic of the forward and backward pass (parameters and moments are float32): bf16 on a GPU, else fp32."""
    checkpoint_interval_steps: int = 100

    def faults(self) -> list[str]:
        """Everything that is wrong with the values themselves."""
        found = super().faults() + below(self, 1, "seq_len")
        if not self.epochs > 0:
            found.append(f"--epochs {self.epochs}: more than 0 is needed")
        for name in ("ledger", "profile"):
            if getattr(self, name):
                found.append(f"--{name} is not for sft.py, whose loop is trl's: leave it out")
        if self.schedule == "gpt3":
            found.append("--schedule gpt3 counts tokens, of which a step of conversations has no fixed number: pass another")
        return found


# What may change between a run and its continuation; the names of model and data are free, what they stand for is not.
FREE = {"output_dir", "resume_from", "force_cpu", "deterministic", "detect_anomaly", "checkpoint_interval_steps"}
FREE |= {"max_step_checkpoints", "wandb_project", "wandb_run_name", "ledger", "dirty", "profile", "model", "data", "data_split"}
FREE |= {"eval_data", "skip_bad_rows", "micro_batch", "grad_accum", "effective_batch", "grad_checkpoint", "fsdp"}
FREE |= {"cpu_offload", "compile"}


@dataclass(frozen=True)
class Data:
    """Conversations as ids, and what was left out on the way."""

    train: list[Example]
    held_out: list[Example]
    questions: list[list[dict[str, str]]]  # held-out conversations up to their first reply
    facts: dict[str, Any]


def read_data(args: Args, chat: ChatFormat, seq_len: int) -> Data:
    """Read and encode the conversations. Raises: as `read_conversations` does; ValueError if too few fit into `seq_len`."""
    files = find_conversations(args.data, args.data_split)
    rows = read_conversations(files, chat.control.values(), args.skip_bad_rows)
    beside = find_conversations(args.eval_data, args.data_split) if args.eval_data else held_out_beside(args.data)
    if shared := {file.name for file in beside} & {file.name for file in files}:
        raise ValueError(f"{min(shared)} is both --data and held out, others are needed: pass --eval_data, or other --data")
    named = ", ".join(file.name for file in beside[:3])
    facts = {"bad_rows": dict(rows.left_out), "held_out": named or f"the last {HELD_OUT_SHARE:.0%} of {args.data}"}
    if beside:
        others = read_conversations(beside, chat.control.values(), args.skip_bad_rows)
        train, held_out = rows.rows, others.rows
        facts["bad_held_out_rows"] = dict(others.left_out)
    elif len(rows.rows) < 2:
        raise ValueError(f"{args.data} has 1 conversation, of which none is left to be held out: pass more, or --eval_data")
    else:
        count = max(1, round(HELD_OUT_SHARE * len(rows.rows)))
        train, held_out = rows.rows[:-count], rows.rows[-count:]
    encoded = {}
    for name, conversations in (("train", train), ("held_out", held_out)):
        encoded[name], cut = chat.examples(conversations, seq_len)
        facts |= {f"{name}_conversations": len(encoded[name]), f"{name}_too_long": dict(cut)}
        if not encoded[name]:
            raise ValueError(
                f"none of the {len(conversations)} {name} conversations has a reply that ends within --seq_len {seq_len}:"
                " pass a longer one, or other data"
            )
    questions = [messages[: 2 + (messages[0]["role"] == "system")][:-1] for messages in held_out[:SAMPLES]]
    return Data(encoded["train"], encoded["held_out"], questions, facts)


def digest_of(examples: list[Example]) -> str:
    """A SHA-256 of all ids and of what is trained of them."""
    found = hashlib.sha256()
    for example in examples:
        found.update(len(example.ids).to_bytes(8) + example.ids.tobytes() + example.trained.tobytes())
    return found.hexdigest()


def weights_of(source: str) -> Any:
    """What tells whether a model is still the same: the checksums of its weights, or its commit on the hub."""
    files = {path.name: sha256(path) for path in sorted(Path(source).glob("*.safetensors"))}
    return files or find_config(source)._commit_hash


def plan_course(args: Args, data: Data, layout: tuple[int, int], reach: float | None, identity: dict[str, Any]) -> Course:
    """All steps. Raises: ValueError if the conversations do not suffice for one."""
    grad_accum, rows = layout
    total = math.floor(round(args.epochs * len(data.train) / rows, 6))
    if total < 1:
        raise ValueError(
            f"{args.epochs:g} epochs of {len(data.train)} conversations are not one step of {rows}: pass a lower"
            " --effective_batch, more --epochs, or more data"
        )
    if args.warmup_steps is None:
        args = replace(args, warmup_steps=math.ceil(0.03 * total))
    order = order_of(args.seed, len(data.train), 0, total * rows)
    counts = np.array([(len(example.ids), example.trained.sum()) for example in data.train])[order]
    tokens = [(0, 0), *map(tuple, counts.reshape(total, rows, 2).sum(axis=1).cumsum(axis=0).tolist())]
    schedule = args.lr_schedule(total, 1)
    identity = identity | {"effective_batch": rows, "total_steps": total}
    return Course(as_dataset(data.train, order), tokens, grad_accum, total, schedule, Collator(reach), identity)


def identity_of(args: Args, data: Data, chat: ChatFormat, model: PreTrainedModel, source: str, seq_len: int) -> dict[str, Any]:
    """What makes two runs the same run; a checkpoint only continues a run with the same."""
    settings = {name: value for name, value in asdict(args).items() if name not in FREE}
    settings |= {"bf16_parameters": bool(args.fsdp) and args.precision == "bf16"}
    settings |= {"data": digest_of(data.train), "held_out": digest_of(data.held_out), "seq_len": seq_len}
    settings |= {"tokenizer": fingerprint(chat.tokenizer), "chat_template": chat.tokenizer.chat_template}
    return settings | {"architecture": architecture(model), "initial_weights": weights_of(source)}


def refuse_other_folders(folder: Path) -> None:
    """Raise ValueError if the folder is another trainer's run, or holds something else."""
    if (folder / "run.json").is_file():
        script = read_json(folder / "run.json", "sft.py").get("script")
        if script != "sft.py":
            raise ValueError(f"{folder} is a run of {script}, a folder of its own is needed: pass another --output_dir")
    elif folder.is_dir() and (others := sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))):
        raise ValueError(f"{folder} is no run and holds {others[0]}, a folder of its own is needed: pass another --output_dir")


def trl_config(args: Args, course: Course, first_step: int, accelerator: Accelerator) -> SFTConfig:
    """trl's arguments; what is not said here is done by `lm.sft_trainer`."""
    config = SFTConfig(
        output_dir=args.output_dir,
        max_steps=course.total_steps - first_step,
        per_device_train_batch_size=args.micro_batch,
        gradient_accumulation_steps=course.grad_accum,
        train_sampling_strategy="sequential",
        average_tokens_across_devices=True,
        learning_rate=args.lr,
        max_grad_norm=args.max_grad_norm,
        bf16=args.precision == "bf16",
        use_cpu=accelerator.device.type == "cpu",
        activation_checkpointing=False,  # that is done to the model
        accelerator_config={"gradient_accumulation_kwargs": {"sync_each_batch": bool(args.fsdp)}},
        max_length=None,
        seed=args.seed % 2**32,
        ddp_find_unused_parameters=False,
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="no",
        eval_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cache=True,
    )
    config._n_gpu = min(config.n_gpu, 1)  # one process has one GPU; transformers would give it a replica on each
    return config


@dataclass(frozen=True)
class Prepared:
    """All that a run needs, before anything of it is written."""

    args: Args
    accelerator: Accelerator
    source: str
    chat: ChatFormat
    data: Data
    model: PreTrainedModel
    course: Course
    seq_len: int


def prepare(args: Args) -> Prepared:
    """Read the data, then the model. Raises: ValueError or FileNotFoundError for whatever does not fit."""
    check(args.faults())
    args = fall_back(args)
    if args.precision == "auto":
        args = replace(args, precision="bf16" if torch.cuda.is_available() and not args.force_cpu else "fp32")
    accelerator = start_accelerator(args.precision, args.force_cpu, args.cpu_offload)
    refuse_other_folders(Path(args.output_dir))
    source, _, _ = find_model(args.model, "final")
    config = find_config(source)
    chat = ChatFormat(load_tokenizer(source), source)
    if len(chat.tokenizer) > config.vocab_size:
        raise ValueError(
            f"{source} has a vocabulary of {config.vocab_size}, its tokenizer {len(chat.tokenizer)} ids: pretrain with the"
            " tokenizer that has the chat template"
        )
    seq_len = args.seq_len or min(getattr(config, "max_position_embeddings", None) or UNLIMITED, UNLIMITED)
    ensure_positions(config, seq_len, source)
    rows = args.effective_batch or (None if args.grad_accum else 32)
    args = with_micro_batch(args, rows, source, config.vocab_size, seq_len, accelerator, packed=True)
    layout = plan_batch(args.micro_batch, args.grad_accum, rows, accelerator.num_processes)
    data = read_data(args, chat, seq_len)
    model = load_model(source, args.dropout)
    ensure_positions(model.config, seq_len, source)
    reach = attention_reach(model) if sees_only_itself(model) else None
    course = plan_course(args, data, layout, reach, identity_of(args, data, chat, model, source, seq_len))
    ends, pad = chat.stop_ids, chat.tokenizer.pad_token_id  # it generates until the end of a turn
    model.generation_config = GenerationConfig(eos_token_id=ends, pad_token_id=ends[-1] if pad is None else pad)
    lay_out_memory(args, model.train(), accelerator, args.precision)
    return Prepared(args, accelerator, source, chat, data, model, course, seq_len)


def look(ready: Prepared, run: Run, model: PreTrainedModel, step: int) -> None:
    """Measure the held-out loss, and let the model answer some questions."""
    args, data, chat = ready.args, ready.data, ready.chat
    loss = reply_loss(model, data.held_out, ready.course.collator, args.micro_batch, ready.accelerator, args.precision)
    run.log.evaluation(step, loss=loss, perplexity=loss_and_perplexity(loss)["perplexity"], conversations=len(data.held_out))
    if run.log.main or args.fsdp:  # a divided model needs every process in each pass
        new_tokens = min(SAMPLE_TOKENS, ready.seq_len // 2)
        config, texts = generation_config(model, chat, new_tokens, 0.0, 1.0, 0), []
        for question in data.questions:
            ids = chat.prompt(question)[-(ready.seq_len - new_tokens) :]
            answer = reply(model, chat, ids, config, args.precision)
            texts.append(f"user: {question[-1]['content']}\nassistant: {answer}\n")
        run.log.sample(step, prompt="", text="\n".join(texts))


def finish(ready: Prepared, run: Run, checkpoints: Checkpoints) -> bool:
    """Write the final model; False if that was done before."""
    about = {"step": ready.course.total_steps, "tokens": ready.course.tokens[-1][0]}
    return write_final(run, checkpoints, ready.model, ready.chat.tokenizer, about)


def where_to_go_on(ready: Prepared, run: Run, checkpoints: Checkpoints) -> tuple[Path | None, int]:
    """The checkpoint that the run goes on from, and its step; logs and checkpoints after it are cut off.

    Raises: as `find_checkpoint` does; ValueError if it is another run's.
    """
    path, step = find_checkpoint(run, checkpoints, ready.args.resume_from), 0
    if path is not None:
        state = read_fields(path / "state.json", {"step": int, "identity": dict})
        refuse_another_run(path, state["identity"], ready.course.identity)
        step = state["step"]
        if run.accelerator.is_main_process:
            checkpoints.leave_after(step)
    main_decides(run.accelerator, lambda: run.log.cut_back(step))
    run.log.event("resumed" if path else "started", step=step, num_processes=run.accelerator.num_processes, **run.tree.record)
    return path, step


def train(ready: Prepared, run: Run, checkpoints: Checkpoints) -> int:
    """Train the steps that are left; returns 0, or EXIT_STOPPED if a signal asked to stop."""
    path, first_step = where_to_go_on(ready, run, checkpoints)
    if first_step == ready.course.total_steps:
        load_any(path, ready.model, optimizer_of(ready.args, ready.model))
        if not (run.folder / "logs/eval.jsonl").exists():  # of another run's checkpoint
            look(ready, run, ready.model if ready.args.fsdp else ready.model.to(run.accelerator.device), first_step)
        return 0
    config = trl_config(ready.args, ready.course, first_step, run.accelerator)
    trainer = ChatTrainer(
        ready.args, config, ready.course, run, ready.model, ready.chat.tokenizer, checkpoints, (path, first_step),
        lambda model, step: look(ready, run, model, step),
    )  # fmt: skip
    trainer.train()
    if trainer.stopped:
        say_stopped(run, checkpoints, trainer.step, trainer.stopped)
    return EXIT_STOPPED if trainer.stopped else 0


def main(args: Args) -> int:
    """Fine-tune one run and return its exit code."""
    begun = time.monotonic()
    logging.set_verbosity_error()  # transformers tells of tokens that it makes the same in tokenizer and model
    ready = prepare(args)
    args, course = ready.args, ready.course
    derived = {
        "effective_batch": course.identity["effective_batch"],
        "micro_batch": args.micro_batch,
        "grad_accum": course.grad_accum,
        "seq_len": ready.seq_len,
        "total_steps": course.total_steps,
        "tokens": course.tokens[-1][0],
        "assistant_tokens": course.tokens[-1][1],
        "packed": course.collator.reach is not None,
        "model": ready.source,
        "num_parameters": num_parameters(ready.model),
        **ready.data.facts,
    }
    with open_run(args, derived, ready.accelerator) as run:
        run.log.say("  ".join(f"{key} {value}" for key, value in derived.items()))
        if course.collator.reach is None:
            run.log.say("the model would mix conversations that share a row: each gets a row of its own")
        checkpoints = open_checkpoints(run, ready.model, args.max_step_checkpoints)
        code = train(ready, run, checkpoints)
        if code == 0:
            written = finish(ready, run, checkpoints)
            if run.accelerator.is_main_process and (written or not (run.folder / "results.json").is_file()):
                measured = [loss_and_perplexity(row["loss"]) for row in records(run.folder, "eval")]
                write_results(run, {"step": course.total_steps, "before": measured[0], "after": measured[-1]}, begun)
        run.close()
    return code


if __name__ == "__main__":
    run_and_exit(main, parse(Args))
