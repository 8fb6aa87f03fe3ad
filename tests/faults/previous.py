"""The previous release, out of this repository's history, to run some members of a deployment from."""

from __future__ import annotations

import subprocess
import tarfile
from io import BytesIO
from pathlib import Path

from tests.faults.processes import ROOT
from tests.faults.wire import release


class NoHistory(Exception):
    """The clone doesn't have that commit."""


def previous_release(folder: Path) -> Path:
    """Its tree, unpacked into *folder*. Raises: NoHistory."""
    name, commit = release()
    archived = subprocess.run(["git", "archive", commit], cwd=ROOT, capture_output=True, check=False)
    if archived.returncode:
        raise NoHistory(f"release {name} is commit {commit}, which this clone has not: git fetch --unshallow")
    with tarfile.open(fileobj=BytesIO(archived.stdout)) as tree:
        tree.extractall(folder, filter="data")
    return folder
