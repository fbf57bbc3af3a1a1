"""The bench on a terminal: bars while it runs, then table, comparisons, footnotes, and the page."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.progress import Progress, TaskID

from convex_head.bench import BenchSettings, plan, record_path, run_bench
from convex_head.console import error_line, finish_task, json_out, messages, printable, progress_bars, results
from convex_head.records import EvalRecord
from convex_head.report import Entry, render_page
from convex_head.report.terminal import comparison_lines, footnotes, results_table
from convex_head.workers import Event


def run_on_console(settings: BenchSettings, out: Path, *, jobs: int, as_json: bool, quiet: bool, debug: bool) -> bool:
    """Run, show and write; True if every row exists.

    The page is written from the rows that exist, also after an interrupt.
    """
    console = messages(quiet=quiet)
    display = _Display(console, len(plan(settings, out)), debug)
    try:
        with display.bars:
            records = run_bench(settings, out, jobs=jobs, listener=display)
    except KeyboardInterrupt:
        done = sum(record_path(out, row).exists() for row in settings.rows())
        console.print(f"{done} of {len(settings.rows())} rows are in {out}/records")
        raise
    page = out / "index.html"
    entries = [Entry.from_record(record) for record in records]
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(render_page(entries, title="convex-head bench", note=_NOTE), encoding="utf-8")
    if as_json:
        json_out([record.to_dict() for record in records])
    else:
        _show(records)
        console.print(f"records: {out}/records    page: {page}", style="bold", markup=False)
    return len(records) == len(settings.rows())


_NOTE = (
    "Small backbones trained on the spot; heads on the same frozen features. Radius and reg of the convex head were "
    "chosen on a fifth of the training images: that head had not seen them, but the backbone was trained on them, so "
    "they look easier than new images. Nothing was chosen on the test split. The linear head is the control."
)


def _show(records: list[EvalRecord]) -> None:
    """Table and footnotes on stdout."""
    linear = {record.metadata["training"]: record for record in records if record.metadata["head"] == "linear"}
    controls = {
        record.name: linear[record.metadata["training"]]
        for record in records
        if record.metadata["head"] == "convex" and record.metadata["training"] in linear
    }
    console = results()
    if records:
        console.print(
            results_table(records, "convex-head bench (control: the linear head)", controls, width=console.width)
        )
    for line in comparison_lines(records, controls):
        console.print(printable(line), markup=False)
    for line in [*footnotes(records), _NOTE]:
        console.print(printable(line), markup=False, style="dim")


class _Display:
    """Events as bars; without a terminal, one line a finished task."""

    def __init__(self, console: Console, tasks: int, debug: bool) -> None:
        self.console = console
        self.debug = debug
        self.bars: Progress = progress_bars(console)
        self.all = self.bars.add_task("all", total=tasks, note="")
        self.shares: dict[str, float] = {}
        self.lines: dict[str, TaskID] = {}

    def __call__(self, event: Event) -> None:
        if event.kind == "start":
            self.lines[event.task] = self.bars.add_task(event.task, total=1.0, note="")
        elif event.kind == "progress":
            self.bars.update(self.lines[event.task], completed=event.fraction, note=event.text)
        else:
            self._finish(event)
        self.shares[event.task] = 1.0 if event.kind in ("done", "failed") else event.fraction
        self.bars.update(self.all, completed=sum(self.shares.values()))

    def _finish(self, event: Event) -> None:
        task = self.lines.pop(event.task, None)
        if event.kind == "done" and task is not None:
            finish_task(self.bars, task, f"done {event.task}")
            return
        error_line(self.console, f"{event.task}: {event.text}")
        if self.debug and event.details:
            self.console.print(event.details, markup=False)
        if task is not None:
            self.bars.remove_task(task)
            self.bars.refresh()
