"""RobustBench's JSON entries: records to them and from them.

An official entry has the fields link, name, authors, additional_data (bool), number_forward_passes (int),
dataset, venue, architecture, eps (text such as "8/255"), and clean_acc, reported, autoattack_acc (texts of percents
such as "84.59"); ``external`` where another evaluation than AutoAttack is lower. The norm is the name of its folder.
This module imports no torch.
"""

from __future__ import annotations

from typing import Any

from convex_head.errors import RecordError, ThreatModelError
from convex_head.records import EvalRecord
from convex_head.threat import ThreatModel

# RobustBench evaluates on the whole test set, of ImageNet on 5,000 images.
_EXAMPLES = {"cifar10": (10_000, 10), "cifar100": (10_000, 100), "imagenet": (5_000, 1000)}


def export_record(
    record: EvalRecord,
    *,
    name: str | None = None,
    authors: str,
    link: str,
    venue: str,
    architecture: str,
    additional_data: bool,
    reported: str | None = None,
    number_forward_passes: int = 1,
) -> dict[str, Any]:
    """One entry of RobustBench's model_info, exactly its fields.

    Args:
        record: an unflagged record with "autoattack" on cifar10, cifar100 or imagenet, Linf or L2.
        name: title of the paper; the record's name by default.
        authors, link, venue, architecture, additional_data: as RobustBench shows them.
        reported: robust accuracy in percent that the authors report; AutoAttack's by default.
        number_forward_passes: forward passes of one prediction.

    Returns:
        the entry; ``external`` is there only where attacks beside AutoAttack broke more points.

    Raises:
        RecordError: the record does not fit.
    """
    dataset = record.dataset.get("name")
    if dataset not in _EXAMPLES or record.threat.norm not in ("Linf", "L2"):
        raise RecordError(
            f"RobustBench lists {', '.join(_EXAMPLES)} under Linf or L2; the record is on {dataset!r} under "
            f"{record.threat}. Export a record that fits."
        )
    if record.flags:
        raise RecordError(f"A flagged record is not exported; found {', '.join(record.flags)}.")
    if "autoattack" not in record.attacks:
        raise RecordError(f"The record has no 'autoattack'; it has {', '.join(record.attacks) or 'none'}.")
    autoattack = record.attacks["autoattack"]["robust_correct"]
    entry: dict[str, Any] = {
        "link": link,
        "name": record.name if name is None else name,
        "authors": authors,
        "additional_data": additional_data,
        "number_forward_passes": number_forward_passes,
        "dataset": dataset,
        "venue": venue,
        "architecture": architecture,
        "eps": record.threat.eps_text,
        "clean_acc": _percent(record.clean_correct, record.n),
        "reported": _percent(autoattack, record.n) if reported is None else reported,
        "autoattack_acc": _percent(autoattack, record.n),
    }
    if record.robust_correct < autoattack:
        entry["external"] = _percent(record.robust_correct, record.n)
    return entry


def import_record(entry: dict[str, Any], *, threat_model: str, n: int | None = None) -> EvalRecord:
    """A record of one of RobustBench's entries; counts only, since entries have no per-example results.

    Args:
        entry: the parsed JSON.
        threat_model: "Linf" or "L2", the name of the entry's folder.
        n: points that it was evaluated on; RobustBench's usual number by default.

    Raises:
        RecordError: a field is missing or is not understood.
    """
    try:
        dataset = entry["dataset"]
        examples, classes = _EXAMPLES[dataset]
        count = examples if n is None else n
        eps = entry["eps"]
        threat = ThreatModel(threat_model, eps if isinstance(eps, str) else float(eps))
        clean, autoattack, robust = (
            _count(entry, field, count)
            for field in ("clean_acc", "autoattack_acc", "external" if entry.get("external") else "autoattack_acc")
        )
    except (KeyError, TypeError, ValueError, ThreatModelError) as problem:
        raise RecordError(
            f"An entry of RobustBench has dataset, eps, clean_acc and autoattack_acc; {problem!r} in {entry!r}."
        ) from problem
    attacks: dict[str, dict[str, Any]] = {
        "autoattack": {
            "attempted": clean,
            "broken": clean - autoattack,
            "skipped": 0,
            "robust_correct": autoattack,
        }
    }
    if robust < autoattack:
        attacks["external"] = {
            "attempted": autoattack,
            "broken": autoattack - robust,
            "skipped": clean - autoattack,
            "robust_correct": robust,
        }
    return EvalRecord(
        name=str(entry.get("name") or "RobustBench entry"),
        model={"class": str(entry.get("architecture") or "unknown"), "parameters": None, "fingerprint": None},
        dataset={"name": dataset, "fingerprint": None, "image_shape": None, "num_classes": classes},
        threat=threat,
        n=count,
        clean_correct=clean,
        robust_correct=min(robust, autoattack),
        attacks=attacks,
        seed=None,
        metadata={"robustbench": entry},
    )


def _percent(correct: int, n: int) -> str:
    return f"{100 * correct / n:.2f}"


def _count(entry: dict[str, Any], field: str, n: int) -> int:
    percent = float(entry[field])
    if not 0 <= percent <= 100:
        raise ValueError(f"{field} is {entry[field]!r}")
    return round(percent / 100 * n)
