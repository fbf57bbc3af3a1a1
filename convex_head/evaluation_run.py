"""One evaluation in progress: gates, then every batch of every stage of every attack, then the record."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import torch
from torch import Tensor, nn

from convex_head import provenance
from convex_head.attacks.base import Attack
from convex_head.attacks.view import ModelView, attack_shape
from convex_head.errors import ResumeMismatchError
from convex_head.evaluation_progress import EvalProgress, Listener
from convex_head.model_checks import check_model, clean_logits
from convex_head.records import EvalRecord
from convex_head.resume import Progress, StageProgress
from convex_head.sanity_checks import check_larger_eps, check_stages, check_unchanged
from convex_head.shards import Whole
from convex_head.threat import ThreatModel


@dataclass
class EvaluationRun:
    """The state of one call of ``evaluate``; the model is already in eval mode on ``device``.

    Attributes:
        model: images (b, ...) to logits.
        images, labels: (n, ...) float32 and (n,) int64, on the CPU.
        threat, attacks, batch_size, seed, skip_broken: as given to ``evaluate``.
        saved: progress, possibly of an earlier process.
        listener: gets one event after each batch.
        shard: the processes that share the batches of every stage; all hold all points.
    """

    model: nn.Module
    images: Tensor
    labels: Tensor
    threat: ThreatModel
    attacks: Sequence[Attack]
    batch_size: int
    seed: int
    skip_broken: bool
    device: torch.device
    saved: Progress
    listener: Listener
    shard: Whole = field(default_factory=Whole)
    _plan: list[tuple[Attack, Attack]] = field(default_factory=list)
    _clock: float = field(default_factory=time.perf_counter)

    def gates(self, was_training: bool) -> None:
        """Check the model, or recall what the interrupted run found.

        Raises:
            ModelContractError: the model is refused.
            ResumeMismatchError: the model does not predict what it predicted before the interruption.
        """
        if self.saved.report:
            self._same_predictions()
            return
        report = check_model(
            self.model,
            self.images,
            self.labels,
            self.threat,
            batch_size=self.batch_size,
            device=self.device,
            was_training=was_training,
        )
        found = {
            "clean": _row(report.right),
            "num_classes": report.num_classes,
            "scale": report.scale,
            "flags": report.flags,
        }
        self.saved.report = self.shard.first_of(found)
        self._save()

    def attack_all(self) -> None:
        """Run what is left of every stage.

        Raises:
            AttackError: an attack does not fit the number of classes or the norm.
        """
        classes = self.saved.report["num_classes"]
        view = ModelView(self.model, tuple(self.images.shape[1:]), scale=self.saved.report["scale"])
        self._plan = [(attack, stage) for attack in self.attacks for stage in attack.stages(view, classes, self.threat)]
        for index, (attack, stage) in enumerate(self._plan):
            self._run_stage(view, attack, stage, index)

    def _run_stage(self, view: ModelView, attack: Attack, stage: Attack, index: int) -> None:
        points = self._points(attack, index)
        batches = points.split(self.batch_size) if len(points) else ()
        done = self.saved.stages.setdefault(_key(attack, stage), StageProgress(row="-" * len(self.labels)))
        self._tell(attack, stage, index, done.batches, len(batches))
        shape = attack_shape(tuple(self.images.shape[1:]))
        row = list(done.row)
        while done.batches < len(batches):
            batch, mine = batches[done.batches : done.batches + self.shard.size], self.shard.rank
            marks = torch.zeros(len(row), dtype=torch.int64, device=self.device)
            counts = torch.zeros(4, dtype=torch.float64, device=self.device)
            if mine < len(batch):
                points_here = batch[mine]
                result = stage.run(
                    view,
                    self.images[points_here].reshape(-1, *shape).to(self.device),
                    self.labels[points_here].to(self.device),
                    self.threat,
                    seed=self.seed,
                )
                marks[points_here.to(self.device)] = torch.where(result.broken.to(self.device), 1, 2)
                counts += counts.new_tensor([result.outside, result.forwards, result.backwards, result.seconds])
            self.shard.sum(marks, counts)
            for point in marks.nonzero().flatten().tolist():
                row[point] = "0" if marks[point] == 1 else "1"
            done.row = "".join(row)
            done.batches += len(batch)
            outside, forwards, backwards, seconds = counts.tolist()
            done.outside += round(outside)
            done.forwards += round(forwards)
            done.backwards += round(backwards)
            done.seconds += seconds
            self._save()
            self._tell(attack, stage, index, done.batches, len(batches))

    def _points(self, attack: Attack, index: int) -> Tensor:
        """Indices that the stage ``index`` gets: right without attack and not broken by an earlier stage."""
        alive = [mark == "1" for mark in self.saved.report["clean"]]
        for earlier, stage in self._plan[:index]:
            if self.skip_broken or earlier is attack:
                marks = self.saved.stages[_key(earlier, stage)].row
                alive = [a and mark != "0" for a, mark in zip(alive, marks, strict=True)]
        return torch.tensor(alive).nonzero().flatten()

    def sanity(self, fingerprint: str) -> None:
        """Flags that only show after the attacks."""
        if "after" in self.saved.report:
            return
        report = self.saved.report
        clean = torch.tensor([mark == "1" for mark in report["clean"]])
        robust = torch.tensor([mark == "1" for mark in self.robust_row()])
        stages = [(stage, self.saved.stages[_key(attack, stage)]) for attack, stage in self._plan]
        flags = check_stages(stages, len(clean))
        flags.update(
            check_larger_eps(
                self.model,
                self.images[clean],
                self.labels[clean],
                robust[clean],
                self.threat,
                scale=report["scale"],
                seed=self.seed,
                device=self.device,
            )
        )
        flags.update(
            check_unchanged(
                {"weights": fingerprint, "clean predictions": report["clean"][: self.batch_size]},
                {
                    "weights": provenance.model_fingerprint(self.model),
                    "clean predictions": self._clean_row(self.batch_size),
                },
            )
        )
        report["after"] = self.shard.first_of(flags)
        self._save()

    def robust_row(self) -> str:
        """n characters, "1" right without attack and under everything so far."""
        rows = [self.saved.report["clean"], *(stage.row for stage in self.saved.stages.values())]
        return "".join("1" if marks[0] == "1" and "0" not in marks else "0" for marks in zip(*rows, strict=True))

    def record(
        self,
        *,
        name: str,
        fingerprint: str,
        dataset_name: str,
        command: str | None,
        metadata: dict[str, Any],
    ) -> EvalRecord:
        """The record of the finished run."""
        report = self.saved.report
        outcomes = {attack.name: self._outcome(attack) for attack in self.attacks}
        flags = {**report["flags"], **report["after"]}
        return EvalRecord(
            name=name,
            model=provenance.model_description(self.model, fingerprint),
            dataset={
                "name": dataset_name,
                "fingerprint": self.saved.key["dataset"],
                "image_shape": list(self.images.shape[1:]),
                "num_classes": report["num_classes"],
            },
            threat=self.threat,
            n=len(self.labels),
            clean_correct=report["clean"].count("1"),
            robust_correct=self.robust_row().count("1"),
            attacks={attack.name: self._counts(attack, outcomes[attack.name]) for attack in self.attacks},
            clean=report["clean"],
            outcomes=outcomes,
            labels=tuple(self.labels.tolist()),
            flags=tuple(sorted(flags)),
            flag_details=flags,
            seed=self.seed,
            batch_size=self.batch_size,
            versions=dict(self.saved.key["versions"]),
            hardware=provenance.hardware(self.device),
            commit=provenance.commit(),
            command=command,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            seconds=self.saved.seconds,
            metadata=metadata,
        )

    def _stages_of(self, attack: Attack) -> dict[str, tuple[Attack, StageProgress]]:
        return {
            stage.name: (stage, self.saved.stages[_key(attack, stage)])
            for owner, stage in self._plan
            if owner is attack
        }

    def _outcome(self, attack: Attack) -> str:
        """One character a point over all stages: broken by any, else right under some, else not given."""
        rows = [done.row for _, done in self._stages_of(attack).values()]
        return "".join("0" if "0" in marks else ("1" if "1" in marks else "-") for marks in zip(*rows, strict=True))

    def _counts(self, attack: Attack, outcome: str) -> dict[str, Any]:
        stages = self._stages_of(attack)
        counts = _tally(outcome, self.saved.report["clean"].count("1"), [done for _, done in stages.values()])
        counts["settings"] = attack.settings()
        if list(stages) != [attack.name]:
            counts["stages"] = {
                name: {**_tally(done.row, _attempted(outcome), [done]), "settings": stage.settings()}
                for name, (stage, done) in stages.items()
            }
        return counts

    def _save(self) -> None:
        now = time.perf_counter()
        self.saved.seconds += now - self._clock
        self._clock = now
        self.saved.save()

    def _tell(self, attack: Attack, stage: Attack, index: int, batch: int, batches: int) -> None:
        self.listener(
            EvalProgress(
                attack=attack.name,
                stage=stage.name,
                batch=batch,
                batches=batches,
                stage_index=index,
                stages=len(self._plan),
                robust_correct=self.robust_row().count("1"),
                n=len(self.labels),
            )
        )

    def _clean_row(self, count: int) -> str:
        """Clean predictions of the first ``count`` points, made again."""
        logits = clean_logits(self.model, self.images[:count], self.batch_size, self.device)
        return _row(logits.argmax(dim=1) == self.labels[:count])

    def _same_predictions(self) -> None:
        found = self._clean_row(len(self.labels))
        differing = sum(a != b for a, b in zip(found, self.saved.report["clean"], strict=True))
        if differing and "nondeterministic" not in self.saved.report["flags"]:
            raise ResumeMismatchError(
                f"The model predicts {differing} of {len(found)} clean images otherwise than before the "
                "interruption, although its weights are the same. Delete the progress file to start again."
            )


def _key(attack: Attack, stage: Attack) -> str:
    return f"{attack.name}/{stage.name}"


def _row(right: Tensor) -> str:
    return "".join("1" if value else "0" for value in right.tolist())


def _attempted(outcome: str) -> int:
    """Points that were given to an attack."""
    return len(outcome) - outcome.count("-")


def _tally(row: str, available: int, done: Sequence[StageProgress]) -> dict[str, Any]:
    """The counts that :mod:`convex_head.records` describes, for one attack or one stage."""
    broken, right = row.count("0"), row.count("1")
    attempted = broken + right
    return {
        "attempted": attempted,
        "broken": broken,
        "skipped": available - attempted,
        "robust_correct": right,
        "success_rate": broken / attempted if attempted else None,
        "outside": sum(stage.outside for stage in done),
        "forwards": sum(stage.forwards for stage in done),
        "backwards": sum(stage.backwards for stage in done),
        "seconds": sum(stage.seconds for stage in done),
    }
