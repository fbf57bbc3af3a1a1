"""The leaderboard page in headless Chromium: sorting, filters, comparison, links, hostile entries."""

import json
from pathlib import Path

import pytest
from browser import CHROMIUM, Browser
from report_cases import HOSTILE, hostile_entry, make_record

from convex_head.report import (
    Entry,
    render_page,
)
from convex_head.statistics import mcnemar_exact, paired_interval

BOARD = Path(__file__).parents[1] / "leaderboard"
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs the program chromium")


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture
def browser(shared):
    """A browser that has seen nothing yet, on an empty page: what the test before showed need not be laid out anew."""
    shared.open("about:blank")
    shared.events.clear()
    shared.resize(1280)
    return shared


@pytest.fixture
def page(tmp_path):
    """A page of four entries, one of them hostile."""
    entries = [
        Entry.from_record(make_record("control", clean="1" * 40, robust="1" * 10 + "0" * 30, metadata={})),
        Entry.from_record(make_record("better", clean="1" * 40, robust="1" * 20 + "0" * 20)),
        Entry.from_record(make_record("elsewhere", eps="0.2")),
        hostile_entry(),
    ]
    path = tmp_path / "index.html"
    path.write_text(render_page(entries, title="Board"))
    return path.as_uri()


NAMES = "[...document.querySelectorAll('#models tbody tr:not([hidden]) a')].map(a => a.textContent)"
BY_NAME = """
const byName = (n) => [...document.querySelectorAll('#models tbody tr')].find(
  r => r.querySelector('a').textContent === n).querySelector('input');
"""


def click_heading(browser, name):
    heading = f"b => b.textContent === {json.dumps(name)}"
    browser.run(f"[...document.querySelectorAll('#models thead button')].find({heading}).click()")
    return browser.run(NAMES)


def choose(browser, column, text):
    browser.run(
        f"(() => {{ const s = document.querySelector('select[data-column={column}]');"
        f"s.selectedIndex = [...s.options].findIndex(o => o.textContent.trim() === {json.dumps(text)});"
        "s.dispatchEvent(new Event('input', {bubbles: true})); })()"
    )
    return browser.run(NAMES)


def test_sorting_filters_and_reset(browser, page):
    browser.open(page)
    start = browser.run(NAMES)
    assert click_heading(browser, "Robust %")[-1] == "control" and click_heading(browser, "Robust %")[0] == "control"
    # Entries without a radius are last in both directions.
    for _ in range(2):
        assert set(click_heading(browser, "Radius")[:2]) == {"better", "elsewhere"}
    browser.run("const box = document.getElementById('find')")
    browser.run("box.value = 'contr'; box.dispatchEvent(new Event('input', {bubbles: true}))")
    assert browser.run(NAMES) == ["control"]
    assert browser.run("document.getElementById('count').textContent") == "1 of 4 models"
    browser.run("box.value = ''")
    assert choose(browser, "head", "(none)") == ["control"]
    assert sorted(choose(browser, "head", "convex")) == ["better", "elsewhere"]
    browser.run("document.querySelector('button[type=reset]').click()")
    browser.wait(f"{NAMES}.length === 4")
    assert browser.run(NAMES) == start
    assert browser.run("[...document.querySelectorAll('[aria-sort]')].every(h => h.ariaSort === 'none')")


def test_filters_reach_plots_and_entries(browser, page):
    browser.open(page)
    shown = "[...document.querySelectorAll('{}')].filter(e => e.getClientRects().length).length"
    assert browser.run(shown.format(".point")) == 2 and browser.run(shown.format("main details[data-ids]")) == 4
    choose(browser, "head", "(none)")
    assert browser.run(shown.format(".point")) == 1 and browser.run(shown.format("main details[data-ids]")) == 1
    assert choose(browser, "eps", "0.2") == []
    assert browser.run(shown.format(".plots section")) == 0
    # A link to a hidden entry still shows it.
    browser.run("location.hash = '#entry-digits-better-linf-0-1'")
    browser.wait("document.getElementById('entry-digits-better-linf-0-1').getClientRects().length > 0")


def test_comparison_is_that_of_the_package_and_stays_in_sight(browser, page):
    browser.open(page)
    text = "document.getElementById('comparison').textContent"
    browser.run(BY_NAME + "byName('better').click()")
    assert browser.run(text) == "better: tick a second model to compare."
    browser.run("byName('control').click()")
    low, high = (f"{100 * bound:.1f}" for bound in paired_interval(10, 0, 40))
    assert "better minus control: 25.0 points" in browser.run(text)
    assert f"{low} to {high}" in browser.run(text) and f"p = {mcnemar_exact(10, 0):.4f}"[:10] in browser.run(text)
    browser.resize(1280, 300)
    browser.run("document.getElementById('models').scrollIntoView()")
    assert browser.run("document.getElementById('comparison').getBoundingClientRect().bottom <= innerHeight")
    browser.run("byName('elsewhere').click()")
    assert "cannot be compared" in browser.run(text)


def test_hostile_entries_are_text(browser, page):
    browser.open(page)
    assert browser.run("document.title") == "Board" and browser.complaints() == []
    assert any(name.startswith(HOSTILE[:60]) for name in browser.run(NAMES))
    assert browser.run("document.querySelectorAll('main script, img[onerror], a[href^=\"javascript\"]').length") == 0
    assert browser.requests() <= {page, "data:"}
    # The page's own script ran under the page's own policy.
    assert browser.run("document.getElementById('theme').textContent") in ("Dark colours", "Light colours")
    refused = browser.run(
        "new Promise((yes) => { addEventListener('securitypolicyviolation', e => yes(e.violatedDirective));"
        "document.body.append(Object.assign(document.createElement('script'), {text: 'owned = 1'})); })"
    )
    assert refused.startswith("script-src")
    assert browser.run("typeof owned") == "undefined"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280, 1920])
def test_published_page_fits_asks_for_nothing_and_says_nothing(browser, width, scheme):
    browser.resize(width)
    browser.command("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
    url = (BOARD / "index.html").as_uri()
    browser.open(url)
    browser.run("document.querySelectorAll('details').forEach(d => { d.open = true; })")
    assert browser.run("document.documentElement.scrollWidth - document.documentElement.clientWidth") == 0
    assert browser.requests() <= {url, "data:"} and browser.complaints() == []
    links = (
        "[...document.querySelectorAll('a[href^=\"#\"]')].map(a => decodeURIComponent(a.getAttribute('href').slice(1)))"
    )
    assert browser.run(f"{links}.filter(id => !document.getElementById(id))") == []
    # Headings go down one level at a time; every table says what it is, every picture and plot what it shows.
    assert browser.run(OUTLINE) == {"first": 1, "jumps": [], "tables": [], "pictures": [], "cells": [], "unnamed": []}
    # Text against its background, WCAG AA: 4.5 to 1.
    assert browser.run(CONTRAST) == []
    background = "getComputedStyle(document.body).backgroundColor"
    assert (browser.run(background) == "rgb(255, 255, 255)") == (scheme == "light")
    browser.run("document.getElementById('theme').click()")
    assert (browser.run(background) == "rgb(255, 255, 255)") == (scheme == "dark")
    browser.run("localStorage.clear()")
    wider = "[...document.querySelectorAll('{}')].filter(e => e.clientWidth && e.scrollWidth > e.clientWidth).length"
    if width == 390:  # model and robust accuracy without scrolling sideways, and the model stays while scrolling
        assert browser.run("document.querySelector('#models tbody b').getBoundingClientRect().right") <= 390
        browser.run("document.querySelector('.scroll').scrollLeft = 600")
        assert browser.run("document.querySelector('#models tbody th').getBoundingClientRect().left") <= 40
        assert browser.run(wider.format(".columns > div")) == 0
    else:
        assert browser.run(wider.format(".scroll, .columns, .columns > div")) == 0


OUTLINE = """(() => {
  const all = (selector) => [...document.querySelectorAll(selector)];
  const levels = all('h1, h2, h3, h4, h5, h6').map(h => Number(h.tagName[1]));
  const named = (e) => e.getAttribute('aria-label') || e.getAttribute('aria-hidden') === 'true';
  const text = (e) => e.getAttribute('aria-label') || e.textContent.trim() || (e.labels && e.labels.length);
  return {
    first: levels.filter(l => l === 1).length && levels[0],
    jumps: levels.filter((l, k) => k && l > levels[k - 1] + 1),
    tables: all('table').filter(t => !t.caption || !t.caption.textContent.trim()).map(t => t.id),
    pictures: [...all('img').filter(i => !i.alt), ...all('svg').filter(s => !named(s))].map(e => e.outerHTML),
    cells: [...all('th').filter(t => !t.scope), ...all('#models thead button').filter(
      b => !b.closest('th').hasAttribute('aria-sort'))].map(e => e.textContent),
    unnamed: all('a, button, input, select, summary').filter(e => !text(e)).map(e => e.outerHTML.slice(0, 60)),
  };
})()"""

CONTRAST = """(() => {
  const luminance = (text) => {
    const part = text.match(/[\\d.]+/g).slice(0, 3).map(Number).map(v => v / 255)
      .map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * part[0] + 0.7152 * part[1] + 0.0722 * part[2];
  };
  const behind = (e) => {
    for (; e; e = e.parentElement) {
      const colour = getComputedStyle(e).backgroundColor;
      if (!/, 0\\)$/.test(colour)) return colour;
    }
    return 'rgb(255, 255, 255)';
  };
  const poor = new Set();
  document.querySelectorAll('body *').forEach((e) => {
    if (![...e.childNodes].some(n => n.nodeType === 3 && n.data.trim()) || !e.getClientRects().length) return;
    if (e.closest('script, style')) return;
    const drawn = e.closest('svg'), filled = e.closest('.point');
    const under = filled ? getComputedStyle(filled.querySelector('circle')).fill : behind(e);
    const [a, b] = [luminance(drawn ? getComputedStyle(e).fill : getComputedStyle(e).color), luminance(under)];
    if ((Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05) < 4.5) poor.add(`${e.tagName}.${e.className}`);
  });
  return [...poor];
})()"""


def test_everything_works_from_the_keyboard(browser, page):
    browser.open(page)
    focused = "document.activeElement"
    browser.press("Tab")
    assert browser.run(f"{focused}.textContent") == "Skip to the table"
    assert browser.run(f"{focused}.getBoundingClientRect().left >= 0")
    seen = []
    while (
        not (tag := browser.run(f"{focused}.tagName + ' ' + ({focused}.type || '')")).startswith("A ") or len(seen) < 8
    ):
        assert browser.run(f"getComputedStyle({focused}).outlineStyle") == "solid", tag
        seen.append(tag)
        browser.press("Tab")
        assert len(seen) < 60, seen
    assert {"BUTTON button", "SELECT select-one", "INPUT search", "SUMMARY ", "INPUT checkbox"} <= set(seen)
    # The first link of the table has the focus: Enter opens its entry.
    browser.press("Enter")
    browser.wait("location.hash.startsWith('#entry-') && document.querySelector(location.hash).open")
    browser.run("document.querySelectorAll('#models thead button')[1].focus()")
    browser.press("Enter")
    assert browser.run("document.querySelectorAll('#models thead button')[1].closest('th').ariaSort") == "descending"
    browser.run("document.querySelector('#models tbody input').focus()")
    browser.press(" ")
    text = "document.getElementById('comparison').textContent"
    assert "tick a second" in browser.run(text)
    browser.run("document.querySelectorAll('#models tbody input')[1].focus()")
    browser.press(" ")
    assert "McNemar p" in browser.run(text) or "cannot be compared" in browser.run(text)
    # A filter by the arrow key, and the text field by typing.
    browser.run("document.querySelector('select[data-column=eps]').focus()")
    browser.press("ArrowDown")
    browser.wait("document.querySelector('select[data-column=eps]').selectedIndex === 1")
    assert len(browser.run(NAMES)) < 4
    browser.run("document.querySelector('button[type=reset]').focus()")
    browser.press("Enter")
    browser.wait(f"{NAMES}.length === 4")
    browser.run("document.getElementById('find').focus()")
    browser.press("Enter")  # does not leave the page
    browser.command("Input.insertText", text="elsewh")
    browser.wait(f"{NAMES}.length === 1")
