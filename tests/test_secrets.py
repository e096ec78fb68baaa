"""Nothing that is loaded runs code, and nothing that a run leaves holds a secret of its environment."""

import ast
import html
import http.server
import json
import os
import pickle
import subprocess
import sys
import threading
import traceback
from pathlib import Path

import botocore.exceptions
import pytest
import torch
from training import ROOT, TINY, flags

from evaluate_model import weights_digest
from lm.models import build_model, load_model
from lm.s3 import S3Error, S3Folder
from lm.tokenizer import load_tokenizer
from lm.trained import find_config

SECRETS = {
    "AWS_ACCESS_KEY_ID": "AKIA" + "Q7Zx" * 4,
    "AWS_SECRET_ACCESS_KEY": "aws0Secret1" * 4,
    "AWS_SESSION_TOKEN": "session2Token" * 4,
    "WANDB_API_KEY": "3badc0de" * 5,
    "HF_TOKEN": "hf_4Token5" * 4,
}
CODE = """
from pathlib import Path
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast
Path({mark!r}).touch()
class Config(GPTNeoXConfig):
    model_type = "own"
class Model(GPTNeoXForCausalLM):
    config_class = Config
class Tokenizer(PreTrainedTokenizerFast):
    pass
"""


class Marking:
    """Unpickled, it leaves a file."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return open, (str(self.mark), "w")


@pytest.fixture
def mark(tmp_path) -> Path:
    return tmp_path / "mark"


@pytest.fixture
def own_code(tmp_path, mark, neox_tokenizer_dir):
    """A function that makes a good model folder which also brings code, under this model_type."""

    def make(model_type: str) -> Path:
        folder = tmp_path / "model"
        build_model("neox-64x2", 50_277, 16).save_pretrained(folder)
        load_tokenizer(neox_tokenizer_dir).save_pretrained(folder)
        (folder / "own.py").write_text(CODE.format(mark=str(mark)))
        config = json.loads((folder / "config.json").read_text())
        auto_map = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
        (folder / "config.json").write_text(json.dumps(config | {"model_type": model_type, "auto_map": auto_map}))
        about = json.loads((folder / "tokenizer_config.json").read_text())
        about |= {"auto_map": {"AutoTokenizer": [None, "own.Tokenizer"]}, "tokenizer_class": "Tokenizer"}
        (folder / "tokenizer_config.json").write_text(json.dumps(about))
        return folder

    return make


@pytest.fixture
def willing(monkeypatch):
    """Somebody who answers yes to everything that is asked on the terminal; the list of what was asked."""
    asked = []

    def answer(question=""):
        asked.append(question)
        return "y"

    monkeypatch.setattr("builtins.input", answer)
    return asked


def test_a_folder_that_brings_its_own_kind_of_model_is_refused_unasked(own_code, mark, willing):
    folder = str(own_code("own"))
    for load, error in [
        (load_model, ValueError),
        (lambda name: build_model(name, 300, 16), ValueError),
        (find_config, FileNotFoundError),
    ]:
        with pytest.raises(error, match="custom code which must be executed"):
            load(folder)
    assert not mark.exists()
    assert willing == []


def test_code_beside_a_known_kind_of_model_is_not_run(own_code, mark, willing):
    folder = own_code("gpt_neox")
    names = [
        type(load_model(folder)).__name__,
        type(build_model(str(folder), 300, 16)).__name__,
        type(find_config(str(folder))).__name__,
    ]
    assert names == ["GPTNeoXForCausalLM", "GPTNeoXForCausalLM", "GPTNeoXConfig"]
    assert len(load_tokenizer(folder)) == 50_277
    assert not mark.exists()
    assert willing == []


def test_a_model_on_the_hub_has_no_say_either(own_code, mark, willing, monkeypatch):
    seen = {}

    def note(*_, **options):
        seen.update(options)
        raise OSError("no network")

    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", note)
    with pytest.raises(OSError, match="no network"):
        weights_digest("somebody/model")
    assert seen == {"trust_remote_code": False}


@pytest.mark.parametrize("kind", ["plain", "torch", "old torch"])
@pytest.mark.parametrize("beside", [True, False])
def test_a_pickle_is_never_opened(kind, beside, tmp_path, mark):
    model = build_model("neox-64x2", 50, 16)
    model.save_pretrained(tmp_path)
    content = {name: Marking(mark) for name in model.state_dict()}
    if kind == "plain":
        (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(content))
    else:
        torch.save(content, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=kind == "torch")
    if beside:
        assert torch.equal(load_model(tmp_path).lm_head.weight, model.lm_head.weight)
    else:
        (tmp_path / "model.safetensors").unlink()
        with pytest.raises(FileNotFoundError, match="pass a folder with config.json and model.safetensors"):
            load_model(tmp_path)
    assert not mark.exists()
    pickle.loads(pickle.dumps(Marking(mark)))
    assert mark.exists(), "it would have left its mark"


def test_nothing_in_the_project_unpickles_or_trusts():
    """Every place that could, by its name; of what loads a model, config or tokenizer, each says that code is not trusted."""
    sources = [*ROOT.glob("*.py"), *ROOT.glob("lm/*.py"), *ROOT.glob("benchmarks/*.py")]
    lines = [(path.name, line.strip()) for path in sources for line in path.read_text().splitlines()]
    assert [
        line for line in lines if any(word in line[1] for word in ("torch.load(", "pickle.load", "allow_pickle=True"))
    ] == []
    nodes = [(path.name, node) for path in sources for node in ast.walk(ast.parse(path.read_text()))]
    said = [(name, node.value) for name, node in nodes if isinstance(node, ast.keyword) and node.arg == "trust_remote_code"]
    assert [name for name, value in said if not (isinstance(value, ast.Constant) and value.value is False)] == []
    loading = [(name, node) for name, node in nodes if isinstance(node, ast.Call) and loads(node.func)]
    assert len(loading) > 8
    silent = [(name, ast.unparse(node)) for name, node in loading if "trust_remote_code" not in {k.arg for k in node.keywords}]
    assert [name for name, _ in silent] == ["models.py"]
    assert "**safe" in silent[0][1], "where it is False"


def loads(function: ast.expr) -> bool:
    return isinstance(function, ast.Attribute) and function.attr in ("from_pretrained", "from_config")


def everything(folder: Path) -> bytes:
    """The names and contents of all files below."""
    return b"\n".join(str(path).encode() + path.read_bytes() for path in folder.rglob("*") if path.is_file())


def leaked(text: bytes) -> list[str]:
    """Names of the secrets that stand in it."""
    return [name for name, value in SECRETS.items() if value.encode() in text]


def test_a_run_leaves_no_secret_in_its_folder_or_output(papers_dir, tmp_path):
    folder = tmp_path / "run"
    settings = TINY | {"token_budget": 288 * 6, "wandb_project": "tests"}
    options = flags(**settings, data_dir=papers_dir, output_dir=folder, force_cpu=True)
    environment = os.environ | SECRETS | {"WANDB_MODE": "offline", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, ROOT / "train.py", *options], env=environment, cwd=tmp_path, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    left = everything(tmp_path)
    assert (folder / "final/model.safetensors").exists()
    assert len(list(folder.glob("wandb/offline-run-*"))) == 1
    assert leaked(left + done.stdout + done.stderr) == []


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({}, b"transfer of s3://b1b broke off (EndpointConnectionError"),
        (
            {"AWS_SESSION_TOKEN": SECRETS["AWS_SESSION_TOKEN"] + "\n"},
            b"S3Error: AWS_SESSION_TOKEN (boto3 has it from: env) begins",
        ),
    ],
)
def test_a_run_that_cannot_reach_its_bucket_says_no_secret(papers_dir, tmp_path, changed, said):
    settings = TINY | {"data_dir": papers_dir, "output_dir": tmp_path / "run", "s3_bucket": "b1b", "upload_results_to_s3": True}
    environment = os.environ | SECRETS | {"AWS_ENDPOINT_URL": "http://127.0.0.1:9", "AWS_MAX_ATTEMPTS": "1"} | changed
    command = [sys.executable, ROOT / "train.py", *flags(**settings, force_cpu=True)]
    done = subprocess.run(command, env=environment | {"PYTHONPATH": str(ROOT)}, cwd=tmp_path, capture_output=True)
    assert done.returncode == 1
    assert said in done.stderr
    assert leaked(everything(tmp_path) + done.stdout + done.stderr) == []


def traceback_of(error: BaseException) -> bytes:
    return "".join(traceback.format_exception(error)).encode()


@pytest.fixture
def no_server(monkeypatch):
    """All secrets in the environment, and an address at which nobody listens."""
    for name, value in (SECRETS | {"AWS_ENDPOINT_URL": "http://127.0.0.1:9", "AWS_MAX_ATTEMPTS": "1"}).items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize("name", ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"])
@pytest.mark.parametrize("form", ["{}\n", " {}", "{}\r\n", "{0}\n{0}", "{}\u2014", "{}\x7f"])
def test_a_credential_that_no_request_can_carry_is_named_by_its_variable(no_server, monkeypatch, name, form):
    monkeypatch.setenv(name, form.format(SECRETS[name]))
    with pytest.raises(
        S3Error, match=rf"^{name} \(boto3 has it from: env\) begins or ends with a blank .*: set it again"
    ) as caught:
        S3Folder("b1b")
    assert leaked(traceback_of(caught.value)) == []


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("AWS_ENDPOINT_URL", "http://user:{}@127.0.0.1:9"),
        ("AWS_ENDPOINT_URL", "http://user:{}/{}@127.0.0.1:9"),
        ("AWS_ENDPOINT_URL", "user:{}@127.0.0.1:9"),
        ("AWS_ENDPOINT_URL", "http://user:{}@127.0.0.1:port"),
        ("HTTP_PROXY", "http://user:{}@127.0.0.1:9"),
        ("HTTP_PROXY", "http://user:{}@["),
        ("AWS_PROFILE", "{}"),
        ("AWS_DEFAULT_REGION", "{} {}"),
        ("AWS_SESSION_TOKEN", "{}\n"),
    ],
)
def test_no_setting_that_fails_is_repeated(no_server, monkeypatch, name, value):
    secret = SECRETS["AWS_SESSION_TOKEN"]
    if name == "HTTP_PROXY":
        monkeypatch.setenv("AWS_ENDPOINT_URL", "http://nobody.invalid:9")
    monkeypatch.setenv(name, value.format(secret, secret))
    with pytest.raises(S3Error) as caught:
        S3Folder("b1b")
    assert leaked(traceback_of(caught.value)) == []


class Repeating(http.server.BaseHTTPRequestHandler):
    """Lets every bucket exist, and answers all else with an error that repeats the request's headers."""

    def do_HEAD(self):
        self.send_response(200)
        self.end_headers()

    def do_GET(self):
        said = html.escape(str(self.headers))
        self.send_response(400)
        self.end_headers()
        self.wfile.write(f"<Error><Code>Bad{said}</Code><Message>{said}</Message></Error>".encode())

    do_PUT = do_GET

    def log_message(self, *_):
        pass


def test_what_a_server_repeats_of_a_request_is_not_repeated(no_server, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("x")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Repeating) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
        remote = S3Folder("b1b")
        for transfer, name in [(lambda: remote.download(tmp_path), "meta.json"), (lambda: remote.upload(tmp_path), "file")]:
            expected = rf"^transfer of s3://b1b/{name} broke off \(ClientError, server 127.0.0.1:{server.server_port}\): check"
            with pytest.raises(S3Error, match=expected) as caught:
                transfer()
            assert leaked(traceback_of(caught.value)) == []
            assert b"Signature=" not in traceback_of(caught.value)
        with pytest.raises(botocore.exceptions.ClientError) as caught:
            remote.client.get_object(Bucket="b1b", Key="meta.json")
        assert leaked(str(caught.value).encode()) == ["AWS_ACCESS_KEY_ID", "AWS_SESSION_TOKEN"], "boto3 would repeat it"
        server.shutdown()


def test_what_a_server_refuses_is_said_without_the_secret(s3, monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        monkeypatch.setenv(name, SECRETS[name])
    with pytest.raises(S3Error, match="check the AWS credentials") as caught:
        S3Folder(s3[1])
    assert leaked(traceback_of(caught.value)) == []


def test_the_search_for_secrets_finds_one():
    assert leaked(b"x" + SECRETS["WANDB_API_KEY"].encode()) == ["WANDB_API_KEY"]
