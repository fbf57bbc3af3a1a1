"""``evaluate``: a model, points, a threat model and attacks to one :class:`EvalRecord`.

    gates          what is no classifier is refused, what blinds attacks is flagged    (model_checks)
    attacks        cheapest first, each on the points that are still right             (attacks)
    sanity         what a masked gradient looks like from behind                       (sanity_checks)
    record         counts over all points, per-example results, cost, provenance       (records)

The unit of work is one batch of one stage of one attack. After each, progress goes to ``state``; since a
batch depends on nothing but the points that earlier stages left and on the seed, a run that was killed ends
in the same record.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from convex_head import provenance
from convex_head.attacks.adaptive import adaptive_attacks
from convex_head.attacks.isolation import evaluation_mode
from convex_head.attacks.registry import AttackLike, resolve_attacks
from convex_head.data import as_pair
from convex_head.errors import EvaluationWarning, InputError
from convex_head.evaluation_progress import Listener, listening
from convex_head.evaluation_run import EvaluationRun
from convex_head.records import EvalRecord
from convex_head.resume import Progress
from convex_head.shards import Shard, Whole
from convex_head.threat import ThreatModel


def evaluate(
    model: nn.Module,
    data: Any,
    threat: ThreatModel,
    attacks: AttackLike | Iterable[AttackLike] = ("autoattack",),
    *,
    batch_size: int = 128,
    seed: int = 0,
    state: str | os.PathLike[str] | None = None,
    n: int | None = None,
    device: torch.device | str | None = None,
    progress: Listener | bool | None = None,
    name: str | None = None,
    dataset_name: str | None = None,
    skip_broken: bool = True,
    adaptive: bool = True,
    command: str | None = None,
    metadata: dict[str, Any] | None = None,
    distributed: bool = False,
) -> EvalRecord:
    """Clean and robust accuracy of ``model``, point by point.

    Args:
        model: images in [0, 1] to logits (n, classes >= 2); any module, in any mode.
        data: a dataset name, a pair (images, labels) or a DataLoader.
        threat: norm and eps in pixel space.
        attacks: names, (name, settings) pairs or :class:`Attack` objects; cheap ones run first.
        batch_size: examples a pass and an attack; part of what is reproducible, as in AutoAttack.
        seed: every batch of every attack starts from it, as in AutoAttack.
        state: file to keep progress in. The same call goes on from it; another model, dataset, threat,
            attack list, seed, batch size or version is refused.
        n: use the first n points.
        device: where to run; the model's device by default. The model is moved there and back.
        progress: True for a progress bar on the terminal, or a callable that gets :class:`EvalProgress`.
        name: name of the record; the model's class by default.
        dataset_name: name of the dataset in the record; known already when ``data`` is a name.
        skip_broken: False gives every attack all points that are right without attack, so that each
            attack's ``robust_correct`` is its own and not that of a union.
        adaptive: add the attacks that know the model's head (``feature-exact`` for convex heads, ``soft-gate`` for
            gated ones) to those asked for; they enter the union and the record.
        command, metadata: kept in the record.
        distributed: share the batches of every stage between the processes of torch.distributed, which all make this
            call; the record is the one of a single process, in all of them. The first one keeps ``state``.

    Returns:
        the record; ``flags`` is empty for an honest model.

    Raises:
        ModelContractError: the model is no map from images to finite logits of two classes or more.
        InputError: images outside [0, 1], labels that are no class indices, a batch size below 1.
        UnknownAttackError, AttackError: an attack is not known or does not fit.
        ResumeMismatchError: ``state`` belongs to another evaluation or is damaged.
        ShardError: torch.distributed is not initialised, or another process was lost.

    Warns:
        EvaluationWarning: the record has flags.
    """
    if not isinstance(threat, ThreatModel):
        raise InputError(f"threat is a ThreatModel, found {threat!r}; pass ThreatModel('Linf', '8/255').")
    if batch_size < 1:
        raise InputError(f"batch_size is at least 1, found {batch_size}.")
    images, labels = as_pair(data, n=n)
    chosen = resolve_attacks(attacks)
    if adaptive:
        extra = adaptive_attacks(model, threat, chosen)
        chosen = resolve_attacks((*chosen, *extra)) if extra else chosen
    home = _device_of(model)
    target = home if device is None else torch.device(device)
    was_training = any(module.training for module in model.modules())
    fingerprint = provenance.model_fingerprint(model)
    key = {
        "model": fingerprint,
        "dataset": provenance.tensor_fingerprint(images, labels),
        "n": len(images),
        "threat": threat.to_dict(),
        "attacks": [[attack.name, attack.settings()] for attack in chosen],
        "seed": seed,
        "batch_size": batch_size,
        "skip_broken": skip_broken,
        "versions": provenance.versions(),
    }
    shard = Shard(len(images), target) if distributed else Whole()
    saved = Progress.open(state if shard.rank == 0 else None, key)
    if distributed:
        found = shard.first_of((saved.report, saved.stages, saved.seconds))
        saved.report, saved.stages, saved.seconds = found
    if target != home:
        model.to(target)
    try:
        with evaluation_mode(model), listening(progress) as listener:
            run = EvaluationRun(
                model=model,
                images=images,
                labels=labels,
                threat=threat,
                attacks=chosen,
                batch_size=batch_size,
                seed=seed,
                skip_broken=skip_broken,
                device=target,
                saved=saved,
                listener=listener,
                shard=shard,
            )
            run.gates(was_training)
            run.attack_all()
            run.sanity(fingerprint)
        record = run.record(
            name=name or type(model).__name__,
            fingerprint=fingerprint,
            dataset_name=dataset_name or str(data if isinstance(data, str) else getattr(data, "name", "custom")),
            command=command,
            metadata=metadata or {},
        )
    finally:
        if target != home:
            model.to(home)
    if record.flags:
        details = "; ".join(f"{flag}: {record.flag_details[flag]}" for flag in record.flags)
        warnings.warn(
            f"The robust accuracy of {record.name} is not to be trusted as it stands. {details}.",
            EvaluationWarning,
            stacklevel=2,
        )
    return record


def _device_of(model: nn.Module) -> torch.device:
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    return torch.device("cpu")
