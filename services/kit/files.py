"""Files that nobody else may read: secrets and keys, replaced in one step."""

import os
from pathlib import Path


def write_private(path: Path, content: str | bytes) -> None:
    """Replace a file in one step, on disk when this returns: whoever reads it sees the old one or the new one.

    It is for its owner alone, who stays the same when root replaces it. Raises OSError; then the file is as it was.
    """
    new = path.with_name(f"{path.name}.new")
    # What a crash left may be open to others, or another user's.
    new.unlink(missing_ok=True)
    descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        if path.exists() and (owner := path.stat()).st_uid != os.geteuid():
            os.fchown(descriptor, owner.st_uid, owner.st_gid)
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(descriptor)
    new.replace(path)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
