"""Files from the network: fetched once, checked against their SHA-256, never left half-written."""

import hashlib
import http.client
import os
import pathlib
import urllib.error
import urllib.request

from tqdm import tqdm

from jaxdiff.files import replacing

CHUNK = 1 << 20
TIMEOUT = 60  # seconds without a byte


def fetch_file(url: str, sha256: str, path: str | os.PathLike[str]) -> pathlib.Path:
    """Download `url` to `path` unless it is there; show a progress bar on a terminal.

    Raises ValueError with one line when the server cannot be reached or what it sent is not the file of that SHA-256 (64 hex
    digits); `path` is only written when all is well.
    """
    path = pathlib.Path(path)
    if path.is_file():
        return path
    try:
        with replacing(path) as temporary:
            found, size, promised = _stream(url, temporary)
            if promised is not None and size != promised:
                raise ValueError(f"{url} broke off after {size:,} of {promised:,} bytes: try again")
            if found != sha256:
                raise ValueError(
                    f"{url} sent a file of {size:,} bytes whose SHA-256 is {found[:8]}..., not {sha256[:8]}..."
                )
    except urllib.error.HTTPError as error:
        error.close()  # it is the open connection, too
        raise ValueError(f"{url} could not be downloaded ({error.code} {error.reason})") from error
    except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError) as error:
        reason = getattr(error, "reason", None) or error
        raise ValueError(f"{url} could not be downloaded ({' '.join(str(reason).split())})") from error
    return path


def sha256_of(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _stream(url: str, path: pathlib.Path) -> tuple[str, int, int | None]:
    """Write the answer to `path`; return its SHA-256, its size, and the size that the server promised."""
    digest, size = hashlib.sha256(), 0
    with urllib.request.urlopen(url, timeout=TIMEOUT) as answer, open(path, "wb") as file:
        length = answer.headers.get("Content-Length")
        promised = int(length) if length else None
        # disable=None: no bar where the output is not a terminal.
        with tqdm(total=promised, unit="B", unit_scale=True, desc=url.rsplit("/", 1)[-1], disable=None) as bar:
            while chunk := answer.read(CHUNK):
                file.write(chunk)
                digest.update(chunk)
                size += len(chunk)
                bar.update(len(chunk))
    return digest.hexdigest(), size, promised
