"""What fails around a run: a full disk, S3, SLURM's nodes."""

import contextlib
import itertools
import json
import os
import random
import shutil
import subprocess
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from damage import flipped
from launch import ROOT, Launch, arguments
from s3_proxy import CuttingProxy
from slurm import Cluster, wait_until
from text import documents
from world import SCRIPTS, TRAINERS, Detail, World, check_checkpoints, check_same, content_of, count_steps, until

# A full disk


@contextlib.contextmanager
def small_disk(folder: Path, megabytes: float) -> Iterator[Path]:
    """A disk of this size."""
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={int(megabytes * 1024)}k", "tmpfs", folder], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def can_mount(folder: Path) -> bool:
    """Whether this user may mount a small disk."""
    with contextlib.suppress(subprocess.CalledProcessError, FileNotFoundError), small_disk(folder / "probe", 1):
        return True
    return False


def disk_full(world: World, rng: random.Random, folder: Path, trainer: str = "", filled: bool | None = None) -> Detail:
    """The disk of a run is full from the beginning or from a random moment on: a clear error, and room is all it needs."""
    trainer = trainer or rng.choice(TRAINERS)
    expected = world.undisturbed(trainer)
    filled = rng.random() < 0.5 if filled is None else filled
    size = 64 if filled else 2 ** rng.uniform(-7, 2.6)  # 8 kB to 6 MB
    with small_disk(folder / "disk", size) as disk:
        run = disk / "run"
        launch = Launch(SCRIPTS[trainer], world.options(trainer) | {"output_dir": run}, folder / "out")
        if filled:
            at = rng.randint(0, expected.result["ledger"].count("\n") - 8)
            until(lambda: count_steps(run) >= at or launch.ended(), 60)
            fill(disk / "filler")
        code, said = launch.wait()[0], launch.said()
        check_checkpoints(run)
        if code != 0:
            assert code == 1, said
            assert "make room" in said, said
        failed_at = count_steps(run)
        (disk / "filler").unlink(missing_ok=True)
        subprocess.run(["mount", "-o", "remount,size=128m", disk], check=True)
        launch = Launch(SCRIPTS[trainer], world.options(trainer) | {"output_dir": run}, folder / "out")
        assert launch.wait() == [0], launch.said()
        check_same(run, expected.result)
    return {"trainer": trainer, "filled": filled, "megabytes": round(size, 2), "failed": code != 0, "steps_before": failed_at}


def fill(path: Path) -> None:
    """Take all the room there is."""
    with contextlib.suppress(OSError), open(path, "wb") as file:
        for size in (1 << 20, 1 << 12):
            with contextlib.suppress(OSError):
                for _ in itertools.count():
                    file.write(b"\1" * size)
                    file.flush()


def packing_disk_full(world: World, rng: random.Random, folder: Path) -> Detail:
    """The disk of a pack is full somewhere on the way: a clear error, what is published is whole, and room is all it needs."""
    size = rng.uniform(0.02, 0.5)
    with small_disk(folder / "disk", size) as disk:
        launch = start_packing(world, disk / "pack", folder / "out")
        code, said = launch.wait()[0], launch.said()
        if code != 0:
            assert code == 1, said
            assert "disk is full" in said, said
        subprocess.run(["mount", "-o", "remount,size=64m", disk], check=True)
        launch = start_packing(world, disk / "pack", folder / "out")
        assert launch.wait() == [0], launch.said()
        assert shards_of(disk / "pack") == shards_of(packed(world))
    return {"megabytes": round(size, 3), "failed": code != 0}


def start_packing(world: World, folder: Path, out: Path) -> Launch:
    """build_pretrain.py on a few hundred real documents, in shards of about 100 kB."""
    if not (world.folder / "documents.jsonl").exists():
        lines = [json.dumps({"text": document}) + "\n" for document in documents()]
        (world.folder / "documents.jsonl").write_text("".join(lines))
    options = {"scratch_dir": world.folder, "documents": world.folder / "documents.jsonl", "seq_len": 192, "num_workers": 1}
    options |= {"tokenizer": world.folder / "tokenizer", "held_out_blocks": 8, "blocks_per_shard": 256}
    return Launch("build_pretrain.py", options | {"output_dir": folder}, out)


def packed(world: World) -> Path:
    """The same pack, undisturbed."""
    folder = world.folder / "packed"
    if not (folder / "meta.json").exists():
        launch = start_packing(world, folder, world.folder / "packed.out")
        assert launch.wait() == [0], launch.said()
    return folder


def shards_of(pack: Path) -> dict[str, bytes]:
    """The bytes of a finished pack."""
    return {path.name: path.read_bytes() for path in [*sorted(pack.glob("*.bin")), pack / "meta.json"]}


# S3


S3_FAULTS = ("cut once", "cut always", "server gone", "altered bytes")


def s3_fault(world: World, rng: random.Random, folder: Path, client: Any, fault: str) -> Detail:
    """A connection cut once or always, a server gone, altered bytes: tried again, then said; no part taken for the whole."""
    store, bucket = stored_papers(world), f"trial-{uuid.uuid4().hex[:12]}"
    client.create_bucket(Bucket=bucket)
    server = os.environ["AWS_ENDPOINT_URL"]
    direction = "down" if fault == "altered bytes" else rng.choice(("up", "down"))
    if direction == "down":
        code, said = transfer(world, folder / "sent", bucket, folder / "out", server, upload_to_s3=True)
        assert code == 0, said
    if fault == "altered bytes":
        name = {"Bucket": bucket, "Key": "preprocessed_arxiv/tokens.bin"}
        stored = client.get_object(**name)
        content = flipped(stored["Body"].read(), rng.randrange(stored["ContentLength"]))
        client.put_object(**name, Body=content, Metadata=stored["Metadata"])
    limit = rng.randrange(1 << 16, 6 << 20)  # bytes of a connection; a part has 8 MB
    cuts = {"cut once": 1, "cut always": 10**9}.get(fault, 0)
    proxy = CuttingProxy(server, limit, cuts)
    if fault == "server gone":
        proxy.socket.close()
    changes = {"upload_to_s3": True} if direction == "up" else {"download_from_s3": True}
    target = folder / ("sent" if direction == "up" else "taken")
    code, said = transfer(world, target, bucket, folder / "out", proxy.url, **changes)
    proxy.socket.close()
    names = {entry["Key"] for entry in client.list_objects_v2(Bucket=bucket).get("Contents", [])}
    if fault == "cut once":
        assert code == 0, said
        assert proxy.made == 1, "nothing was cut"
    elif direction == "up":
        assert code == 1, said
        assert "check the network" in said, said
        assert "preprocessed_arxiv/meta.json" not in names, "an upload that failed looks finished"
    else:  # it says why, and makes the store here
        assert code == 0, said
        assert "nothing taken from S3, making it here" in said, said
        assert ("SHA-256" if fault == "altered bytes" else "check the network") in said, said
    if direction == "down" or fault == "cut once":
        assert content_of(target) == content_of(store)
    if direction == "up" and fault == "cut once":
        for path in store.rglob("*"):
            if path.is_file():
                key = f"preprocessed_arxiv/{path.relative_to(store)}"
                assert client.get_object(Bucket=bucket, Key=key)["Body"].read() == path.read_bytes()
    for key in names:
        client.delete_object(Bucket=bucket, Key=key)
    return {"kind": fault, "direction": direction, "limit": limit, "cuts": proxy.made}


def stored_papers(world: World) -> Path:
    """A paper store that S3 takes in several parts, made by fetch_arxiv.py."""
    folder = world.folder / "stored"
    if not (folder / "meta.json").exists():
        source = world.folder / "labelled"
        source.mkdir()
        texts = documents()
        for split, count in {"train": 24, "validation": 4, "test": 4}.items():
            rows = [{"text": " ".join(texts[i :: count // 2]) * 12, "label": i % 2} for i in range(count)]
            (source / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        launch = fetch(world, folder, world.folder / "stored.out")
        assert launch.wait() == [0], launch.said()
    return folder


def fetch(world: World, folder: Path, out: Path, **changes: Any) -> Launch:
    options = {"tokenizer": world.folder / "tokenizer", "full_dataset": True, "output_dir": folder} | changes
    return Launch("fetch_arxiv.py", {"dataset": world.folder / "labelled"} | options, out)


def transfer(world: World, folder: Path, bucket: str, out: Path, url: str, **changes: Any) -> tuple[int, str]:
    """Run fetch_arxiv.py with S3 at this address; an upload is of the finished store."""
    if "upload_to_s3" in changes and not folder.exists():
        shutil.copytree(stored_papers(world), folder)
    out.unlink(missing_ok=True)
    launch = fetch(world, folder, out, s3_bucket=bucket, environment={"AWS_ENDPOINT_URL": url}, **changes)
    return launch.wait(timeout=180)[0], launch.said()


# SLURM


SLURM_FAULTS = ("USR1 before the limit", "scontrol requeue", "node killed")


def requeued(world: World, rng: random.Random, folder: Path, cluster: Cluster, fault: str) -> Detail:
    """A job told that its time is up, put back by hand, or killed outright with its node, ends as if nothing had been."""
    trainer = rng.choice(("pptrain", "pretrain", "fsdp"))
    folder.mkdir(parents=True)
    run = folder / "run"
    options = arguments(**world.options(trainer) | {"output_dir": run})
    sbatch = ["sbatch", "--parsable", f"--output={folder}/%j.out", "--cpus-per-task=1", "--nodes=2", "--gres=gpu:1"]
    expected = world.undisturbed(trainer, 2)
    job = cluster.ask(*sbatch, ROOT / "scripts" / SCRIPTS[trainer].replace(".py", "_job.sh"), *options)

    def said() -> str:
        return "".join(path.read_text() for path in folder.glob("*.out"))

    at = rng.randint(3, 20)
    wait_until(lambda: count_steps(run) >= at, 90, said)
    node = cluster.job(job)["BatchHost"]
    if fault == "USR1 before the limit":
        cluster.ask("scancel", "--signal=USR1", "--batch", job)
    elif fault == "scontrol requeue":
        cluster.ask("scontrol", "requeue", job)
    else:
        cluster.fail_node(node)
    try:
        wait_until(lambda: cluster.job(job)["JobState"] in ("COMPLETED", "FAILED"), 180, said)
    finally:
        if fault == "node killed":
            cluster.start_node(node)
    found = cluster.job(job)
    assert (found["JobState"], found["Restarts"]) == ("COMPLETED", "1"), said()
    check_same(run, expected.result)
    return {"trainer": trainer, "kind": fault, "at": at}
