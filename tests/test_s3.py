"""S3 transfers against a real server: whole or a clear error, never a part taken for a whole."""

import os
import random

import pytest
from s3_proxy import CuttingProxy
from trials_outside import can_mount, small_disk

from lm.files import sha256, write_sealed
from lm.s3 import S3Error, S3Folder

SIZES = {"tokens.bin": 20_000_000, "index.jsonl": 1000, "tokenizer/tokenizer.json": 0}  # the first goes in three parts


def make_folder(folder, sizes=SIZES, seed=0):
    """A folder of random files and the meta.json that names them."""
    for name, size in sizes.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(random.Random(f"{seed}{name}").randbytes(size))
    files = {name: {"size": size, "sha256": sha256(folder / name)} for name, size in sizes.items()}
    write_sealed(folder / "meta.json", {"files": files})
    return folder


def content(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def folder(tmp_path):
    return make_folder(tmp_path / "there")


@pytest.fixture
def small(tmp_path):
    return make_folder(tmp_path / "small", {"tokens.bin": 1000, "index.jsonl": 10})


@pytest.fixture
def proxy(monkeypatch):
    """Put a CuttingProxy between boto3 and the server."""
    opened = []

    def start(limit, cuts):
        opened.append(CuttingProxy(os.environ["AWS_ENDPOINT_URL"], limit, cuts))
        monkeypatch.setenv("AWS_ENDPOINT_URL", opened[-1].url)
        return opened[-1]

    yield start
    for each in opened:
        each.socket.close()


def test_downloaded_folder_equals_the_uploaded_one(s3, folder, tmp_path):
    client, bucket = s3
    names = ["index.jsonl", "tokenizer/tokenizer.json", "tokens.bin", "meta.json"]
    assert S3Folder(bucket, "/a/b/").upload(folder) == names
    assert S3Folder(bucket, "a/b").download(tmp_path / "here") == ["tokens.bin", "index.jsonl", names[1], "meta.json"]
    assert content(tmp_path / "here") == content(folder)
    assert client.head_object(Bucket=bucket, Key="a/b/tokens.bin")["ETag"].endswith('-3"')  # really in parts


def test_only_files_that_differ_are_fetched(s3, small, tmp_path):
    remote = S3Folder(s3[1])
    remote.upload(small)
    remote.download(tmp_path / "here")
    (tmp_path / "here/index.jsonl").write_bytes(b"0123456789")  # the right size, other bytes
    assert remote.download(tmp_path / "here") == ["index.jsonl", "meta.json"]
    assert content(tmp_path / "here") == content(small)


def test_meta_that_is_written_is_the_one_whose_files_were_fetched(s3, small, tmp_path):
    other = make_folder(tmp_path / "other", {"tokens.bin": 1000, "index.jsonl": 10}, seed=1)

    class Overtaken(S3Folder):
        """An upload ends while a download is at its last file."""

        def _download(self, path, name, *facts):
            super()._download(path, name, *facts)
            if name == "index.jsonl":
                self.upload(other)

    remote = Overtaken(s3[1])
    remote.upload(small)
    remote.download(tmp_path / "here")
    assert content(tmp_path / "here") == content(small)
    remote.download(tmp_path / "here")
    assert content(tmp_path / "here") == content(other)


@pytest.mark.parametrize("name", ["tokenizer", "index.jsonl", "meta.json"])
def test_nothing_is_written_through_a_link_out_of_the_folder(s3, tmp_path, name):
    there = make_folder(tmp_path / "there", {"tokenizer/tokenizer.json": 10, "index.jsonl": 10})
    S3Folder(s3[1]).upload(there)
    (here := tmp_path / "here").mkdir()
    (here / name).symlink_to(there / name)  # with the very bytes that are wanted
    before = content(there)
    with pytest.raises(S3Error, match=rf"here/{name}.* is a link to .*there/{name}.*: remove the link, then run it again"):
        S3Folder(s3[1]).download(here)
    assert content(there) == before
    assert [path.name for path in here.iterdir()] == [name], "something was fetched"
    (here / name).unlink()
    tmp_path.joinpath("linked").symlink_to(here)  # the folder itself may be one
    S3Folder(s3[1]).download(tmp_path / "linked")
    assert content(here) == content(there)


def test_upload_takes_every_file_but_leftovers_of_atomic_writes(s3, tmp_path):
    for name in ("run.json", "logs/train.jsonl", "best/.model.safetensors.partial", ".best.old/config.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert S3Folder(s3[1], "run").upload(tmp_path) == ["logs/train.jsonl", "run.json"]
    keys = [entry["Key"] for entry in s3[0].list_objects_v2(Bucket=s3[1])["Contents"]]
    assert keys == ["run/logs/train.jsonl", "run/run.json"]


def test_transfer_cut_once_is_tried_again(s3, folder, proxy, tmp_path):
    cutting = proxy(5_000_000, 1)
    S3Folder(s3[1]).upload(folder)
    assert cutting.made == 1
    cutting.made = 0
    S3Folder(s3[1]).download(tmp_path / "here")
    assert cutting.made == 1
    assert content(tmp_path / "here") == content(folder)


def test_download_cut_always_leaves_nothing_that_looks_whole(s3, folder, proxy, tmp_path):
    S3Folder(s3[1]).upload(folder)
    remote = S3Folder(s3[1])
    cutting = proxy(1_000_000, 10**9)
    with pytest.raises(S3Error, match=r"transfer of s3://.*/tokens.bin broke off .*: check the network and .*, then run it"):
        S3Folder(s3[1]).download(tmp_path / "here")
    assert content(tmp_path / "here") == {}
    assert cutting.made >= 3
    remote.download(tmp_path / "here")
    assert content(tmp_path / "here") == content(folder)


def test_upload_cut_always_is_an_error_and_leaves_no_object(s3, folder, proxy):
    proxy(1_000_000, 10**9)
    with pytest.raises(S3Error, match=r"transfer of s3://.*/tokens.bin broke off"):
        S3Folder(s3[1]).upload(folder)
    keys = [entry["Key"] for entry in s3[0].list_objects_v2(Bucket=s3[1])["Contents"]]
    assert keys == ["index.jsonl", "tokenizer/tokenizer.json"]  # so no meta.json, which would say it is complete


def test_server_gone_is_said(s3, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "2")
    with pytest.raises(S3Error, match=r"transfer of s3://b1b broke off \(EndpointConnectionError, server 127.0.0.1:9\): check"):
        S3Folder("b1b")


@pytest.mark.parametrize("attempts", ["x", "", "0", "-1", "1.5", "9" * 5000])
def test_a_number_of_attempts_that_is_none_is_named(s3, monkeypatch, attempts):
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", attempts)
    with pytest.raises(S3Error, match=rf"AWS_MAX_ATTEMPTS is '{attempts[:70]}.*, a number of 1 to 9999 is needed: set it"):
        S3Folder(s3[1])


@pytest.mark.parametrize("attempts", ["1", " 12\n", "9999"])
def test_a_number_of_attempts_is_taken_with_the_line_break_of_a_file(s3, monkeypatch, attempts):
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", attempts)
    assert S3Folder(s3[1]).client.meta.config.retries["total_max_attempts"] == int(attempts)


def test_a_full_disk_is_not_taken_for_the_network(s3, folder, tmp_path):
    if not can_mount(tmp_path):
        pytest.skip("mounting a small disk needs root")
    S3Folder(s3[1]).upload(folder)
    with small_disk(tmp_path / "disk", 1) as disk:
        with pytest.raises(OSError, match="No space left on device"):
            S3Folder(s3[1]).download(disk / "here")
        assert content(disk / "here") == {}


def test_truncated_object_is_named(s3, small, tmp_path):
    client, bucket = s3
    S3Folder(bucket).upload(small)
    client.put_object(Bucket=bucket, Key="tokens.bin", Body=(small / "tokens.bin").read_bytes()[:-1])
    with pytest.raises(S3Error, match=r"/tokens.bin has 999 bytes, 1000 are needed: upload the folder again"):
        S3Folder(bucket).download(tmp_path / "here")
    assert not (tmp_path / "here/tokens.bin").exists()


def test_object_with_altered_bytes_is_named(s3, small, tmp_path):
    client, bucket = s3
    S3Folder(bucket).upload(small)
    data = bytearray((small / "tokens.bin").read_bytes())
    data[500] ^= 1
    client.put_object(Bucket=bucket, Key="tokens.bin", Body=bytes(data))
    with pytest.raises(S3Error, match=r"/tokens.bin has not the SHA-256 [0-9a-f]{64} it was uploaded with"):
        S3Folder(bucket).download(tmp_path / "here")
    assert content(tmp_path / "here") == {}


@pytest.mark.parametrize(
    ("meta", "message"),
    [
        ("{", "is not JSON"),
        ("[]", r"is \[\], an object is needed"),
        ('{"files": {}}', "has no sha256 of itself"),
        ('{"files": {}, "sha256": "0"}', "has changed since it was written: its SHA-256 is .*, '0' was written"),
        ({"files": []}, r"has files \[\], dict is needed"),
        ({"files": {"../x": {"size": 1, "sha256": ""}}}, r"names '../x', a file inside the folder is needed"),
        ({"files": {"x": {"size": "1", "sha256": ""}}}, r"x has size '1', int is needed"),
    ],
)
def test_bad_meta_is_refused(s3, tmp_path, meta, message):
    if isinstance(meta, dict):
        write_sealed(tmp_path / "sealed.json", meta)
        meta = (tmp_path / "sealed.json").read_text()
    s3[0].put_object(Bucket=s3[1], Key="p/meta.json", Body=meta.encode())
    with pytest.raises(S3Error, match=f"p/meta.json {message}.*: upload the folder again"):
        S3Folder(s3[1], "p").download(tmp_path)


def test_missing_upload_is_named(s3, tmp_path):
    with pytest.raises(S3Error, match=rf"no s3://{s3[1]}/p/meta.json: upload it first, or pass another --s3_prefix"):
        S3Folder(s3[1], "p").download(tmp_path)


def test_missing_object_is_named(s3, small, tmp_path):
    S3Folder(s3[1], "p").upload(small)
    s3[0].delete_object(Bucket=s3[1], Key="p/index.jsonl")
    with pytest.raises(S3Error, match=rf"no s3://{s3[1]}/p/index.jsonl: upload it first"):
        S3Folder(s3[1], "p").download(tmp_path)


def test_missing_bucket_is_named(s3):
    with pytest.raises(S3Error, match="no bucket not-there: create it, or pass another --s3_bucket"):
        S3Folder("not-there")


def test_wrong_secret_is_said_without_the_secret(s3, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong-secret")
    with pytest.raises(S3Error, match=r"refused \(403\): check the AWS credentials") as caught:
        S3Folder(s3[1])
    assert "wrong-secret" not in str(caught.value)
    assert os.environ["AWS_ACCESS_KEY_ID"] not in str(caught.value)


def test_missing_credentials_are_said(s3, monkeypatch, tmp_path):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    with pytest.raises(S3Error, match=r"no credentials for s3://.*: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"):
        S3Folder(s3[1])
