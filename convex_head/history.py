"""Which commits the history of this package's checkout holds. Imports no torch."""

from __future__ import annotations

import subprocess
from collections.abc import Iterable
from pathlib import Path


def unknown_commits(commits: Iterable[str]) -> set[str]:
    """Those that are no ancestors of the checkout's HEAD, or are marked with + as modified.

    Outside a checkout, in a shallow one, or without git nothing can be said, and only modified ones come back.
    """
    listed = set(commits)
    package = Path(__file__).parent
    known = _ancestors(package) if (package.parent / ".git").exists() else None
    return {commit for commit in listed if commit.endswith("+") or (known is not None and commit not in known)}


def _ancestors(folder: Path) -> set[str] | None:
    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=60, check=True
        ).stdout

    try:
        if git("rev-parse", "--is-shallow-repository").strip() != "false":
            return None
        return set(git("rev-list", "HEAD").split())
    except (OSError, subprocess.SubprocessError):
        return None
