"""Orders and places: the columns of attacks, and plots where models coincide or outnumber the colours."""

import dataclasses

from report_cases import make_record

from convex_head.report import Entry
from convex_head.report.plots import curves, frontier
from convex_head.report.terminal import attack_names, footnotes


def test_equal_points_of_the_frontier_stand_side_by_side():
    """The curves of more models than there are colours differ in their dashes."""
    entries = [Entry.from_record(make_record(f"m{k}")) for k in range(8)]
    points = frontier(entries)["points"]
    assert len({point["x"] for point in points[:4]}) == 4 and len({point["y"] for point in points}) == 1
    assert min(point["x"] for point in points) >= frontier(entries)["left"]
    entries += [Entry.from_record(make_record(f"m{k}", eps="0.2")) for k in range(8)]
    (plot,) = curves(entries)
    assert len({(line["series"], line["dash"]) for line in plot["lines"]}) == 8
    assert [text for _, text in plot["ticks_x"]] == ["0", "0.1", "0.2"]


def test_columns_of_attacks_are_in_the_order_in_which_they_ran():
    counts = {"attempted": 9, "broken": 0, "skipped": 0, "robust_correct": 9}
    outcomes = "1" * 9 + "-"
    first = make_record(
        attacks={"pgd": counts, "autoattack": counts},
        outcomes=dict.fromkeys(["pgd", "autoattack"], outcomes),
        robust_correct=9,
    )
    names = ["pgd", "feature-exact", "autoattack"]
    longer = make_record(
        attacks=dict.fromkeys(names, counts), outcomes=dict.fromkeys(names, outcomes), robust_correct=9
    )
    assert attack_names([first, longer]) == names
    assert any("pgd, feature-exact, autoattack" in line for line in footnotes([first, longer]))
    orders = (["pgd", "mi", "fe", "aa"], ["ce", "fe", "t"], ["fe", "aa"], [])
    bare = dataclasses.replace(first, outcomes={}, clean="", attacks={})
    several = [dataclasses.replace(bare, attacks=dict.fromkeys(order, counts)) for order in orders]
    found = attack_names(several)
    assert sorted(found) == ["aa", "ce", "fe", "mi", "pgd", "t"]
    assert all([name for name in found if name in order] == order for order in orders)
