"""Records as a table on the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from convex_head.console import percent, printable, table
from convex_head.records import EvalRecord
from convex_head.report.values import fact
from convex_head.statistics import Comparison, compare

SIGNIFICANT = 0.05


# What a table shows, from a wide terminal to a narrow one.
_ATTACKS, _COSTS, _CERTIFICATE, _INTERVAL, _ACCURACIES = range(5)
_NAME_WRAPS = 24


def results_table(
    records: Sequence[EvalRecord], title: str, controls: dict[str, EvalRecord], *, width: int = 160
) -> Table:
    """One line a record: clean and robust accuracy, what is left after each attack, certificate, cost.

    Args:
        records: in the order of the lines; a rule is drawn where the backbone's training changes.
        title: above the table.
        controls: name of a record -> the record that it is compared with.
        width: of the terminal; where it is narrow, what matters least stays in the records: first the single attacks,
            then radius and seconds, then gap and comparison, then the interval.
    """
    measure = Console(width=10_000)
    longest = max((len(record.name) for record in records), default=0)
    wraps = 0 if _labels(records) != ["model"] else max(0, longest - _NAME_WRAPS)
    for detail in range(5):
        found = _table(records, title, controls, detail)
        if measure.measure(found).maximum - wraps <= width:
            break
    return found


def _table(records: Sequence[EvalRecord], title: str, controls: dict[str, EvalRecord], detail: int) -> Table:
    attacks = attack_names(records) if detail <= _ATTACKS else []
    costs, interval = detail <= _COSTS, detail <= _INTERVAL
    certified = detail <= _CERTIFICATE and any(gap_text(record) for record in records)
    compared = detail <= _CERTIFICATE and bool(controls)
    numbers = ["clean %", "robust % (95 %)"] if interval else ["clean", "robust"]
    numbers += map(short_attack, attacks)
    numbers += (["radius"] if costs and certified else []) + (["gap"] if certified else [])
    numbers += (["vs control"] if compared else []) + (["seconds"] if costs else [])
    labels = _labels(records)
    result = table(title, [*labels, *numbers], right=frozenset(numbers))
    for record, following in zip(records, [*records[1:], None], strict=True):
        low, high = record.interval
        names = [record.metadata.get(label, "") for label in labels] if len(labels) > 1 else [record.name]
        result.add_row(
            *(Text(printable(str(name))) for name in names),
            percent(record.clean_accuracy),
            Text.assemble(
                (percent(record.robust_accuracy), "bold"),
                ("!" if record.flags else "", "bold red"),
                f" ({percent(low)}-{percent(high)})" if interval else "",
            ),
            *(_after(record, name) for name in attacks),
            *([_number(record, "radius", "g")] if costs and certified else []),
            *([gap_text(record)] if certified else []),
            *([_difference(record, controls.get(record.name))] if compared else []),
            *([f"{record.seconds:.0f}"] if costs else []),
            end_section=following is not None and following.metadata.get("training") != record.metadata.get("training"),
        )
    return result


def _labels(records: Sequence[EvalRecord]) -> list[str]:
    """Columns that name a record."""
    return ["training", "head"] if all("head" in record.metadata for record in records) else ["model"]


def attack_names(records: Iterable[EvalRecord]) -> list[str]:
    """Every attack once, each before those that ran after it in some record, as far as the records agree."""
    names: list[str] = []
    for record in sorted(records, key=lambda record: -len(record.attacks)):
        following = len(names)
        for name in reversed(list(record.attacks)):
            if name in names:
                following = names.index(name)
            else:
                names.insert(following, name)
    return names


def short_attack(name: str) -> str:
    """ "torchattacks:PGD(steps=20)" as "PGD"."""
    return name.partition("(")[0].rpartition(":")[2]


def gap_text(record: EvalRecord) -> str:
    """The certificate: relative gap, with the solver's status unless it converged."""
    gap, status = fact(record, "gap", (int, float)), fact(record, "status", str)
    if gap is None:
        return ""
    return f"{gap:.1e}" + ("" if status in (None, "converged") else f" {status}")


def comparison_lines(records: Iterable[EvalRecord], controls: dict[str, EvalRecord]) -> list[str]:
    """One sentence for each record that has a control: difference, interval, p, and whether it is better."""
    lines = []
    for record in records:
        if record.name in controls:
            found = compare(record, controls[record.name])
            lines.append(f"{found}: {'better' if is_better(found) else 'not better'}")
    return lines


def is_better(comparison: Comparison) -> bool:
    """A is more robust than B, and the paired test at 5 % agrees."""
    return comparison.difference > 0 and comparison.p_value < SIGNIFICANT


def footnotes(records: Iterable[EvalRecord]) -> list[str]:
    """How to read the numbers: threat, points, attacks, intervals, versions. One line each."""
    listed = list(records)
    if not listed:
        return []
    first = listed[0]
    attacks = ", ".join(attack_names(listed))
    lines = [
        f"{first.dataset.get('name', '')}, {first.threat}, n = {first.n}, seed {first.seed}. "
        "Robust: right without attack and under every attack.",
        f"Attacks in this order, each on the points still right, so columns count what is left: {attacks}.",
        "95 %: Wilson interval of the robust accuracy. Comparisons are paired (exact McNemar test on the same "
        f"points); not better: not above the control, or p >= {SIGNIFICANT}.",
        ", ".join(f"{package} {version}" for package, version in first.versions.items()),
    ]
    lines += [
        f"! {record.name} is flagged: {flag}: {record.flag_details.get(flag, '')}"
        for record in listed
        for flag in record.flags
    ]
    return lines


def _after(record: EvalRecord, attack: str) -> str:
    entry = record.attacks.get(attack)
    return "" if entry is None else percent(entry["robust_correct"] / record.n)


def _difference(record: EvalRecord, control: EvalRecord | None) -> Text:
    if control is None:
        return Text("")
    found = compare(record, control)
    return Text(f"{100 * found.difference:+.1f}", style="green" if is_better(found) else "")


def _number(record: EvalRecord, key: str, style: str) -> str:
    value = fact(record, key, (int, float))
    return "" if value is None else format(value, style)
