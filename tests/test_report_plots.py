"""Coordinates of the page's plots where models coincide or outnumber the colours."""

from report_cases import make_record

from convex_head.report import Entry
from convex_head.report.plots import curves, frontier


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
