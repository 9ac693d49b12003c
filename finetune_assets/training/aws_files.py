"""Files of jobs in S3: up, down, listed, deleted. An address is `s3://BUCKET/PREFIX`."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune_assets.errors import TrainingError

MOST_VERSIONS = 20
"""Of one file: a new one for each upload that was begun again."""


@dataclass(frozen=True)
class Files:
    """A client of S3, and who translates its errors (given what is being done)."""

    client: Any
    errors: Callable[[str], AbstractContextManager[None]]

    def put(self, path: Path, uri: str) -> None:
        """Uploads a file, in parts where it is large."""
        bucket, key = _parts(uri)
        with self.errors(f"uploading {path.name}"):
            self.client.upload_file(str(path), bucket, key)

    def fetch(self, uri: str, folder: Path, skip: str | None = None) -> list[Path]:
        """Downloads everything below a prefix but what begins with `skip`; the files."""
        prefix, made = _parts(uri.rstrip("/") + "/")[1], list[Path]()
        with self.errors(f"downloading {uri}"):
            for bucket, key in self.listed(uri):
                if skip is not None and key.removeprefix(prefix).startswith(skip):
                    continue
                target = folder / key.removeprefix(prefix)
                if not target.resolve().is_relative_to(folder.resolve()):
                    raise TrainingError(f"{uri} holds a key that leads out of its folder: {key!r}.")
                target.parent.mkdir(parents=True, exist_ok=True)
                self.client.download_file(bucket, key, str(target))
                made.append(target)
        return made

    def delete(self, uri: str) -> None:
        """Deletes everything below a prefix; in a bucket that keeps versions, by its version, so that no copy is left behind.

        Raises TrainingError where after MOST_VERSIONS deletions of each there are still some.
        """
        with self.errors(f"deleting what was uploaded to {uri}"):
            for _ in range(MOST_VERSIONS):
                left = self.listed(uri)
                for bucket, key in left:
                    version = self._version(bucket, key)
                    self.client.delete_object(Bucket=bucket, Key=key, **({"VersionId": version} if version else {}))
                if not left:
                    return
        raise TrainingError(
            f"{uri} still holds files after {MOST_VERSIONS} versions of each were deleted. Delete them in the console."
        )

    def _version(self, bucket: str, key: str) -> str | None:
        """Of a file in a bucket that keeps versions; null also where somebody has just deleted it."""
        try:
            return self.client.head_object(Bucket=bucket, Key=key).get("VersionId")
        except self.client.exceptions.ClientError as error:
            if error.response["ResponseMetadata"]["HTTPStatusCode"] == 404:
                return None
            raise

    def listed(self, uri: str) -> list[tuple[str, str]]:
        """Bucket and key of everything below a prefix."""
        bucket, prefix = _parts(uri.rstrip("/") + "/")
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
        return [(bucket, str(entry["Key"])) for page in pages for entry in page.get("Contents", [])]


def _parts(uri: str) -> tuple[str, str]:
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    return bucket, key
