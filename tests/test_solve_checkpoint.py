"""A fit that was cut off goes on from its checkpoint and ends as if it never had been."""

from pathlib import Path

import pytest
import torch
from sklearn.datasets import load_iris

from convex_head import ConvexRobustHead
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
