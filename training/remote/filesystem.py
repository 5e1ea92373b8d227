"""Open the file system of a URL through fsspec, and turn its libraries' errors into one line.

    fs, path = open_filesystem("s3://bucket/folder")
    with remote_errors("s3://bucket/folder"):
        names = fs.find(path)

fsspec reads its own settings from FSSPEC_S3='{"endpoint_url": ...}' and the like, s3fs also AWS's variables.
"""

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from training.errors import RestartNeeded, UserError

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
# A slash or the colon is missing.
NEARLY_URL = re.compile(r"(s3|gs|gcs|az|abfs|hf|https?|file)(:/?|//)(?!/)(.+)", re.IGNORECASE)
PACKAGES = {  # by scheme; schemes of fsspec that run code or chain file systems are left out
    "s3": "s3fs",
    "gs": "gcsfs",
    "az": "adlfs",
    "abfs": "adlfs",
    "hf": "huggingface_hub",
    "https": "aiohttp",
    "http": "aiohttp",
    "file": "fsspec",
}
CREDENTIALS = {
    "s3": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE",
    "gs": "set GOOGLE_APPLICATION_CREDENTIALS, or run gcloud auth application-default login",
    "az": "set AZURE_STORAGE_CONNECTION_STRING, or AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY",
    "hf": "set HF_TOKEN, or run hf auth login",
}
CREDENTIALS["abfs"] = CREDENTIALS["az"]
OPTIONS = {"s3": {"max_concurrency": 4}}  # parts of 50 MB in memory at a time, instead of 10
# Names of the libraries' classes, which share no base class and may not be installed.
NO_CREDENTIALS = {
    "NoCredentialsError",
    "PartialCredentialsError",
    "CredentialRetrievalError",
    "ProfileNotFound",
    "GoogleAuthError",
    "ClientAuthenticationError",
}
TRANSIENT = {
    "HTTPClientError",  # botocore's: timeouts, closed connections
    "EndpointConnectionError",
    "ConnectTimeoutError",
    "ResponseStreamingError",
    "IncompleteReadError",
    "ClientConnectionError",  # aiohttp's
    "ClientPayloadError",
    "ServiceRequestError",  # azure's
    "TransportError",  # google's
    "TransferError",  # ours: other bytes arrived than were sent
}
MAX_REASON = 300  # characters of a library's message
TRANSIENT_ERRNOS = {errno.EBUSY, errno.EIO, getattr(errno, "EREMOTEIO", errno.EIO), errno.ETIMEDOUT}


def is_url(text: str) -> bool:
    """Return True for text such as s3://bucket/file, False for a path."""
    return URL.match(text) is not None


def scheme_of(url: str) -> str:
    """Return the scheme of a URL in lower case, `file` for a path."""
    match = URL.match(url)
    return match[1].lower() if match else "file"


def check_scheme(url: str, *, is_written: bool = False) -> str | None:
    """Return the problem of a URL whose scheme is unknown or, with `is_written`, cannot be written; else None."""
    scheme, is_path = scheme_of(url), not is_url(url)
    if is_path and (match := NEARLY_URL.fullmatch(url)):
        return f"{url!r} is a path; did you mean {match[1].lower()}://{match[3]}? For a folder of this name, ./{url}"
    schemes = [scheme for scheme in PACKAGES if not is_written or scheme not in ("hf", "https", "http")]
    if scheme in schemes and not is_path and not url.startswith(f"{scheme}://"):
        return f"{url!r}: write its scheme in small letters, {scheme}://"
    if scheme not in schemes or ("::" in url and "://" in url):
        return f"{url!r} is no URL of {', '.join(f'{scheme}://' for scheme in schemes)}, and no path"
    if not is_path and not url.partition("://")[2].strip("/"):
        return f"{url!r} names no bucket or folder"
    return None


def open_filesystem(url: str) -> "tuple[AbstractFileSystem, str]":
    """Return the file system of a URL or path, and the path in it. It caches no listings. Contacts no server.

    Raises UserError if the scheme is unknown or its package is not installed.
    """
    if problem := check_scheme(url):
        raise UserError(problem)
    with remote_errors(url):
        from fsspec.core import url_to_fs

        options = OPTIONS.get(scheme_of(url), {})
        return url_to_fs(url, skip_instance_cache=True, use_listings_cache=False, **options)


@contextmanager
def remote_errors(url: str) -> Iterator[None]:
    """Turn errors of fsspec and its libraries into a UserError that names the URL and the remedy.

    It is a RestartNeeded where trying again may help: a timeout, a lost connection, an error of the server.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise to_user_error(url, error) from error


def to_user_error(url: str, error: Exception) -> UserError:
    """Return the error as one line."""
    scheme, names = scheme_of(url), {cls.__name__ for cls in type(error).__mro__}
    reason = f"{type(error).__name__}: {' '.join(str(error).split())[:MAX_REASON] or 'no reason given'}"
    if isinstance(error, ImportError):
        package = PACKAGES[scheme]
        return UserError(f"{url}: {scheme}:// needs the package {package}; pip install 'training[remote]'")
    if scheme == "file" and isinstance(error, OSError):
        return UserError(f"{error.filename or url}: {error.strerror or error}")
    if isinstance(error, PermissionError) or names & NO_CREDENTIALS:
        remedy = CREDENTIALS.get(scheme, "check its permissions")
        return UserError(f"{url}: no access ({reason}); {remedy}")
    if isinstance(error, FileNotFoundError) or "NoSuchBucket" in names:
        return UserError(f"{url}: no such bucket, folder or file ({reason})")
    is_transient = isinstance(error, TimeoutError | ConnectionError) or names & TRANSIENT
    if is_transient or (isinstance(error, OSError) and error.errno in TRANSIENT_ERRNOS):
        return RestartNeeded(f"{url}: not reachable now ({reason}); try again later")
    return UserError(f"{url}: {reason}")
