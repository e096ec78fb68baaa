"""Folders in S3: uploaded and downloaded with sizes and SHA-256 checked both ways, and no part ever taken for a whole.

boto3 finds credentials, region and endpoint as always (`AWS_ACCESS_KEY_ID`, `AWS_PROFILE`, `AWS_ENDPOINT_URL`, ...). Each
object carries its file's SHA-256 in its metadata; meta.json goes up last and comes down last.
"""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm

from lm.checks import kind_faults, list_faults
from lm.files import parse_json, sha256, unseal, whole_file

ATTEMPTS = 5  # of each request, with exponential back-off between them
LAST = "meta.json"
REFUSED = ("403", "AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken")
ABSENT = ("404", "NoSuchKey", "NotFound")


class S3Error(RuntimeError):
    """A transfer failed, or found something damaged; the message says what to do."""


class S3Folder:
    """The objects under s3://bucket/prefix/ as a folder.

    Raises: S3Error if there are no credentials, or the bucket is missing, closed to them, or out of reach.
    """

    def __init__(self, bucket: str, prefix: str = ""):
        import boto3  # here, so that a script which could use S3 but does not need not have it loaded
        from botocore.config import Config

        attempts = int(os.environ.get("AWS_MAX_ATTEMPTS", ATTEMPTS))
        config = Config(retries={"mode": "standard", "total_max_attempts": attempts}, connect_timeout=10, read_timeout=60)
        self.bucket, self.prefix = bucket, prefix.strip("/")
        self.url = f"s3://{bucket}/{self.prefix}".rstrip("/")
        with self._clear(f"s3://{bucket}"):
            self.client = boto3.Session().client("s3", config=config)
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
        return meta

    def download(self, folder: Path | str) -> list[str]:
        """Fetch the files that meta.json names, then meta.json, each verified before it gets its name; return those fetched.

        Files that are there with the right size and SHA-256 are not fetched again.
        """
        folder, meta, fetched = Path(folder), self.read_meta(), []
        for name, entry in meta["files"].items():
            if not _same(folder / name, entry["size"], entry["sha256"]):
                self._download(folder / name, name, entry["size"], entry["sha256"])
                fetched.append(name)
        self._download(folder / LAST, LAST, *self._head(LAST))
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
        """Turn what boto3 raises into one S3Error that says what to do; it never holds a key or a secret."""
        from boto3.exceptions import Boto3Error
        from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError, PartialCredentialsError
        from s3transfer.exceptions import RetriesExceededError, S3DownloadFailedError

        try:
            yield
        except (NoCredentialsError, PartialCredentialsError):
            raise S3Error(f"no credentials for {where}: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY") from None
        except (Boto3Error, ClientError) as error:  # upload_file wraps the ClientError
            inner = error if isinstance(error, ClientError) else error.__context__
            raise S3Error(self._say(where, inner if inner is not None else error)) from None
        except (BotoCoreError, RetriesExceededError, S3DownloadFailedError, ConnectionError, ValueError) as error:
            raise S3Error(self._say(where, error)) from None

    def _say(self, where: str, error: BaseException) -> str:
        """What the error means in words."""
        code = (getattr(error, "response", None) or {}).get("Error", {}).get("Code", "")
        if code in REFUSED:
            return f"{where} refused ({code}): check the AWS credentials, and that they may read, write and list there"
        if code == "NoSuchBucket" or (code in ABSENT and where == f"s3://{self.bucket}"):
            return f"no bucket {self.bucket}: create it, or pass another --s3_bucket (AWS_ENDPOINT_URL names the server)"
        if code in ABSENT:
            return f"no {where}: upload it first, or pass another --s3_prefix"
        return f"transfer of {where} broke off ({type(error).__name__}: {error}): check the network, then run it again"


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
