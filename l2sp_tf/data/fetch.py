"""Downloads the files of a data set from their creators, resumes broken downloads, and checks the files."""

import contextlib
import dataclasses
import hashlib
import http.client
import pathlib
import re
import shutil
import urllib.error
import urllib.parse
import urllib.request

from l2sp_tf.files.errors import InputError

TIMEOUT_SECONDS = 20  # for an answer, and for each read


@dataclasses.dataclass(frozen=True)
class Download:
    """A file and its creators' address.

    Attributes:
        url: the address; the last part of its path is the file's name.
        checksum: "md5:", "sha1:" or "sha256:" and the digest in hexadecimal; None if none is published.
    """

    url: str
    checksum: str | None = None

    @property
    def name(self):
        return pathlib.PurePosixPath(urllib.parse.urlparse(self.url).path).name


def fetch(download, folder, *, checksums=True, say=print):
    """Returns the path of a file in `folder`, after downloading it if it is missing.

    Resumes a partial download that an earlier call left. An existing file is checked too, and never changed.

    Args:
        download: a Download.
        folder: the folder of the file.
        checksums: whether to compare checksums.
        say: called with a line of text before a download.

    Raises:
        InputError: the address does not answer, the download breaks off, or the checksum is wrong.
        OSError: the folder cannot be written.
    """
    path = pathlib.Path(folder) / download.name
    part = path.with_name(f"{path.name}.part")
    loaded = not path.exists()
    if loaded:
        path.parent.mkdir(parents=True, exist_ok=True)
        say(f"downloading {download.url} to {path}")
        _load(download, part)
    difference = _difference(download, part if loaded else path) if checksums else None
    if difference and loaded:
        part.unlink()  # resuming it would give the same file again
        raise InputError(f"The download of {download.url} was removed, because {difference}: run prepare.py again.")
    if difference:
        raise InputError(f"{path} cannot be used, because {difference}: download it again from {download.url}.")
    if loaded:
        part.replace(path)
    return path


def _difference(download, path):
    """Describes how a file's checksum differs from the published one, or returns None."""
    if download.checksum is None:
        return None
    kind, _, expected = download.checksum.partition(":")
    with path.open("rb") as file:
        found = hashlib.file_digest(file, kind).hexdigest()
    return None if found == expected else f"its {kind} is {found} and should be {expected}"


def reach(url):
    """Raises InputError unless the host of `url` answers within seconds; a refusal is an answer."""
    with _network_errors(url, "connect to the network, and run prepare.py again"):
        try:
            _open(urllib.request.Request(url, method="HEAD")).close()
        except urllib.error.HTTPError as error:
            error.close()


def _load(download, part):
    """Appends the missing rest of the file to `part`."""
    done = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(download.url, headers={"Range": f"bytes={done}-"} if done else {})
    advice = f"run prepare.py again to resume, or put {download.name} into {part.parent} by hand"
    with _network_errors(download.url, advice):
        try:
            response = _open(request)
        except urllib.error.HTTPError as error:
            error.close()
            if done and error.code == http.client.REQUESTED_RANGE_NOT_SATISFIABLE:
                return  # the part is complete already; the checksum decides
            raise
        with response:
            resumed = response.status == http.client.PARTIAL_CONTENT
            length = response.headers.get("Content-Length", "")
            expected = int(length) + done * resumed if re.fullmatch("[0-9]{1,18}", length) else None
            with part.open("ab" if resumed else "wb") as file:
                shutil.copyfileobj(response, file, 2**20)
    if expected is not None and part.stat().st_size < expected:
        raise InputError(f"{download.url} broke off after {part.stat().st_size:,} of {expected:,} bytes: {advice}.")


def _open(request):
    return urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS)


@contextlib.contextmanager
def _network_errors(url, advice):
    """Turns network errors inside the block into an InputError; the OSError of a full disk passes through."""
    try:
        yield
    except (urllib.error.URLError, TimeoutError, ConnectionError, http.client.HTTPException) as error:
        raise InputError(f"{url} cannot be downloaded ({getattr(error, 'reason', None) or error}): {advice}.") from error
