"""Promises of the page of tools/visualize.py stages, kept in a real browser without a network."""

import contextlib

import numpy as np
import pytest

from projects.stageinteractor.analysis.stages.stage_page import render_page
from projects.stageinteractor.analysis.stages.stage_record import Label
from support.browser import open_browser, open_page
from support.stage_records import BOXES, CLASSES, HEIGHT, NUM_STAGES, WIDTH

pytestmark = pytest.mark.slow  # a browser
QUERIES = [2, 0]  # that are looked at
TITLE = "<i>a</i> picture"  # a file's name can be anything




@pytest.fixture(scope="module")
def browser():
    with open_browser() as browser:
        yield browser


@contextlib.contextmanager
def opened(browser, folder, record, **options):
    """The page as a file, in a browser that reaches no other one."""
    file = folder / "stages.html"
    image = np.full((HEIGHT, WIDTH, 3), 200, dtype=np.uint8)
    file.write_text(render_page(record, image, QUERIES, CLASSES, TITLE), encoding="utf-8")
    with open_page(browser, file.as_uri(), **options) as watched:
        watched.page.goto(file.as_uri())
        yield watched.page
        assert not watched.strayed and not watched.errors


@pytest.fixture
def page(browser, tmp_path, record):
    with opened(browser, tmp_path, record) as page:
        yield page


def move(page, place):
    page.locator("#stage").fill(str(place))


def box_of(page, query):
    """Corners of the visible box of a query."""
    rect = page.locator(f"rect.box[data-query='{query}']")
    x, y, w, h = (float(rect.get_attribute(key)) for key in ("x", "y", "width", "height"))
    return [x, y, x + w, y + h]


def hover(page, x, y):
    """What is told at a place of the picture, in pixels of the picture."""
    area = page.locator("#drawing").bounding_box()
    scale = area["width"] / WIDTH
    page.mouse.move(1, 1)
    page.mouse.move(area["x"] + x * scale, area["y"] + y * scale)
    tip = page.locator("#tip")
    return tip.text_content() if tip.is_visible() else ""


def test_the_slider_moves_the_box_from_the_whole_picture_to_the_object(page):
    assert page.locator("#stage").get_attribute("max") == str(NUM_STAGES)
    for place, box in enumerate(BOXES):
        move(page, place)
        assert box_of(page, 2) == box
    assert page.locator("#place").text_content() == "After stage 1 (of 0 to 1)"


def test_names_are_shown_as_they_are(page):
    assert page.locator("h1").text_content() == page.title() == TITLE
    assert page.locator("i, b").count() == 0


def test_arrow_keys_move_the_slider(page):
    move(page, 1)
    page.locator("#stage").press("ArrowRight")
    assert box_of(page, 2) == BOXES[2]


def test_the_drawing_lies_on_the_picture(page):
    image = page.locator("#image").bounding_box()
    assert image == page.locator("#drawing").bounding_box()
    assert image["width"] / image["height"] == pytest.approx(WIDTH / HEIGHT, rel=0.01)
    assert page.evaluate("document.getElementById('image').naturalWidth") == WIDTH


def test_points_are_in_the_colour_of_their_level(page):
    move(page, 2)
    colors = page.locator(".point").evaluate_all(
        "points => points.map(p => [p.dataset.level, p.getAttribute('fill')])"
    )
    assert [level for level, _ in colors] == ["1"] * 3 + ["3"] * 3
    legend = page.locator("#legend .swatch").evaluate_all(
        "swatches => swatches.map(s => s.style.background)"
    )
    as_shown = page.evaluate("""colors => colors.map(color => {
        const made = document.createElement("i"); made.style.background = color;
        return made.style.background; })""", [color for _, color in colors])
    assert as_shown == [legend[1]] * 3 + [legend[3]] * 3


def test_hovering_tells_numbers(page):
    page.locator("#show-partners").uncheck()
    page.locator("#show-objects").uncheck()
    move(page, 2)
    tip = hover(page, 71, 41)  # the second point of stage 1
    assert "point 1 of channel group 0\nx 71, y 41" in tip
    assert "stride 4: 25 %, stride 8: 75 %, stride 16: 0 %, stride 32: 0 %" in tip
    tip = hover(page, 50, 33)
    assert "query 2 after stage 1: <b>dog</b> 0.88, cat 0.06" in tip
    assert "x 50 to 90, y 30 to 70; 40 x 40 pixels" in tip
    assert hover(page, 5, 5) == ""


def test_hovering_an_object_tells_the_iou_that_decided(page):
    move(page, 1)
    tip = hover(page, 98, 60)
    assert tip.splitlines() == [
        "object 0: cat", "dropped: IoU 0.437 (threshold 0.5), won in stage 0",
        "won by query 2 (stage 0), query 0 (stage 1)",
    ]


def test_hovering_any_object_tells_who_won_it(browser, tmp_path, record):
    """Also what none of the chosen queries is offered."""
    won_by_others = np.array([[-1, 0, -1, 1], [-1, 0, -1, -1]])
    labels = record.labels._replace(match=won_by_others, offers=[{}, {}])
    with opened(browser, tmp_path, record._replace(labels=labels)) as page:
        page.locator("#show-partners").uncheck()
        move(page, 1)
        assert "won by query 1 (stage 0, 1)\nx 42" in hover(page, 98, 75)
        assert "won by query 3 (stage 0)\nx 50" in hover(page, 90, 66)
        labels = labels._replace(match=np.full((2, 4), -1))
    with opened(browser, tmp_path, record._replace(labels=labels)) as page:
        move(page, 1)
        assert "won by no query" in hover(page, 98, 75)


def test_a_touch_tells_as_well(browser, tmp_path, record):
    """As it begins: not every browser makes mouse events of a touch."""
    with opened(browser, tmp_path, record, has_touch=True) as page:
        move(page, 1)
        area = page.locator("#drawing").bounding_box()
        scale = area["width"] / WIDTH
        finger = page.context.new_cdp_session(page)
        for x, y, is_told in ((98, 60, True), (5, 5, False)):
            place = {"x": area["x"] + x * scale, "y": area["y"] + y * scale}
            finger.send("Input.dispatchTouchEvent", {"type": "touchStart", "touchPoints": [place]})
            assert page.locator("#tip").is_visible() == is_told
            finger.send("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})


def test_it_opens_where_a_query_borrows_a_label(browser, tmp_path, record):
    """And else in the last stage of the first query."""
    offers = [{2: [Label(0, "kept", 0.6, [0])]}, {0: [Label(1, "borrowed", 0.6, [1])]}]
    expected = {"query 0": offers, "query 2": [offers[0], {}]}
    for query, given in expected.items():
        changed = record._replace(labels=record.labels._replace(offers=given))
        with opened(browser, tmp_path, changed) as page:
            assert page.locator("#place").text_content().startswith("After stage 1")
            assert page.locator("button[aria-pressed=true]").text_content() == query
    with opened(browser, tmp_path, record) as page:
        assert page.locator("#place").text_content().startswith("After stage 0")


def test_the_legend_names_every_kind_of_box_and_the_page_every_idea(page):
    legend = page.locator("#legend").inner_text()
    for text in ("after the stage", "before it", "attends to", "the objects, numbered", "offers"):
        assert text in legend
    assert page.locator("#legend .sample").count() == 5
    details = page.locator("#details").inner_text()
    for idea in ("Cascade mixing", "Filter reuse", "Cross-stage labels"):
        assert f"{idea}, the paper's" in details


def test_labels_are_listed_for_the_stage_and_for_all(page):
    move(page, 1)
    details = page.locator("#details").inner_text()
    for row in ("dropped\t0: cat\t0.437\t0\tquery 2", "borrowed\t1: <b>dog</b>\t0.625\t1\tnone"):
        assert row in details
    cells = page.locator("#all tbody tr").first.locator("td").all_inner_texts()
    assert cells[0] == "2" and "0 dropped 0.437" in cells[1] and "1 kept 0.937" in cells[2]
    rows = page.locator("#all tbody tr").nth(1).locator("td").all_inner_texts()
    assert rows == ["0", "background", "background"]


def test_a_cell_of_the_table_leads_to_its_query_and_stage(page):
    """It is marked, and the picture comes into sight."""
    page.set_viewport_size({"width": 700, "height": 300})
    cell = page.locator("#all tbody tr").nth(1).locator("td").nth(1)
    cell.click()
    page.wait_for_function("""() => {
        const seen = document.getElementById("picture").getBoundingClientRect();
        return seen.top > -1 && seen.bottom < innerHeight + 1; }""", timeout=5000)
    assert page.locator("td[aria-current=true]").count() == 1
    assert cell.get_attribute("aria-current") == "true"
    assert page.locator("#place").text_content().startswith("After stage 0")
    assert page.locator("button[aria-pressed=true]").text_content() == "query 0"
    assert box_of(page, 0) == [value + 10 for value in BOXES[1]]


def test_attention_and_filters_are_told(page):
    move(page, 2)
    details = page.locator("#details").inner_text()
    assert "Channels: its own; then one made of 30 % stage 0's and 70 % its own." in details
    assert "half of the rows its own, half made of 70 % stage 0's and 30 % its own." in details
    rows = page.locator("#details table").last.locator("tbody tr").all_inner_texts()
    assert [row.split("\t")[:2] for row in rows] == [
        ["itself", "20 %"], ["3", "60 %"], ["0", "15 %"], ["1", "5 %"]
    ]


def test_all_queries_are_shown_at_once(page):
    move(page, 2)
    page.get_by_role("button", name="all").click()
    assert [box_of(page, query) for query in QUERIES] == [
        BOXES[2], [value + 10 for value in BOXES[2]]
    ]
    assert page.locator(".point").count() == 0


def test_playing_goes_through_the_stages_and_stops(page):
    move(page, 0)
    page.locator("#play").click()
    page.get_by_text("After stage 0 (of 0 to 1)").wait_for(timeout=5000)
    page.locator("#play").click()
    assert page.locator("#play").text_content() == "Play"


def test_without_annotations_nothing_is_said_of_labels(browser, tmp_path, record):
    with opened(browser, tmp_path, record._replace(labels=None)) as page:
        assert page.locator("#overview").inner_text() == ""
        assert "Labels" not in page.locator("body").inner_text()
        assert not page.locator("#objects-option").is_visible()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_telephone_in_any_light(browser, tmp_path, record, scheme):
    options = {"viewport": {"width": 390, "height": 800}, "color_scheme": scheme}
    with opened(browser, tmp_path, record, **options) as page:
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        ink, paper = page.evaluate(
            "[getComputedStyle(document.body).color, getComputedStyle(document.body)"
            ".backgroundColor].map(c => c.match(/\\d+/g).slice(0, 3).reduce((a, b) => +a + +b, 0))"
        )
        assert (ink < paper) == (scheme == "light") and abs(ink - paper) > 450
