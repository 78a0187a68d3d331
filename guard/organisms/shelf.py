"""Where trained stages are kept: a cache named by content, and folders that are either whole or not there."""

from __future__ import annotations

import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from guard.cache import cache_folder
from guard.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Iterator

MANIFEST = "manifest.json"


def stage_folder(digest: str) -> Path:
    """Where the stage of this digest is kept, trained or not."""
    return cache_folder() / "organisms" / digest


@contextmanager
def written_whole(folder: Path) -> Iterator[Path]:
    """A folder to write into that becomes `folder` when the block ends well, and vanishes when it does not.

    It lies beside `folder`, so that taking its place is one rename.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as scratch:
        draft = Path(scratch) / "draft"
        draft.mkdir()
        yield draft
        if folder.exists():
            folder.rename(Path(scratch) / "replaced")
        draft.rename(folder)


def check_target(folder: Path) -> None:
    """Refuse to replace anything but an organism or an empty folder."""
    if folder.is_dir() and (not any(folder.iterdir()) or (folder / MANIFEST).is_file()):
        return
    if folder.exists():
        raise CheckpointError(f"{folder}: holds no {MANIFEST}, expected an empty folder or an organism to replace")


def copy_stage(source: Path, target: Path) -> None:
    """Copy a stage's files, readable by all whatever the cache's permissions are."""
    target.mkdir()
    for file in sorted(source.iterdir()):
        shutil.copyfile(file, target / file.name)
