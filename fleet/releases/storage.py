"""The object store, by the name of what is in it. Local folder or S3: django-storages is the only difference.

Objects are named by content, so writing one twice writes the same thing.
"""

import os
from pathlib import Path
from typing import IO, Any, cast

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


class _Movable(File[bytes]):
    """Django moves a file that says where it lies, instead of copying it."""

    def temporary_file_path(self) -> str:
        return str(self.name)


def put_file(name: str, path: Path) -> None:
    """Store a file that is done with, all or nothing: a local store renames it (and syncs it first), S3 uploads it."""
    with path.open("rb") as file:
        if is_local():
            os.fsync(file.fileno())
        store().save(name, _Movable(file, name=str(path)))
    path.unlink(missing_ok=True)


def open_object(name: str) -> IO[bytes]:
    return cast("IO[bytes]", store().open(name, "rb"))


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
