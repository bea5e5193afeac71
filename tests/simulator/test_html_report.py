import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from distri.config.hardware import load_cluster
from distri.core.plan import ImageRequest
from distri.core.planner import PlanRequest, make_plan
from distri.core.policy import policy_table
from distri.models.presets import load_graph
from distri.simulator.html_report import html_report, scaling_of
from distri.simulator.lowering import Lowering
from distri.simulator.options import SimulationOptions
from distri.simulator.simulate import run_simulation
from distri.simulator.timeline import make_timeline
from tests.chromium import PROGRAM, Browser

needs_chromium = pytest.mark.skipif(PROGRAM is None, reason="no Chromium is installed")
VIEW = "document.getElementById('timeline').getAttribute('aria-label')"
PRESS = """
const canvas = document.getElementById("timeline");
const press = (...keys) => keys.forEach((key) =>
  canvas.dispatchEvent(new KeyboardEvent("keydown", {key, bubbles: true, cancelable: true})));
"""


def page_of(
    ranks: int = 4, hardware: str = "a100-sxm", warnings: tuple[str, ...] = (), title: str = "demo"
) -> str:
    graph, cluster = load_graph("demo"), load_cluster(hardware)
    table = policy_table("corrected")
    plan = make_plan(PlanRequest(ImageRequest(512, 512, 8), ranks, False, table, 2), graph)
    lowering = Lowering(graph, cluster, SimulationOptions())
    simulation = run_simulation(plan, lowering)
    channels = lowering.collectives.topology.channels
    timeline = make_timeline(simulation.tasks, channels, lowering.options, graph, title)
    return html_report(
        simulation.result, plan, lowering, timeline, scaling_of(plan, lowering, None), warnings
    )


@pytest.fixture(scope="module")
def page() -> str:
    return page_of(warnings=("This is a <b>warning</b> & no markup.",))


@pytest.fixture
def browser(page: str, tmp_path: Path) -> Browser:
    return Browser(page, tmp_path)


def data_of(page: str) -> dict[str, list[dict[str, object]]]:
    match = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert match is not None
    return json.loads(match[1])


def test_the_page_asks_for_nothing_from_outside(page: str) -> None:
    class Collector(HTMLParser):
        found: list[str] = []  # noqa: RUF012

        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            self.found += [value for name, value in attrs if name in ("src", "href", "action") and value]

    collector = Collector()
    collector.feed(page)
    assert collector.found == ["data:,"]
    assert "@import" not in page
    assert "url(" not in page
    assert "default-src 'none'" in page


def test_text_in_the_data_cannot_end_its_script(page: str) -> None:
    assert page.count("</script>") == 2
    assert data_of(page)["warnings"] == ["This is a <b>warning</b> & no markup."]


def test_the_page_is_the_same_for_the_same_run() -> None:
    assert page_of(2) == page_of(2)


def test_every_span_lies_in_the_run_and_on_a_lane(page: str) -> None:
    data = data_of(page)
    for lane, start, end, _, label, _ in data["spans"]:
        assert 0 <= lane < len(data["lanes"])
        assert 0 <= start < end <= data["end_us"] + 1e-3
        assert 0 <= label < len(data["labels"])
    assert [step["name"] for step in data["steps"]][:3] == [
        "step 0 (warm-up)",
        "step 1 (warm-up)",
        "step 2 (steady)",
    ]


def test_speed_ups_are_given_from_one_device_to_all(page: str) -> None:
    points = data_of(page)["scaling"]
    assert [point["devices"] for point in points] == [1, 2, 3, 4]
    assert points[0]["speedup"] == pytest.approx(1.0)


def test_a_long_run_is_cut_and_says_where(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distri.simulator.html_report.MOST_SPANS", 500)
    data = data_of(page_of(2))
    begun_before = {"late", "link"}  # messages that leave when a drawn step is over
    drawn = {span[1] for span in data["spans"] if data["lanes"][span[0]]["kind"] not in begun_before}
    assert data["left_out"]
    for gap in data["left_out"]:
        assert "not drawn" in gap["text"]
        assert not any(gap["start"] <= start < gap["end"] for start in drawn)


@pytest.mark.parametrize("ranks", [1, 2, 8])
def test_any_number_of_devices_makes_a_page(ranks: int) -> None:
    data = data_of(page_of(ranks))
    assert len(data["ranks"]) == len(data["memory"]) == ranks


@needs_chromium
@pytest.mark.parametrize(("width", "dark"), [(1280, False), (1280, True), (360, False), (360, True)])
def test_nothing_overflows_and_nothing_fails(browser: Browser, width: int, dark: bool) -> None:
    found = browser.ask(
        "return {ready: document.documentElement.dataset.ready, inner: innerWidth,"
        " wide: document.documentElement.scrollWidth,"
        " dark: getComputedStyle(document.body).backgroundColor}",
        width=width,
        dark=dark,
    )
    assert found["ready"] == "yes"
    assert found["wide"] <= found["inner"] == width
    assert (found["dark"] == "rgb(18, 21, 27)") is dark


@needs_chromium
def test_the_keyboard_moves_and_zooms(browser: Browser) -> None:
    found = browser.ask(
        PRESS
        + f"""
        const views = [{VIEW}];
        for (const key of ["+", "+", "ArrowRight", "ArrowLeft", "-", "End", "Home", "0"]) {{
          press(key); views.push({VIEW});
        }}
        return views;"""
    )
    whole, _, zoomed, right, left, wider, end, home, again = found
    assert whole == again
    assert len({whole, zoomed, right, wider, end, home}) == 6
    assert left == zoomed
    assert home.startswith("Timeline, from 0 s")


@needs_chromium
def test_the_keyboard_tells_what_happened(browser: Browser) -> None:
    found = browser.ask(
        PRESS
        + """
        const spot = document.getElementById("spot"), said = [spot.textContent];
        press("."); said.push(spot.textContent);
        press("ArrowDown"); said.push(spot.textContent);
        return said;"""
    )
    assert found[0].startswith("rank 0: computing: ")
    assert "pieces of work" in found[0]
    assert ", for " in found[1]
    assert "in step 0 (warm-up)" in found[1]
    assert found[2].startswith("rank 0: ")
    assert "computing" not in found[2].split(":")[1]


@needs_chromium
def test_all_controls_can_be_reached_and_show_it(browser: Browser) -> None:
    found = browser.ask(
        """
        const nodes = [...document.querySelectorAll("button, canvas")];
        return nodes.map((node) => { node.focus({focusVisible: true}); const style = getComputedStyle(node);
          return [document.activeElement === node, node.tabIndex, style.outlineStyle,
                  node.getAttribute("aria-label") || node.textContent]; });"""
    )
    assert len(found) == 7
    for is_focused, order, outline, name in found:
        assert is_focused
        assert order == 0
        assert outline == "solid"
        assert name.strip()


@needs_chromium
def test_warnings_and_figures_are_text(browser: Browser) -> None:
    found = browser.ask("return document.body.innerText")
    assert "This is a <b>warning</b> & no markup." in found
    for part in (
        "Speed-up by number of devices",
        "Where the time goes",
        "Memory",
        "Assumptions",
        "Critical path",
    ):
        assert part in found


@needs_chromium
def test_the_timeline_is_drawn(browser: Browser) -> None:
    found = browser.ask(
        PRESS
        + """
        press("+", "+", "+", "+", "+", "Home");
        const pen = canvas.getContext("2d");
        const pixels = pen.getImageData(0, 0, canvas.width, canvas.height).data, met = new Set();
        for (let i = 0; i < pixels.length; i += 4) met.add(pixels[i] << 16 | pixels[i + 1] << 8 | pixels[i + 2]);
        const style = getComputedStyle(document.documentElement);
        const hex = (name) => parseInt(style.getPropertyValue(name).trim().slice(1), 16);
        return ["--compute", "--fresh"].map((name) => met.has(hex(name)));"""
    )
    assert found == [True, True]
