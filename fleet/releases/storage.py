"""The object store, by the name of what is in it. Local folder or S3: django-storages is the only difference.

Objects are named by content, so writing one twice writes the same thing.
"""

import errno
import os
import shutil
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import IO, Any, cast

from botocore.exceptions import BotoCoreError, ClientError
from django.conf import settings
from django.core.files import File
from django.core.files.storage import FileSystemStorage, Storage, storages


def store() -> Storage:
    return storages["objects"]


def blob_name(sha256: str) -> str:
    return f"blobs/{sha256}"


def batch_name(sha256: str) -> str:
    return f"batches/{sha256}"


def put(name: str, content: IO[bytes]) -> None:
    """Store `content` under `name`, replacing what is there."""
    store().save(name, File(content))


def put_file(name: str, path: Path) -> None:
    """Store a whole, synced file of this machine under `name`, and take it away from `path`.

    Locally by rename, so that a reader or a power cut never meets half an object.
    """
    if is_local():
        _move_durably(path, Path(store().path(name)))
        return
    with path.open("rb") as file:
        put(name, file)
    path.unlink(missing_ok=True)


def local_path(name: str) -> Path:
    """Where a local store keeps an object. Only if `is_local()`."""
    return Path(store().path(name))


def open_object(name: str) -> IO[bytes]:
    return cast("IO[bytes]", store().open(name, "rb"))


def open_range(name: str, start: int, end: int) -> IO[bytes]:
    """Bytes `start` to `end` (excluded) of an object, and of S3 no more than these. Raises OSError."""
    if is_local():
        file = open_object(name)
        file.seek(start)
        return file
    storage = cast("Any", store())
    try:
        found = storage.bucket.Object(name).get(Range=f"bytes={start}-{end - 1}")
    except (ClientError, BotoCoreError) as error:
        raise OSError(errno.EIO, str(error), name) from error
    return cast("IO[bytes]", found["Body"])


def exists(name: str) -> bool:
    return bool(store().exists(name))


def size(name: str) -> int:
    return int(store().size(name))


def delete(name: str) -> None:
    store().delete(name)


def is_local() -> bool:
    return isinstance(store(), FileSystemStorage)


def presigned_get(name: str) -> str:
    """A URL that lets its bearer read one object for a while. S3 only."""
    return str(store().url(name))


def presigned_put(name: str, *, length: int) -> str:
    """A URL that lets its bearer write one object of exactly `length` bytes for a while. S3 only."""
    storage = cast("Any", store())
    client = storage.connection.meta.client
    parameters = {"Bucket": storage.bucket_name, "Key": name, "ContentLength": length}
    return str(client.generate_presigned_url("put_object", Params=parameters, ExpiresIn=settings.PRESIGNED_SECONDS))


def _move_durably(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        source.replace(target)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        _copy_durably(source, target)
    _sync_folder(target.parent)


def _copy_durably(source: Path, target: Path) -> None:
    """Across file systems: a whole copy beside the target first, then a rename."""
    with source.open("rb") as reader, NamedTemporaryFile(dir=target.parent, delete=False) as writer:
        shutil.copyfileobj(reader, writer, 1024 * 1024)
        writer.flush()
        os.fsync(writer.fileno())
    Path(writer.name).replace(target)
    source.unlink()


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
