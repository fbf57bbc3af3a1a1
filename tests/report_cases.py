"""Records and entries for the tests of the report, one of them hostile."""

from convex_head.records import EvalRecord
from convex_head.report import Entry
from convex_head.threat import ThreatModel

HOSTILE = "<_</script><script>document.title='owned'</script><img src=x onerror=alert(1)>\"'`{{7*7}}|*"


def make_record(name="m", clean="1111111110", robust="1111100000", eps="0.1", **fields) -> EvalRecord:
    """A record whose one attack leaves ``robust`` of ``clean``; ``fields`` replace the rest."""
    outcome = "".join(r if c == "1" else "-" for c, r in zip(clean, robust, strict=True))
    counts = {
        "attempted": outcome.count("0") + outcome.count("1"),
        "broken": outcome.count("0"),
        "skipped": 0,
        "robust_correct": outcome.count("1"),
        "forwards": 10,
        "backwards": 5,
        "seconds": 0.5,
    }
    values = {
        "name": name,
        "model": {"class": "Net", "parameters": 3, "fingerprint": name},
        "dataset": {"name": "digits", "fingerprint": "f"},
        "threat": ThreatModel("Linf", eps),
        "n": len(clean),
        "clean_correct": clean.count("1"),
        "robust_correct": outcome.count("1"),
        "attacks": {"autoattack": counts},
        "clean": clean,
        "outcomes": {"autoattack": outcome},
        "labels": tuple(k % 2 for k in range(len(clean))),
        "versions": {"torch": "2"},
        "command": "convex-head bench",
        "metadata": {"training": "sam", "head": "convex", "radius": 0.5, "gap": 1e-3, "status": "converged"},
    }
    return EvalRecord(**{**values, **fields})


def hostile_entry(name=HOSTILE) -> Entry:
    record = make_record(
        name,
        metadata={"training": HOSTILE, "head": HOSTILE, "radius": float("inf"), "x": "y" * 10**6, HOSTILE: 1},
        versions={HOSTILE: HOSTILE},
        command=HOSTILE,
        dataset={"name": HOSTILE, "fingerprint": HOSTILE},
    )
    return Entry.from_record(record, link="javascript:alert(1)", authors=HOSTILE, venue=HOSTILE)
