"""Folders in S3: uploaded and downloaded with sizes and SHA-256 checked both ways, and no part ever taken for a whole.

boto3 finds credentials, region and endpoint as always (`AWS_ACCESS_KEY_ID`, `AWS_PROFILE`, `AWS_ENDPOINT_URL`, ...). Each
object carries its file's SHA-256 in its metadata; meta.json goes up last, and is written here last.

No error repeats what boto3 or the server says, for that may hold credentials: only kinds, codes and the server's name.
"""

import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tqdm import tqdm

from lm.checks import kind_faults, list_faults
from lm.files import parse_json, sha256, unseal, whole_file

ATTEMPTS = 5  # of each request, with exponential back-off between them
LAST = "meta.json"
REFUSED = ("403", "AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken")
ABSENT = ("404", "NoSuchKey", "NotFound")
CODE = re.compile(r"[A-Z][A-Za-z]{1,40}|[0-9]{3}")  # of an error, as S3 lists them


class S3Error(RuntimeError):
    """A transfer failed, or found something damaged; the message says what to do."""


class S3Folder:
    """The objects under s3://bucket/prefix/ as a folder.

    Raises: S3Error if there are no credentials, or the bucket is missing, closed to them, or out of reach.
    """

    def __init__(self, bucket: str, prefix: str = ""):
        import boto3  # here, so that a script which could use S3 but does not need not have it loaded
        from botocore.config import Config

        retries = {"mode": "standard", "total_max_attempts": _attempts()}
        config = Config(retries=retries, connect_timeout=10, read_timeout=60)
        self.bucket, self.prefix, self.server = bucket, prefix.strip("/"), ""
        self.url = f"s3://{bucket}/{self.prefix}".rstrip("/")
        with self._clear(f"s3://{bucket}"):
            session = boto3.Session()
            _check_credentials(session)
            self.client = session.client("s3", config=config)
            self.server = _host(self.client.meta.endpoint_url)
            self.client.head_bucket(Bucket=bucket)

    def upload(self, folder: Path | str, names: Iterable[str] | None = None) -> list[str]:
        """Upload files of `folder` by their relative names (None: every file below it), meta.json last; return the names."""
        folder = Path(folder)
        names = sorted(_files(folder) if names is None else names, key=lambda name: (name == LAST, name))
        for name in names:
            self._upload(folder / name, name)
        return names

    def read_meta(self) -> dict:
        """The folder's meta.json.

        Raises: S3Error if it is missing, as in an upload that did not end, or damaged.
        """
        return self._meta()[0]

    def _meta(self) -> tuple[dict, bytes]:
        """The folder's meta.json, checked, and its bytes."""
        where, remedy = f"{self.url}/{LAST}", "upload the folder again"
        with self._clear(where):
            response = self.client.get_object(Bucket=self.bucket, Key=self._key(LAST))
            body = response["Body"].read()
        try:
            meta = unseal(parse_json(body, where, remedy), where, remedy)
        except ValueError as error:
            raise S3Error(str(error)) from None
        if faults := kind_faults(where, meta, {"files": dict}) or list_faults(where, meta["files"]):
            raise S3Error("; ".join(f"{fault}: {remedy}" for fault in faults))
        return meta, body

    def download(self, folder: Path | str) -> list[str]:
        """Fetch the files that meta.json names, each verified before it gets its name, then write it; return those fetched.

        Files that are there with the right size and SHA-256 are not fetched again. Nothing is written outside `folder`.
        """
        folder, fetched = Path(folder), []
        meta, body = self._meta()
        for path in (folder / name for name in [*meta["files"], LAST]):
            if not path.resolve().is_relative_to(folder.resolve()):
                target = f"{path} is a link to {path.resolve()}"
                raise S3Error(f"{target}, a file inside the folder is needed: remove the link, then run it again")
        for name, entry in meta["files"].items():
            if not _same(folder / name, entry["size"], entry["sha256"]):
                self._download(folder / name, name, entry["size"], entry["sha256"])
                fetched.append(name)
        with whole_file(folder / LAST) as partial:
            partial.write_bytes(body)  # those that were checked: by now an upload may have replaced them
        return [*fetched, LAST]

    def _key(self, name: str) -> str:
        return f"{self.prefix}/{name}".lstrip("/")

    def _head(self, name: str) -> tuple[int, str]:
        with self._clear(f"{self.url}/{name}"):
            head = self.client.head_object(Bucket=self.bucket, Key=self._key(name))
        return head["ContentLength"], head["Metadata"].get("sha256", "none")

    def _upload(self, path: Path, name: str) -> None:
        size, digest = path.stat().st_size, sha256(path)
        extra = {"ChecksumAlgorithm": "SHA256", "Metadata": {"sha256": digest}}  # the server checks each part's
        with self._clear(f"{self.url}/{name}"), _bar(f"up {name}", size) as bar:
            self.client.upload_file(str(path), self.bucket, self._key(name), ExtraArgs=extra, Callback=bar.update)
        if (found := self._head(name)) != (size, digest):
            raise S3Error(f"{self.url}/{name} has size and SHA-256 {found}, {(size, digest)} were sent: upload it again")

    def _download(self, path: Path, name: str, size: int, digest: str) -> None:
        where = f"{self.url}/{name}"
        if (found := self._head(name)[0]) != size:
            raise S3Error(f"{where} has {found} bytes, {size} are needed: upload the folder again")
        with whole_file(path) as partial:
            with self._clear(where), _bar(f"down {name}", size) as bar:
                self.client.download_file(self.bucket, self._key(name), str(partial), Callback=bar.update)
            if not _same(partial, size, digest):
                raise S3Error(f"{where} has not the SHA-256 {digest} it was uploaded with: upload the folder again")

    @contextmanager
    def _clear(self, where: str) -> Iterator[None]:
        """Turn what boto3 raises into one S3Error that says what to do, and in a traceback hides what it came from."""
        from boto3.exceptions import Boto3Error
        from botocore.exceptions import BotoCoreError, NoCredentialsError, PartialCredentialsError

        try:
            yield
        except S3Error:
            raise
        except (NoCredentialsError, PartialCredentialsError):
            raise S3Error(f"no credentials for {where}: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY") from None
        except Exception as error:
            if isinstance(error, OSError) and not isinstance(error, BotoCoreError | ConnectionError | TimeoutError):
                raise  # of this machine's disk
            inner = error.__context__ if isinstance(error, Boto3Error) else None  # upload_file wraps the ClientError
            raise S3Error(self._say(where, inner or error)) from None

    def _say(self, where: str, error: BaseException) -> str:
        """What the error means in words of our own."""
        code = str((getattr(error, "response", None) or {}).get("Error", {}).get("Code", ""))
        if code in REFUSED:
            return f"{where} refused ({code}): check the AWS credentials, and that they may read, write and list there"
        if code == "NoSuchBucket" or (code in ABSENT and where == f"s3://{self.bucket}"):
            return f"no bucket {self.bucket}: create it, or pass another --s3_bucket (AWS_ENDPOINT_URL names the server)"
        if code in ABSENT:
            return f"no {where}: upload it first, or pass another --s3_prefix"
        kind = f"{type(error).__name__} {code if CODE.fullmatch(code) else ''}".strip() + self.server
        return f"transfer of {where} broke off ({kind}): check the network and the AWS_* settings, then run it again"


def _attempts() -> int:
    """How often each request is made at most."""
    found = os.environ.get("AWS_MAX_ATTEMPTS", str(ATTEMPTS))
    if not re.fullmatch(r"\s*[1-9][0-9]{0,3}\s*", found):
        raise S3Error(f"AWS_MAX_ATTEMPTS is {found!r:.80}, a number of 1 to 9999 is needed: set it to one, or unset it")
    return int(found)


def _check_credentials(session: Any) -> None:
    """Raises: S3Error, naming the variable, if a credential cannot stand in a request, as with the line break of a file."""
    if (credentials := session.get_credentials()) is None:
        return  # the first request says so
    found = credentials.get_frozen_credentials()
    names = {"AWS_ACCESS_KEY_ID": found.access_key, "AWS_SECRET_ACCESS_KEY": found.secret_key, "AWS_SESSION_TOKEN": found.token}
    for name, value in names.items():
        if value and (value != value.strip() or not (value.isascii() and value.isprintable())):
            fault = "begins or ends with a blank or a line break, or holds what is not printable ASCII"
            raise S3Error(f"{name} (boto3 has it from: {credentials.method}) {fault}: set it again without")


def _host(url: str) -> str:
    """The words ", server HOST:PORT", or none where a password may stand in the URL."""
    return "" if "@" in url else f", server {urlsplit(url).netloc}"


def _files(folder: Path) -> list[str]:
    """Relative names of all files below, without what an interrupted atomic write may have left (`.name.partial`)."""
    paths = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    leftover = (".partial", ".old")
    return [p.as_posix() for p in paths if not any(x.startswith(".") and x.endswith(leftover) for x in p.parts)]


def _same(path: Path, size: int, digest: str) -> bool:
    return path.is_file() and path.stat().st_size == size and sha256(path) == digest


def _bar(name: str, size: int) -> tqdm:
    """A progress bar in bytes on a terminal, nothing elsewhere."""
    return tqdm(desc=name, total=size, unit="B", unit_scale=True, leave=False, disable=None)
