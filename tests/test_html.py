"""The page about a finished plan: its numbers, its safety, and how it looks and answers in a real browser."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from glue.board import leaderboard
from glue.evaluate.comparisons import leaders, ranks
from glue.evaluate.statistics import proportion
from glue.member import Element, Member, Origin, Score, Table, canonical
from glue.plan import Plan, Task
from glue.recipe import read_recipe
from glue.report.gathered import atlases, lineage, routes, trainings, walks
from glue.report.html import report
from glue.report.look import SCRIPT
from glue.steps.routing import NOTE
from glue.tune.curve import Curve
from glue.zoo import Zoo
from tests.browser import Window, chromium

RECIPE = """
about: "{about}"
steps:
  - {{as: root, step: data, skill: kind, train: 1}}
  - {{as: left, step: data, skill: kind, train: 2}}
  - {{as: right, step: data, skill: kind, train: 3}}
  - {{as: other, step: data, skill: kind, train: 4}}
  - {{as: families, step: cluster, members: [root, left, right, other]}}
  - {{as: found, step: search, members: [left, right], base: root, suite: tiny:dev, strategy: greedy}}
  - {{as: mixed, step: data, skill: kind, train: 5}}
  - {{as: routes, step: data, skill: kind, train: 6}}
  - {{as: scored, step: data, skill: kind, train: 7}}
board:
  table: scored
  headline: mixed
  claims: [{{better: mixed, than: root}}, {{better: root, than: found}}]
"""
HOSTILE = '"><img src=x onerror=alert(1)></script><script>alert(2)</script>&amp;'
SHARES = {"mixed": 0.9, "found": 0.8, "left": 0.6, "right": 0.55, "root": 0.4, "other": 0.2}
VOID = {"meta", "link", "br", "img", "input", "hr"}
WIDTHS = (1280, 390)


@pytest.fixture
def plan(tmp_path: Path) -> Callable[..., Plan]:
    """A finished plan with a board, a cluster step, a search, routes and a lineage; `words` are its notes."""
    def make(words: str = "as it was", items: int = 100, tasks: tuple[str, ...] = ("a", "b")) -> Plan:
        (tmp_path / "zoo.yaml").write_text("members: {}\n")
        (tmp_path / "suites").mkdir()
        (tmp_path / "r.yaml").write_text(RECIPE.format(about="What a page tells"))
        recipe = read_recipe(tmp_path / "r.yaml")
        made: dict[str, Member] = {}

        def add(name: str, kind: str, step: str, base: str | None = None, **inputs: list[str]) -> None:
            folder = tmp_path / f"made-{name}"
            folder.mkdir()
            origin = Origin(step, {role: tuple(made[each].digest for each in names) for role, names in inputs.items()},
                            {"setting": words}, 0, {role: tuple(f"r/{each}" for each in names)
                                                    for role, names in inputs.items()})
            made[name] = Member(f"r/{name}", kind, str(folder), base=made[base] if base else None, origin=origin,
                                digest=hashlib.sha256(name.encode()).hexdigest()[:32], note=words, licence=words)

        add("root", "model", "pretrain/1")
        for name in ("left", "right"):
            add(name, "model", "tune/1", base="root", base_=["root"])
        add("other", "model", "pretrain/1")
        add("families", "group", "cluster/1", members=["root", "left", "right", "other"])
        made["families"] = Member(**{**made["families"].__dict__, "elements": (
            Element("root", made["root"], (made["root"], made["left"], made["right"])),
            Element("other", None, (made["other"],)))})
        add("found", "model", "search/1", members=["left", "right"], base_=["root"])
        add("mixed", "mixture", "mix/1", members=["found", "other"])
        add("routes", "table", "routing/1", members=["mixed"])
        add("scored", "table", "evaluate/1")
        told = {"names": [f"r/{name}" for name in ("root", "left", "right", "other")], "threshold": 0.85,
                "linkage": "average", "part": "all", "mode": "raw", "per": "column", "base": None, "differences": [
                    ["r/root", "r/other", f"they differ: {words}"]],
                "similarity": [[1, 0.97, 0.96, None], [0.97, 1, 0.93, None], [0.96, 0.93, 1, None],
                               [None, None, None, 1]]}
        (made["families"].folder / "similarity.json").write_text(json.dumps(told))
        log = [["r/left", 0.61, "member as it is", 40], ["r/right", 0.58, "member as it is", 40],
               ["1 r/left + 0.5 r/right", 0.9, words, 10], ["1 r/left + 1 r/right", 0.79, words, 40]]
        (made["found"].folder / "search.json").write_text(json.dumps(
            {"merged": True, "weights": {}, "value": 0.79, "evaluated": 4, "items": 130, "log": log}))
        interval = [0.9, 0.85, 0.94]
        (made["routes"].folder / NOTE).write_text(canonical(
            {"mixture": "r/mixed", "digest": "d", "suite": "s:test", "experts": ["r/found", "r/other"],
             "tasks": ["a", "b"], "items": [items, items], "places": 1, "shares": [[0.75, 0.25], [0.1, 0.9]],
             "load": [0.4, 0.6], "entropy": 0.97, "within": [0.8, 0.4], "doubt": 0.0, "variation": 0.1, "agrees": 0.8,
             "follows": 0.3, "hits": None, "luck": None, "score": interval, "promised": 0.8, "best": [0, 1],
             "hindsight": {"best for each task": {"score": interval, "regret": [0.0, -0.1, 0.1]}}}) + "\n")
        rows = []
        for name, share in SHARES.items():
            for k, task in enumerate(tasks):
                good = np.random.default_rng(k).permutation(np.arange(items) < share * items).astype(float)
                rows.append(Score(f"r/{name}", made[name].digest, "s:test", task, "acc", tuple(good), "d", "h",
                                  seen_by_search=name == "found"))
        Table(tuple(rows)).write(made["scored"].folder)
        steps = {"routes": "routing", "families": "cluster", "found": "search"}
        done = [Task(line.product, line, steps.get(line.name, "x"), made[line.name].kind, "done",
                     origin=made[line.name].origin, member=made[line.name]) for line in recipe.lines]
        return Plan(recipe, Zoo(tmp_path / "zoo.yaml"), tuple(done))
    return make


class Reader(HTMLParser):
    """The elements of a page, and whether they are balanced."""

    def __init__(self, page: str):
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}> closes what is not open"

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "script"):
            self.texts.append(data)

    def of(self, tag: str, **attributes: str) -> Iterator[dict[str, str | None]]:
        wanted = {key.rstrip("_").replace("_", "-"): value for key, value in attributes.items()}
        for found, has in self.elements:
            if found == tag and all((has.get(key) or "").split() == value.split() for key, value in wanted.items()):
                yield has


def test_a_page_has_a_section_for_everything_that_the_plan_left(plan):
    page = Reader(report(plan()))
    assert page.open == []
    found = [has["id"] for has in page.of("section")]
    assert found == ["board", "claims", "tasks", "similarity", "searches", "routing", "lineage"]
    assert [has["href"] for has in page.of("a") if has["href"] in {f"#{key}" for key in found}][1:] == \
        [f"#{key}" for key in found]
    ids = [has["id"] for _, has in page.elements if "id" in has]
    assert len(ids) == len(set(ids))
    links = {has["href"][1:] for has in page.of("a")}
    assert links <= set(ids)


def test_a_plan_with_a_board_alone_has_a_page_of_it_alone(plan):
    full = plan()
    alone = Plan(full.recipe, full.zoo, tuple(task for task in full.tasks if task.step == "x"
                                              or task.name == "r/found"))
    (full["found"].folder / "search.json").unlink()
    page = Reader(report(alone))
    assert [has["id"] for has in page.of("section")] == ["board", "claims", "tasks", "lineage"]


def test_the_numbers_on_the_page_are_those_of_the_board(plan):
    finished = plan()
    board, text = leaderboard(finished), report(finished)
    page = Reader(text)
    assert [float(has["data-v"]) for has in page.of("td", class_="mean n")] == [row.mean.value for row in board.rows]
    assert [has["data-v"] for has in page.of("td", class_="who")] == [row.member for row in board.rows]
    shown = [float(has["data-v"]) for tag, has in page.elements
             if tag == "td" and "t" in (has.get("class") or "").split()]
    assert shown == [row.tasks[task] for row in board.rows for task in ("a", "b")]
    for row in board.rows:
        assert f"{row.mean.low * 100:.1f} – {row.mean.high * 100:.1f}" in text
        assert f"--l:{row.mean.low * 100:.2f};--h:{row.mean.high * 100:.2f}" in text
        for task in row.tasks:
            each = proportion(row.results[task])
            assert text.count(f"--l:{each.low * 100:.2f};--h:{each.high * 100:.2f}") >= 2
    assert board.headline in page.texts
    assert all(claim.text in page.texts for claim in board.claims)
    assert text.count('<span class="gap"') == sum(claim.gap is not None for claim in board.claims) == 2


def test_ranks_stand_with_the_intervals_that_the_statistics_give_them(plan):
    finished = plan()
    rows = leaderboard(finished).rows
    results = {row.member: row.results for row in rows}
    text = report(finished)
    told = re.findall(r'<td class="rank n" data-v="\d+">(\d+)<small>(\d+)(?:–(\d+))?</small>', text)
    found = ranks(results)
    assert [(int(rank), int(best), int(worst or best)) for rank, best, worst in told] == \
        [(k, found[row.member].best, found[row.member].worst) for k, row in enumerate(rows, start=1)]
    assert f"better than {', '.join(leaders(results))};" in text


def test_what_a_search_of_the_lineage_has_seen_is_greyed(plan):
    page = Reader(report(plan()))
    assert [has["data-m"] for has in page.of("tbody", class_="seen")] == ["found"]


def test_every_heading_that_sorts_is_a_button_and_every_cell_below_it_has_a_value(plan):
    text = report(plan())
    heads = re.findall(r"<th[^>]*>.*?</th>", re.search(r'<table class="board">\n<thead>.*?</thead>', text).group())
    sorting = [k for k, head in enumerate(heads) if "<button" in head]
    assert len(sorting) == len(heads) - 2  # the interval goes with the mean
    assert sum("aria-sort" in head for head in heads) == 1
    for row in re.findall(r'<tr class="row">(.*?)</tr>', text):
        cells = re.findall(r"<td[^>]*>", row)
        assert len(cells) == len(heads) and all("data-v=" in cells[k] for k in sorting)


def test_hostile_names_and_notes_come_out_as_text(plan):
    page = Reader(report(plan(words=HOSTILE)))
    assert page.open == [] and not list(page.of("img"))
    assert len(list(page.of("script"))) == 1
    assert not [has for _, has in page.elements if any(key.startswith("on") for key in has)]
    assert any(HOSTILE in text for text in page.texts)
    assert any(HOSTILE in (has.get("data-tip") or "") for _, has in page.elements)


def test_a_page_names_no_other_place_and_allows_no_script_but_its_own(plan):
    text = report(plan())
    page = Reader(text)
    assert "http:" not in text and "https:" not in text and "@import" not in text and "url(" not in text
    for _, has in page.elements:
        for key in ("src", "href", "srcset", "data", "action"):
            assert has.get(key, "#").startswith(("#", "data:,")), has
    policy = next(has["content"] for has in page.of("meta", http_equiv="Content-Security-Policy"))
    script = text[text.index("<script>") + 8:text.index("</script>")]
    assert script == SCRIPT
    assert f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'" in policy
    assert policy.startswith("default-src 'none'") and "connect-src" not in policy


def test_the_same_plan_gives_the_same_page(plan):
    finished = plan()
    assert report(finished) == report(finished)


def test_an_atlas_is_read_back_from_what_the_cluster_step_wrote(plan):
    (name, atlas), = atlases(plan())
    assert name == "r/families" and atlas.names == ("r/root", "r/left", "r/right", "r/other")
    assert [(family.root, family.ancestor, len(family.members)) for family in atlas.families] == \
        [("r/root", True, 3), ("r/other", False, 1)]
    words = {(pair.one, pair.other): pair.verdict.word for pair in atlas.pairs}
    assert words["r/left", "r/right"] == "merge" and words["r/root", "r/left"] == "merge with care"
    assert words["r/root", "r/other"] == "do not merge"
    assert atlas.similarity[1, 2] == 0.93 and np.isnan(atlas.similarity[0, 3])


def test_a_search_is_told_by_answers_and_only_whole_measurements_count(plan):
    walk, = walks(plan())
    assert [each.asked for each in walk.tries] == [40, 80, 90, 130]
    assert [each.whole for each in walk.tries] == [True, True, False, True]
    assert (walk.name, walk.found, walk.value) == ("found", "1 left + 1 right", 0.79)


def test_a_training_is_drawn_with_what_it_came_to(plan):
    finished = plan()
    assert trainings(finished) == [] and 'id="training"' not in report(finished)
    losses = [4.0 - 3.0 * k / 999 for k in range(1000)]
    Curve(losses, [10] * 1000).write(Path(finished["left"].path))
    Curve([2.0], [7]).write(Path(finished["right"].path))
    (Path(finished["other"].path) / "training.json").write_text(
        '{"loss": [NaN], "tokens": [1], "left_out": 0, "cut": 0}')
    (name, curve), (other, short) = trainings(finished)
    assert (name, other) == ("left", "right") and curve.loss == pytest.approx(losses, rel=1e-5) and short.loss == [2.0]
    page = report(finished)
    assert "1,000 steps, 10,000 tokens, loss 4 to 1, best 1" in page and "1 step, 7 tokens, loss 2 to 2" in page
    line = re.search(r'aria-label="training left.*?<polyline class="best" points="([^"]*)"', page, re.S)
    assert line is not None
    points = [tuple(map(float, point.split(","))) for point in line[1].split(" ")]
    assert len(points) == 112, "means of nine steps"
    assert [x for x, _ in points] == sorted(x for x, _ in points) and [y for _, y in points] == sorted(
        y for _, y in points), "a loss that falls is drawn falling"


def test_a_lineage_has_every_member_after_all_that_it_was_made_from(plan):
    finished = plan()
    nodes = lineage(finished, leaderboard(finished))
    names = [node.names[0] for node in nodes]
    assert sorted(names) == sorted(SHARES)
    assert all(up < k for k, node in enumerate(nodes) for up in node.parents)
    above = {node.names[0]: {names[up] for up in node.parents} for node in nodes}
    assert above == {"root": set(), "left": {"root"}, "right": {"root"}, "other": set(),
                     "found": {"root", "left", "right"}, "mixed": {"found", "other"}}
    assert [name for name in SHARES if nodes[names.index(name)].rank] == list(SHARES)


def test_routes_are_those_of_the_routing_step(plan):
    (name, (found,)), = routes(plan())
    assert name == "r/routes" and found.experts == ("r/found", "r/other")


@pytest.fixture(scope="module")
def window(tmp_path_factory) -> Iterator[Window]:
    with chromium(tmp_path_factory.mktemp("browser")) as found:
        yield found


@pytest.fixture
def opened(plan, window, tmp_path) -> Callable[..., Window]:
    """opened(width, dark=True) shows the page of the plan in a window."""
    file = tmp_path / "page.html"
    file.write_text(report(plan(words=HOSTILE)), encoding="utf-8")

    def show(width: int, dark: bool = False) -> Window:
        window.open(file, width, dark=dark)
        return window
    return show


def drawn(picture: bytes, box: dict[str, float]) -> float:
    """The share of pixels in a box of a screenshot that are not of its commonest colour."""
    import io

    from matplotlib.image import imread

    pixels = (imread(io.BytesIO(picture), format="png")[..., :3] * 255).astype(np.int64)
    part = pixels[int(box["y"]):int(box["y"] + box["height"]), int(box["x"]):int(box["x"] + box["width"])]
    colours = part.reshape(-1, 3) @ (1, 256, 65536)
    return 1 - np.unique(colours, return_counts=True)[1].max() / len(colours)


@pytest.mark.browser
@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", WIDTHS)
def test_a_browser_draws_the_page_without_complaint_or_request(opened, width, dark):
    window = opened(width, dark)
    assert window.troubles == []
    assert len(window.asked) == 1 and window.asked[0].startswith("file:")
    assert window.value("document.documentElement.scrollWidth") == width == window.value("innerWidth")
    picture = window.picture()
    for query, least in (("table.board", 0.05), ("#similarity svg.drawn", 0.05), ("svg.graph", 0.03),
                         ("svg.walk", 0.01), ("#routing svg.drawn", 0.03)):
        box = window.value(f"(() => {{ const b = document.querySelector('{query}').getBoundingClientRect(); return "
                           f"{{x: Math.max(0, b.x), y: b.y + scrollY, height: b.height, "
                           f"width: Math.min(b.right, innerWidth) - Math.max(0, b.x)}} }})()")
        assert box["width"] > 200 and box["height"] > 80, query
        assert drawn(picture, box) > least, query
    back = window.value("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", back)[:3])) < 200) == dark


@pytest.mark.browser
@pytest.mark.parametrize("width", [1280, 1000, 700, 390])
def test_many_tasks_with_long_names_do_not_widen_the_page(plan, window, tmp_path, width):
    file = tmp_path / "wide.html"
    file.write_text(report(plan("word" * 80, tasks=tuple(f"a_task_of_many_words_{k}" * 2 for k in range(24)))))
    window.open(file, width)
    assert window.value("document.documentElement.scrollWidth") == width


@pytest.mark.browser
def test_a_person_sorts_opens_hovers_and_changes_the_theme(opened):
    window = opened(1280)
    names = "[...document.querySelectorAll('td.who')].map(cell => cell.dataset.v)"
    assert window.value(names) == list(SHARES)
    heads = "[...document.querySelectorAll('.board th button')]"
    window.value(f"{heads}.find(each => each.textContent === 'mean').click()")
    assert window.value(names) == list(SHARES)[::-1]
    assert window.value("document.querySelector('th[aria-sort]').getAttribute('aria-sort')") == "ascending"
    window.value(f"{heads}.find(each => each.textContent === 'member').focus()")
    window.press("Enter", 13, "\r")
    assert window.value(names) == sorted(SHARES)
    window.value("document.querySelector('td.who button').click()")
    assert window.value("document.querySelector('tr.more').hidden") is False
    window.value("document.querySelector('#similarity').scrollIntoView()")
    window.settle()
    at = window.value("(() => { const b = document.querySelector('#similarity rect[data-tip]')"
                      ".getBoundingClientRect(); return [b.x + b.width / 2, b.y + b.height / 2] })()")
    window.point(*at)
    assert window.value("getComputedStyle(document.getElementById('tip')).visibility") == "visible"
    assert "r/root and r/left" in window.value("document.getElementById('tip').textContent")
    window.value("document.querySelector('.node').focus()")
    assert window.value("document.querySelectorAll('.node.on').length") >= 4
    window.value("document.querySelector('.node').dispatchEvent(new MouseEvent('click', {bubbles: true}))")
    assert window.value("document.querySelectorAll('details[open]').length") == 1
    before = window.value("getComputedStyle(document.body).backgroundColor")
    window.value("localStorage.clear(); for (const k of [1, 2]) document.getElementById('theme').click()")
    assert window.value("getComputedStyle(document.body).backgroundColor") != before
    window.value("document.getElementById('theme').click()")
    assert window.troubles == []


@pytest.mark.browser
def test_the_keyboard_reaches_every_control(opened):
    window = opened(390)
    window.value("document.body.focus()")
    reached = set()
    for _ in range(60):
        window.press("Tab", 9)
        reached.add(window.value("(e => e.id || e.className.baseVal || e.className || e.parentElement.className || "
                                 "e.tagName)(document.activeElement)"))
    assert {"theme", "skip", "who", "scroll"} <= {word for each in reached for word in each.split()}
    assert any("node" in each for each in reached)
