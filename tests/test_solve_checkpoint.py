"""A fit that was cut off goes on from its checkpoint and ends as if it never had been."""

from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_iris

from convex_head import ConvexRobustHead, activations
from convex_head.errors import ConvergenceWarning, ResumeMismatchError, SolveCheckpointError

X, Y = load_iris(return_X_y=True)


def head(reg: float = 0.01) -> ConvexRobustHead:
    return ConvexRobustHead(4, 3, reg=reg).double()


def test_an_interrupted_fit_ends_in_the_same_head(tmp_path: Path) -> None:
    path = tmp_path / "fit.ckpt"
    straight = head().fit(X, Y, tol=1e-3)
    assert straight.result_.iterations > 3
    for stop in (1, 2):
        with pytest.warns(ConvergenceWarning, match="interrupted"):
            head().fit(X, Y, tol=1e-3, checkpoint=path, callback=lambda line, at=stop: line.iteration >= at)
        assert path.is_file()
    resumed = head().fit(X, Y, tol=1e-3, checkpoint=path)
    assert torch.equal(resumed.directions, straight.directions) and torch.equal(resumed.readout, straight.readout)
    assert (resumed.result_.primal, resumed.result_.dual) == (straight.result_.primal, straight.result_.dual)
    assert [line.gap for line in resumed.result_.history] == [line.gap for line in straight.result_.history]
    assert resumed.result_.extra["evaluations"] == straight.result_.extra["evaluations"]
    assert torch.equal(resumed.result_.multipliers.slopes, straight.result_.multipliers.slopes)
    assert resumed.result_.multipliers.width == straight.result_.multipliers.width


def test_a_checkpoint_goes_on_in_the_other_precision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A smaller tol needs double precision: the problem is the same, and its multipliers and pairs are taken over."""
    monkeypatch.setattr(activations.polynomial, "_OWN_FLOAT32_ABOVE", 50)
    single, path = X.astype(np.float32), tmp_path / "c"
    with pytest.warns(ConvergenceWarning, match="interrupted"):
        rough = head().fit(single, Y, tol=1e-3, checkpoint=path, callback=lambda line: line.iteration >= 1)
    fine = head().fit(single, Y, tol=5e-4, checkpoint=path)
    assert fine.result_.gap <= 5e-4 < rough.result_.gap
    assert [line.gap for line in fine.result_.history][:1] == [line.gap for line in rough.result_.history][:1]
    assert rough.result_.primal >= fine.result_.dual and fine.result_.primal >= rough.result_.dual


def test_a_checkpoint_of_another_problem_or_a_damaged_one_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "fit.ckpt"
    head().fit(X, Y, checkpoint=path)
    with pytest.raises(ResumeMismatchError, match="another reg"):
        head(0.05).fit(X, Y, checkpoint=path)
    with pytest.raises(ResumeMismatchError, match="another data"):
        head().fit(X[::-1].copy(), Y, checkpoint=path)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ResumeMismatchError, match="damaged"):
        head().fit(X, Y, checkpoint=path)


def test_solvers_without_checkpoints_say_so(tmp_path: Path) -> None:
    with pytest.raises(SolveCheckpointError, match="found penalty"):
        head().fit(X, Y, solver="penalty", checkpoint=tmp_path / "c")
