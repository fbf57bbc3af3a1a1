"""The leaderboard page in headless Chromium: sorting, filters, comparison, links, hostile entries."""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from report_cases import hostile_entry, make_record

from convex_head.report import (
    Entry,
    render_page,
)
from convex_head.statistics import mcnemar_exact, paired_interval

CHROMIUM = shutil.which("chromium")


def chromium(page: Path, tmp_path: Path, script: str) -> dict:
    """Run ``script`` in the page after its own; it puts JSON into the title, which comes back parsed."""
    text = page.read_text()
    # The page's policy admits its own script only: this copy drops the policy and appends the probe.
    text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", text)
    probe = (
        "<script>window.errors=[];addEventListener('error',e=>errors.push(e.message));</script>",
        f"<script>{script}</script>",
    )
    copy = tmp_path / "probe.html"
    copy.write_text(text.replace("<head>", "<head>" + probe[0]).replace("</body>", probe[1] + "</body>"))
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    flags += " --disable-component-update --disable-sync --virtual-time-budget=2000"
    done = subprocess.run(
        [CHROMIUM, *flags.split(), f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", copy.as_uri()],
        capture_output=True,
        text=True,
        timeout=60,
    )
    found = re.search(r'<body data-result="([^"]*)"', done.stdout)
    assert found, done.stdout[-2000:] + done.stderr[-2000:]

    return json.loads(html.unescape(found[1]))


SCRIPT = """
const names = () => [...document.querySelectorAll('#models tbody tr:not([hidden]) a')].map(a => a.textContent);
const click = (k) => document.querySelectorAll('#models thead button')[k].click();
const result = {start: names()};
click(1); result.robustDown = names(); click(1); result.robustUp = names();
click(8); result.radius = names(); click(8); result.radiusUp = names();
const boxes = [...document.querySelectorAll('#models input')];
const byName = (n) => boxes.find(b => b.closest('tr').querySelector('a').textContent === n);
byName('better').click(); byName('control').click();
result.comparison = document.getElementById('comparison').textContent;
byName('elsewhere').click();
result.other = document.getElementById('comparison').textContent;
const find = document.getElementById('find'); find.value = 'contr';
find.dispatchEvent(new Event('input', {bubbles: true}));
result.filtered = names(); result.count = document.getElementById('count').textContent;
find.value = '';
const head = document.querySelector('select[data-column=head]');
const choose = (text) => {
  head.selectedIndex = [...head.options].findIndex(o => o.textContent.trim() === text);
  head.dispatchEvent(new Event('input', {bubbles: true}));
  return names().sort();
};
result.heads = [choose('(none)'), choose('convex'), choose('all').length];
const focusable = 'a[href], button, select, input, summary, [tabindex="0"]';
result.focusable = [...document.querySelectorAll(focusable)].every(e => e.tabIndex === 0);
result.dangling = [...document.querySelectorAll('a[href^="#"]')].filter(
  a => !document.getElementById(decodeURIComponent(a.getAttribute('href').slice(1)))).length;
result.wide = document.documentElement.scrollWidth - document.documentElement.clientWidth;
document.getElementById('theme').click();
result.theme = document.documentElement.dataset.theme;
location.hash = '#entry-digits-better-linf-0-1';
setTimeout(() => {
  result.open = document.getElementById('entry-digits-better-linf-0-1').open;
  result.owned = document.title;
  result.errors = window.errors;
  document.body.dataset.result = JSON.stringify(result);
}, 200);
"""


@pytest.mark.skipif(CHROMIUM is None, reason="needs the program chromium")
def test_page_in_a_browser(tmp_path):
    entries = [
        Entry.from_record(make_record("control", clean="1" * 40, robust="1" * 10 + "0" * 30, metadata={})),
        Entry.from_record(make_record("better", clean="1" * 40, robust="1" * 20 + "0" * 20)),
        Entry.from_record(make_record("elsewhere", eps="0.2")),
        hostile_entry(),
    ]
    page = tmp_path / "index.html"
    page.write_text(render_page(entries, title="Board"))
    result = chromium(page, tmp_path, SCRIPT)
    assert result["errors"] == [] and result["owned"] == "Board"
    assert result["robustDown"][-1] == "control" and result["robustUp"][0] == "control"
    # Entries without a radius are last in both directions.
    assert set(result["radius"][:2]) == set(result["radiusUp"][:2]) == {"better", "elsewhere"}
    low, high = (f"{100 * bound:.1f}" for bound in paired_interval(10, 0, 40))
    assert "better minus control: 25.0 points" in result["comparison"]
    assert f"{low} to {high}" in result["comparison"]
    assert f"p = {mcnemar_exact(10, 0):.4f}"[:10] in result["comparison"]
    assert "cannot be compared" in result["other"]
    assert result["filtered"] == ["control"] and result["count"] == "1 of 4 models"
    assert result["heads"] == [["control"], ["better", "elsewhere"], 4]
    assert result["focusable"] is True and result["dangling"] == 0 and result["wide"] == 0
    assert result["theme"] in ("dark", "light") and result["open"] is True


@pytest.mark.skipif(CHROMIUM is None, reason="needs the program chromium")
def test_the_policy_admits_the_page_script(tmp_path):
    """Without any change to the page: its own script runs (the theme button gets its state)."""
    page = tmp_path / "index.html"
    page.write_text(render_page([hostile_entry()], title="Board"))
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    flags += " --disable-component-update --disable-sync"
    done = subprocess.run(
        [CHROMIUM, *flags.split(), f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", page.as_uri()],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert re.search(r'<button id="theme" type="button">(Dark|Light) colours</button>', done.stdout)
    assert "<title>Board</title>" in done.stdout
    assert "Refused" not in done.stderr
