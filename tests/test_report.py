"""Leaderboard entries, Markdown and page: correct numbers, hostile input, and no torch."""

import io
import json
import re
from html.parser import HTMLParser

import pytest
from report_cases import HOSTILE, hostile_entry, make_record
from rich.console import Console

from convex_head.errors import EntryError, InputError
from convex_head.report import (
    Entry,
    check_admissible,
    load_entries,
    ranked,
    render_latex,
    render_markdown,
    render_page,
    render_report,
    write_pdf,
)
from convex_head.report.entries import ROBUSTBENCH_FIELDS
from convex_head.report.pictures import is_png
from convex_head.report.plots import curves, frontier
from convex_head.report.terminal import comparison_lines, footnotes, gap_text, results_table
from convex_head.report.values import plain, slug


def test_entry_has_robustbench_fields_and_survives_the_disk(tmp_path):
    entry = Entry.from_record(make_record("My model, v2!"), link="https://example.org", authors="A, B")
    path = entry.save(tmp_path)
    assert path.name == "digits-my-model-v2-linf-0-1.json"
    payload = json.loads(path.read_text())
    assert set(payload) == {*ROBUSTBENCH_FIELDS, "convex_head"}
    assert (payload["clean_acc"], payload["autoattack_acc"], payload["eps"]) == ("90.00", "50.00", "0.1")
    assert load_entries(tmp_path) == [entry]


def test_attacks_beside_autoattack_are_external(tmp_path):
    record = make_record(clean="1111", robust="1100")
    more = {"attempted": 2, "broken": 1, "skipped": 2, "robust_correct": 1}
    both = make_record(
        clean="1111",
        robust="1100",
        robust_correct=1,
        attacks={**record.attacks, "feature-exact": more},
        outcomes={**record.outcomes, "feature-exact": "10--"},
    )
    entry = Entry.from_record(both)
    assert entry.robustbench["autoattack_acc"] == "50.00" and entry.robustbench["external"] == "25.00"
    entry.save(tmp_path)
    assert load_entries(tmp_path) == [entry]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p.pop("venue"), r"missing \['venue'\]"),
        (lambda p: p.update(extra=1), r"unknown \['extra'\]"),
        (lambda p: p.update(additional_data="no"), "additional_data must be bool"),
        (lambda p: p.update(number_forward_passes=True), "number_forward_passes must be int"),
        (lambda p: p.update(authors="x" * 301), "301 characters"),
        (lambda p: p.update(clean_acc="99.00"), "clean_acc is '99.00', but the record gives '90.00'"),
        (lambda p: p.update(external="10.00"), "external is '10.00', but the record gives None"),
        (lambda p: p["convex_head"].update(robust_correct=9), "robust_correct is 9"),
        (lambda p: p["convex_head"].update(interval=[0, 1]), "interval"),
        (lambda p: p.update(convex_head=[]), "schema"),
    ],
)
def test_inconsistent_entries_are_refused(tmp_path, change, message):
    path = Entry.from_record(make_record()).save(tmp_path)
    payload = json.loads(path.read_text())
    change(payload)
    path.write_text(json.dumps(payload))
    with pytest.raises(EntryError, match=message):
        Entry.load(path)


def test_nan_and_damaged_files_are_refused(tmp_path):
    path = Entry.from_record(make_record()).save(tmp_path)
    path.write_text(path.read_text().replace("0.5", "NaN", 1))
    with pytest.raises(EntryError, match="NaN"):
        Entry.load(path)
    path.write_text("{")
    with pytest.raises(EntryError, match="Cannot read"):
        Entry.load(path)


def test_flagged_and_unverifiable_entries_are_not_listed():
    flagged = make_record(flags=("logit_scale",), flag_details={"logit_scale": "1e6"})
    with pytest.raises(EntryError, match="logit_scale: 1e6"):
        check_admissible(Entry.from_record(flagged))
    bare = make_record(clean="", robust="", outcomes={}, n=10, clean_correct=9, robust_correct=5)
    with pytest.raises(EntryError, match="per-example"):
        check_admissible(Entry.from_record(bare))
    check_admissible(Entry.from_record(make_record()))


def test_ranking():
    names = [("b", "1110000000", "0.1"), ("a", "1111110000", "0.1"), ("c", "1111111111", "0.2")]
    entries = [Entry.from_record(make_record(n, robust=r, eps=e)) for n, r, e in names]
    assert [entry.id for entry in ranked(entries)] == ["digits-a-linf-0-1", "digits-b-linf-0-1", "digits-c-linf-0-2"]


@pytest.mark.parametrize(
    ("text", "expected"), [("A b", "a-b"), ("../../etc", "etc"), ("###", "entry"), ("x" * 200, "x" * 80)]
)
def test_slug(text, expected):
    assert slug(text) == expected


class Page(HTMLParser):
    """Tags, text of cells, and whether everything that opens closes."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.open: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in {"meta", "link", "input", "img", "wbr"}:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def all(self, tag):
        return [attrs for name, attrs in self.tags if name == tag]


def test_page_shows_every_entry_once_and_is_self_contained():
    entries = [Entry.from_record(make_record(name, robust=r)) for name, r in [("a", "1" * 10), ("b", "0" * 10)]]
    text = render_page(entries, title="T", note="N")
    page = Page(text)
    assert [row["id"] for row in page.all("details") if "id" in row] == [
        "entry-digits-a-linf-0-1",
        "entry-digits-b-linf-0-1",
    ]
    assert not re.search(r"""(src|href)=["']?(https?:)?//""", text)
    assert len(page.all("h1")) == 1 and page.all("html") == [{"lang": "en"}]
    assert all("scope" in cell for cell in page.all("th"))
    assert all("aria-label" in plot for plot in page.all("svg") if plot.get("role") == "img")
    assert "90.0" in text and "convex-head bench" in text


def test_empty_board_is_a_page():
    assert "0 of 0 models" in render_page([])
    assert "# Leaderboard" in render_markdown([])


def test_hostile_entries_stay_text():
    calm = Page(render_page([Entry.from_record(make_record("a")), Entry.from_record(make_record("b"))]))
    text = render_page([hostile_entry(), Entry.from_record(make_record("b"))])
    page = Page(text)
    assert len(page.all("script")) == len(calm.all("script")) == 2
    assert page.all("img") == [] and "javascript:" not in "".join(a.get("href", "") for a in page.all("a"))
    assert not any(name.startswith("on") for _, attrs in page.tags for name in attrs)
    assert len(text) < 200_000  # a megabyte of text was clipped
    policy = next(meta["content"] for meta in page.all("meta") if "http-equiv" in meta)
    assert "default-src 'none'" in policy and "script-src 'sha256-" in policy


# Values that JSON allows and a careless page does not survive; each must still give a page.
ODD = {
    "huge integers": {"metadata": {"gap": 10**400, "radius": 10**400, "x": 10**400, "neurons": -(10**4000)}},
    "infinite costs": {
        "attacks": {
            "autoattack": {
                "attempted": 9,
                "broken": 4,
                "robust_correct": 5,
                "forwards": 10**400,
                "backwards": "<script>",
                "seconds": float("inf"),
            }
        }
    },
    "nan": {"metadata": {"gap": float("nan"), "radius": float("nan"), "x": float("nan")}},
    "surrogates": {
        "metadata": {"training": "\ud800", "head": "\ud800"},
        "command": "\ud800",
        "versions": {"\ud800": 1},
    },
    "labels": {"labels": ("<script>",) * 10},
    "huge labels": {"labels": (10**400,) * 10},
    "nested": {"metadata": {"training": {"a": 1}, "head": ["b"], "gap": [1]}, "hardware": {"a": {"b": ["<img>"]}}},
    "many keys": {"metadata": {f"k{k}": k for k in range(5000)}, "versions": {f"k{k}": k for k in range(5000)}},
    "no dataset": {"dataset": {}, "model": {}},
    "dataset is a list": {"dataset": {"name": ["<script>"], "fingerprint": {"a": 1}}, "model": {"fingerprint": [1]}},
    "command": {"command": {"a": 1}, "seed": "<script>", "commit": ["<script>"], "created": "\u202e\x00\x1b[31m"},
    "examples": {"metadata": {"examples": [1]}},
}


@pytest.mark.parametrize("case", ODD)
def test_odd_values_do_not_break_a_page(case):
    odd = make_record("odd", **ODD[case])
    entries = [Entry.from_record(odd), Entry.from_record(make_record("calm"))]
    for text in (render_page(entries), render_report([odd])):
        page = Page(text)
        text.encode("utf-8")
        assert len(page.all("script")) <= 2 and page.all("img") == [] and len(text) < 200_000
        assert "\x1b" not in text and "\u202e" not in text
    render_markdown(entries).encode("utf-8")
    render_latex([odd]).encode("utf-8")


PIXEL = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNgAAAAAgABSK+kcQAAAABJRU5ErkJggg=="
)


@pytest.mark.parametrize(
    ("uri", "expected"),
    [
        (PIXEL, True),
        (PIXEL + '" onerror="alert(1)', False),
        (PIXEL.replace("png", "svg+xml"), False),
        ("https://example.org/a.png", False),
        ("javascript:alert(1)", False),
        ("data:image/png;base64,AAAA", False),
        ("data:image/png;base64," + "A" * 200_000, False),
        # The header of a picture of 65,536 times 65,536 pixels.
        ("data:image/png;base64,iVBORw0KGgoAAAANSUhEUgABAAAAAQAACAAAAAA=", False),
        (None, False),
    ],
)
def test_only_small_png_pictures_are_shown(uri, expected):
    assert is_png(uri) is expected
    item = {"clean": uri, "adversarial": PIXEL, "label": HOSTILE, "clean_prediction": 1, "adversarial_prediction": 2}
    record = make_record(metadata={"examples": {"attack": HOSTILE, "images": [item] * 100}})
    images = Page(render_page([Entry.from_record(record)])).all("img")
    assert len(images) == (24 if expected else 0)  # a dozen pairs at most
    assert all(set(image) == {"src", "alt", "width", "height"} and image["alt"] for image in images)


def test_plain_text_is_short_and_printable():
    assert plain(" a\n b\x00\u202e\ud800 ") == "a b"
    assert len(plain("y" * 10**6, 50)) == 50 and plain("y" * 60, 50).endswith("…")


def test_report_has_a_table_curves_and_a_section_a_record():
    records = [make_record("a", eps="0.1"), make_record("a", eps="0.2"), make_record("a", eps="0.2"), make_record("b")]
    text = render_report(records, title="<T>")
    page = Page(text)
    assert "<h1>&lt;T&gt;</h1>" in text and page.all("script") == []
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids)) and sum(name.startswith("entry-") for name in ids) == 4
    assert text.count("Accuracy against eps") == 1
    links = [link["href"][1:] for link in page.all("a")]
    assert set(links) <= set(ids) and len(links) == 4


def test_pdf_has_a_page_of_table_plots_and_each_record(tmp_path):
    path = tmp_path / "new" / "r.pdf"
    write_pdf([make_record(eps="0.1"), make_record(eps="0.2"), make_record("b", eps="0.2")], path)
    content = path.read_bytes()
    assert content.startswith(b"%PDF") and len(re.findall(rb"/Type /Page\b", content)) == 1 + 1 + 3
    write_pdf([make_record(f"m{k}") for k in range(35)], path, pictures=False)
    assert len(re.findall(rb"/Type /Page\b", path.read_bytes())) == 2 + 1 + 35
    with pytest.raises(InputError, match="at least one"):
        write_pdf([], path)


@pytest.mark.filterwarnings("ignore:Glyph")
@pytest.mark.parametrize("case", [*ODD, "mathematics", "damaged picture"])
def test_odd_values_do_not_break_a_pdf(case, tmp_path):
    header = "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAAB"
    pair = {"clean": header, "adversarial": PIXEL, "label": 1, "clean_prediction": 1, "adversarial_prediction": 2}
    more = {
        "mathematics": {"name": "$\\frac{$ \\input{x} $^$" + HOSTILE, "command": "$" * 3000},
        "damaged picture": {"metadata": {"examples": {"attack": HOSTILE, "images": [pair]}}},
    }
    write_pdf([make_record(**{"name": "odd", **{**ODD, **more}[case]})], tmp_path / "r.pdf", title="$\\frac{")
    assert (tmp_path / "r.pdf").read_bytes().startswith(b"%PDF")


def test_hostile_entries_stay_in_their_markdown_cell():
    lines = render_markdown([hostile_entry(), Entry.from_record(make_record("b"))]).splitlines()
    rows = [line for line in lines if re.match(r"\| \d", line)]
    assert len(rows) == 2
    assert all(len(re.findall(r"(?<!\\)\|", row)) == 11 for row in rows)
    assert not any("<" in line for line in lines)


def test_frontier_marks_what_nothing_dominates():
    made = [("a", "1111111111", "1100000000"), ("b", "1111111100", "1111100000"), ("c", "1111111100", "1000000000")]
    plot = frontier([Entry.from_record(make_record(n, clean=c, robust=r)) for n, c, r in made])
    assert {p["label"]: p["front"] for p in plot["points"]} == {"a": True, "b": True, "c": False}
    for point in plot["points"]:
        assert plot["left"] <= point["x"] <= plot["right"] and plot["top"] <= point["high"] <= point["y"]
        assert point["y"] <= point["low"] <= plot["bottom"]


def test_curves_join_the_same_weights_over_eps():
    def at(name, eps, robust):
        return Entry.from_record(make_record(name, eps=eps, robust=robust))

    entries = [at("a", "0.2", "1" + "0" * 9), at("a", "0.1", "1" * 10), at("b", "0.1", "1" * 10)]
    (plot,) = curves(entries)
    (line,) = plot["lines"]
    assert [(eps, accuracy) for eps, accuracy, _, _ in line["values"]] == [("0", 0.9), ("0.1", 0.9), ("0.2", 0.1)]
    assert all(0 <= low <= accuracy <= high <= 1 for _, accuracy, low, high in line["values"])
    text = render_page(entries)
    # Once for the board, and once in the section of each of its two entries.
    assert text.count("Accuracy against eps") == 1 and text.count("Accuracy under attack against eps") == 3


def test_a_record_with_a_curve_is_drawn_by_itself():
    item = {"eps": 0.05, "eps_text": "0.05", "robust_correct": 7, "robust": "1111111000"}
    entries = [Entry.from_record(make_record(curve=(item,))), Entry.from_record(make_record("b"))]
    (plot,) = curves(entries)
    (line,) = plot["lines"]
    assert [(eps, accuracy) for eps, accuracy, _, _ in line["values"]] == [("0", 0.9), ("0.05", 0.7), ("0.1", 0.5)]
    assert render_page(entries).count("Accuracy under attack against eps") == 2
    assert "Against eps" in render_page(entries)


def test_terminal_table_and_comparison():
    control = make_record("control", clean="1" * 40, robust="1" * 10 + "0" * 30, metadata={"head": "linear"})
    better = make_record("better", clean="1" * 40, robust="1" * 20 + "0" * 20)
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(results_table([control, better], "title", {"better": control}))
    text = console.export_text()
    assert "+25.0" in text and "1.0e-03" in text and "50.0 (35.2-64.8)" in text
    (line,) = comparison_lines([control, better], {"better": control})
    assert line.endswith(": better") and "p = 0.00195" in line
    same = comparison_lines([better], {"better": better})
    assert same[0].endswith(": not better")
    assert any("n = 40" in line for line in footnotes([control, better]))


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ({}, ""),
        ({"gap": 0.01, "status": "converged"}, "1.0e-02"),
        ({"gap": 0.2, "status": "max_time"}, "2.0e-01 max_time"),
        ({"gap": "0.1"}, ""),
        ({"gap": float("nan")}, ""),
    ],
)
def test_gap_text_says_when_the_solver_did_not_converge(metadata, expected):
    assert gap_text(make_record(metadata=metadata)) == expected
