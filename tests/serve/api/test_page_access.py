"""The page by keyboard and screen reader, in both color schemes, and on a phone."""

import pytest
from browser import FakeServer, answer_with


def test_every_control_has_a_name_and_can_be_reached(visit):
    """By the accessibility tree, and by the Tab key in the order of the page."""
    page = visit.page
    visit.choose("A", "My own recording")
    page.evaluate("document.querySelector('#settings').open = true")
    tree = page.context.new_cdp_session(page).send("Accessibility.getFullAXTree")["nodes"]
    roles = {"button", "textbox", "combobox", "slider", "link", "meter", "region", "form", "list"}
    controls = [node for node in tree if node.get("role", {}).get("value") in roles]
    assert len(controls) > 40
    assert [node for node in controls if not node["name"]["value"].strip()] == []
    reached = []
    page.locator("body").press("Tab")
    for _ in range(60):
        place = page.evaluate("""() => {
            const controls = "a, button, input, select, textarea, summary, audio, [tabindex]";
            const all = [...document.querySelectorAll(controls)];
            const focused = document.activeElement;
            return [all.indexOf(focused), getComputedStyle(focused).outlineStyle];
        }""")
        if reached and place[0] <= reached[-1]:
            break
        assert place[1] != "none"
        reached.append(place[0])
        page.keyboard.press("Tab")
    assert len(reached) > 30


CONTRASTS = """() => {
    const canvas = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
    const channels = (color) => {
        canvas.clearRect(0, 0, 1, 1);
        canvas.fillStyle = color;
        canvas.fillRect(0, 0, 1, 1);
        return [...canvas.getImageData(0, 0, 1, 1).data];
    };
    const luminance = (color) => {
        const [r, g, b] = channels(color).map((value) =>
            value / 255 <= 0.04045 ? value / 3294.6 : ((value / 255 + 0.055) / 1.055) ** 2.4);
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const background = (element) => {
        for (; element; element = element.parentElement) {
            const color = getComputedStyle(element).backgroundColor;
            if (channels(color)[3] === 255) return color;
        }
        return "white";
    };
    return [...document.querySelectorAll("body *")]
        .filter((element) => element.checkVisibility())
        .filter((element) => !element.closest("[disabled], [aria-disabled=true]"))
        .filter(({ childNodes }) =>
            [...childNodes].some((node) => node.nodeType === Node.TEXT_NODE && node.data.trim()))
        .map((element) => {
            const values = [getComputedStyle(element).color, background(element)].map(luminance);
            return [(Math.max(...values) + 0.05) / (Math.min(...values) + 0.05), element.outerHTML];
        });
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_enough_contrast(visit, scheme):
    """WCAG requires a contrast of 4.5."""
    visit.page.emulate_media(color_scheme=scheme)
    FakeServer(visit.page, answer_with(lambda server: server.play(0.1)))
    visit.page.evaluate("document.querySelector('#settings').open = true")
    visit.start()
    visit.status("s of speech")
    found = visit.page.evaluate(CONTRASTS)
    assert len(found) > 40
    assert [(ratio, element) for ratio, element in found if ratio < 4.5] == []
    background = visit.page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (background == "rgb(19, 20, 23)") == (scheme == "dark")


def test_the_page_fits_a_phone(visit):
    page = visit.page
    page.set_viewport_size({"width": 360, "height": 740})
    FakeServer(page, answer_with(lambda server: server.play(0.1)))
    page.get_by_role("textbox", name="Turn 1").fill("one" * 200)
    for speaker in "AB":
        visit.choose(speaker, "My own recording")
    page.evaluate("document.querySelector('#settings').open = true")
    visit.choose("A", "slt")
    visit.choose("B", "slt")
    visit.start()
    visit.status("s of speech")
    visit.choose("B", "My own recording")
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    page.goto(page.url.rstrip("/") + "/docs.html")
    page.locator("details").nth(3).locator("summary").click()
    assert page.evaluate("document.documentElement.scrollWidth") == 360
