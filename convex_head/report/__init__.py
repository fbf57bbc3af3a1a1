"""What records look like: a terminal table, a leaderboard page, a report. Knows only records; imports no torch."""

from convex_head.report.consistency import check_together
from convex_head.report.document import render_report
from convex_head.report.entries import Entry, check_admissible, is_bounded, load_entries, ranked
from convex_head.report.latex import render_latex
from convex_head.report.markdown import render_markdown
from convex_head.report.page import render_page
from convex_head.report.pdf import write_pdf

__all__ = [
    "Entry",
    "check_admissible",
    "check_together",
    "is_bounded",
    "load_entries",
    "ranked",
    "render_latex",
    "render_markdown",
    "render_page",
    "render_report",
    "write_pdf",
]
