"""Files of object stores and other disks, by URL: s3://, gs://, az://, hf://, https://, file:// or a path."""

from training.remote.filesystem import check_scheme, is_url, open_filesystem, remote_errors
from training.remote.folder import RemoteFolder

__all__ = ["RemoteFolder", "check_scheme", "is_url", "open_filesystem", "remote_errors"]
