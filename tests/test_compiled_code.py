"""Compiled code is kept on disk by one process at a time."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from filelock import FileLock, Timeout

pytest.importorskip("numba")
from numba.core.caching import IndexDataCacheFile

from convex_head.kernels.compiled import entry, numba


def doubled(x: np.ndarray) -> Any:
    return 2 * x.sum()


def test_code_is_saved_under_a_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))
    whole, locked = IndexDataCacheFile.save, []

    def watched(self: Any, key: Any, data: Any) -> None:
        with pytest.raises(Timeout):
            FileLock(Path(self._cache_path) / "saving.lock").acquire(timeout=0)
        locked.append(self._cache_path)
        whole(self, key, data)

    monkeypatch.setattr(IndexDataCacheFile, "save", watched)
    compiled = entry(doubled)
    assert [compiled(np.ones(3, dtype)) for dtype in (np.float32, np.float64)] == [6, 6]
    assert len(locked) == 2 and str(tmp_path) in locked[0]
    # Another process that starts now finds both.
    again = entry(doubled)
    assert [again(np.ones(3, dtype)) for dtype in (np.float32, np.float64)] == [6, 6]
    assert sum(again.stats.cache_hits.values()) == 2 and len(locked) == 2
