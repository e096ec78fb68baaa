"""Fixtures that several test files share. Nothing here reaches beyond 127.0.0.1."""

import contextlib
import fcntl
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis.configuration import set_hypothesis_home_dir

set_hypothesis_home_dir(Path(__file__).parents[1] / ".cache/hypothesis")
os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false", WANDB_MODE="offline")
os.environ.setdefault("OMP_NUM_THREADS", "1")
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell has its background jobs ignore it, and so their children do


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first, so that no worker is alone with one of them in the end."""
    names = "scripts faults slurm train fsdp clean_corpus sft pptrain pretrain ledger ladder"
    longest = [f"test_{name}.py" for name in names.split()]
    items.sort(key=lambda item: longest.index(item.path.name) if item.path.name in longest else len(longest))


def pytest_unconfigure() -> None:
    """A failed test may still hold loaders."""
    if "lm.run" in sys.modules:  # and with it torch, which takes seconds to import
        sys.modules["lm.run"].kill_loaders()


def free_port() -> int:
    """A port that nothing listens on, and 10,000 above it neither (SeaweedFS puts its gRPC there)."""
    while True:
        port = random.randrange(20_000, 50_000)
        with socket.socket() as first, socket.socket() as second:
            try:
                first.bind(("127.0.0.1", port))
                second.bind(("127.0.0.1", port + 10_000))
                return port
            except OSError:
                continue


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory):
    """The environment variables with which boto3 finds a real S3 server (SeaweedFS), started once per test process."""
    with start_s3_server(tmp_path_factory.mktemp("s3")) as environment:
        yield environment


@contextlib.contextmanager
def start_s3_server(folder: Path) -> Iterator[dict[str, str]]:
    """A real S3 server that keeps its files in `folder`, and the environment variables with which boto3 finds it."""
    access, secret = (uuid.uuid4().hex for _ in range(2))
    for attempt in range(3):  # another process may take a port between our look and the server's start
        ports = {name: free_port() for name in ("master", "volume", "filer", "s3")}
        environment = {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{ports['s3']}",
            "AWS_ACCESS_KEY_ID": access,
            "AWS_SECRET_ACCESS_KEY": secret,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_MAX_ATTEMPTS": "3",
        }
        place = folder / str(attempt)
        place.mkdir(parents=True)
        server = start_s3(place, ports, access, secret)
        try:
            if s3_answers(environment, server):
                yield environment
                return
        finally:
            server.kill()
            server.wait()
            for port in (offset + port for port in ports.values() for offset in (0, 10_000)):
                for leftover in Path("/tmp").glob(f"seaweedfs-*-{port}.sock"):
                    leftover.unlink()
    raise RuntimeError(f"the S3 server did not start: {(place / 'log').read_text()[-2000:]}")


def start_s3(folder: Path, ports: dict[str, int], access: str, secret: str) -> subprocess.Popen:
    user = {"name": "tests", "credentials": [{"accessKey": access, "secretKey": secret}]}
    config = {"identities": [user | {"actions": ["Admin", "Read", "Write", "List", "Tagging"]}]}
    (folder / "s3.json").write_text(json.dumps(config))
    command = [Path(sys.executable).with_name("weed"), "server", f"-dir={folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1"]
    command += [f"-{name}.port={port}" for name, port in ports.items()] + ["-volume.max=0", "-filer", "-s3"]
    command += ["-s3.port.iceberg=0", "-s3.port.lance=0"]  # else on fixed ports, where only one server can be
    command += [f"-s3.config={folder / 's3.json'}", "-master.volumeSizeLimitMB=64"]
    with open(folder / "log", "w") as log:
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)


def s3_answers(environment: dict[str, str], server: subprocess.Popen) -> bool:
    """Wait until a bucket can be made and written; False if the server has died or takes a minute."""
    import boto3

    client = boto3.client(
        "s3",
        endpoint_url=environment["AWS_ENDPOINT_URL"],
        aws_access_key_id=environment["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=environment["AWS_SECRET_ACCESS_KEY"],
        region_name="us-east-1",
    )
    deadline = time.monotonic() + 60
    while server.poll() is None and time.monotonic() < deadline:
        try:
            client.create_bucket(Bucket="ready")
            client.put_object(Bucket="ready", Key="x", Body=b"x")
            return True
        except Exception:  # refused, reset or 5xx while it starts
            time.sleep(0.25)
    return False


@pytest.fixture
def s3(s3_server, monkeypatch):
    """(client, name of a new empty bucket) on the real server; boto3 in this process and in its children finds it."""
    import boto3

    for name, value in s3_server.items():
        monkeypatch.setenv(name, value)
    client, bucket = boto3.client("s3"), f"tests-{uuid.uuid4().hex[:12]}"
    client.create_bucket(Bucket=bucket)
    return client, bucket


@pytest.fixture(scope="session")
def papers_dir(tmp_path_factory):
    """A small paper store of real English with a real tokenizer; not to be changed."""
    from text import write_store

    return write_store(tmp_path_factory.mktemp("papers") / "store")


@pytest.fixture(scope="session")
def samples() -> Path:
    """The folder that fetch_samples.py makes of real packages, kept between test sessions and shared by their processes."""
    import fetch_samples

    folder = Path(__file__).parents[1] / ".cache/test_samples"
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder.parent / "test_samples.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        fetch_samples.main(fetch_samples.Args(output_dir=folder))
    return folder


@pytest.fixture(scope="session")
def neox_tokenizer_dir(samples) -> Path:
    """The folder of the real GPT-NeoX-20B tokenizer (50,277 ids)."""
    return samples / "tokenizer_neox"
