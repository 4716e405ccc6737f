"""The words of the page, which light up while they are spoken, in headless Chromium."""

import pytest
from browser import FakeServer

NOW = "Array.from(document.querySelectorAll('.word.now'), (word) => word.textContent)"
WORDS = "Array.from(document.querySelectorAll('.line .word'), (word) => word.textContent)"


def row(text: str, start: float, end: float, confidence: float = 0.9) -> dict:
    return {"text": text, "start": start, "end": end, "confidence": confidence}


def speak(server: FakeServer, message: dict) -> None:
    """A server that sends 2 s of speech for the first turn, with its words."""
    if message["type"] == "session":
        server.tell("session")
    elif message["type"] == "say" and len(server.messages) == 2:
        server.tell("started", id=1, text=message["text"])
        server.play(1.0)
        server.tell("words", id=1, words=[row("one", 0.1, 0.4), row("“two,", 0.5, 0.9)])
        server.play(1.0)
        server.tell("words", id=1, words=[row("ten", 1.0, 1.2, 0.0), row("<b>", 1.2, 1.9)])


def test_words_light_up_while_speech_is_streamed(visit):
    """In their order, each while it is spoken. The speech is not complete: the server never says
    that the turn has ended."""
    FakeServer(visit.page, speak)
    visit.write("A: one  “two, ten <b> end.\nB: four")
    visit.start()
    seen: list[str] = []
    while len(seen) < 3:
        visit.wait_until(f"{NOW}.length")
        # At one instant: the position moves on between two calls.
        position, (word,) = visit.page.evaluate(
            f"[Number(document.querySelector('#position').value), {NOW}]"
        )
        if word not in seen:
            seen.append(word)
            start = {"one": 0.1, "“two,": 0.5, "<b>": 1.2}[word]
            assert position >= start - 0.1
        visit.page.wait_for_timeout(20)
    assert seen == ["one", "“two,", "<b>"]
    line = visit.page.locator(".line").first
    assert line.locator("[data-part=text]").text_content() == "one  “two, ten <b> end."
    assert line.get_by_role("button").get_attribute("aria-label") is None
    visit.page.locator("#stop").click()
    visit.status("Stopped")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_word_at_a_position_is_lit_and_readable(visit, scheme):
    """With a contrast of at least 4.5, as WCAG has it."""
    page = visit.page
    page.emulate_media(color_scheme=scheme)
    FakeServer(page, speak)
    visit.write("A: one “two, ten <b>\nB: four")
    visit.start()
    visit.wait_until(f"{WORDS}.length === 3")
    page.locator("#stop").click()
    for seconds, word in [(1.5, ["<b>"]), (0.2, ["one"]), (0.05, []), (0.7, ["“two,"])]:
        page.locator("#position").fill(str(seconds))
        assert page.evaluate(NOW) == word
    colors = page.evaluate("""() => {
        const style = getComputedStyle(document.querySelector(".word.now"));
        return [style.color, style.backgroundColor];
    }""")
    assert contrast(*colors) >= 4.5


def test_the_words_of_the_server_are_those_of_the_line(visit):
    visit.write("A: One two,  three four!\nB: five")
    visit.speak()
    assert visit.page.evaluate(WORDS) == ["One", "two,", "three", "four!", "five"]
    assert next(each for each in visit.sent if each["type"] == "session")["words"]
    assert not visit.page.locator(".line .hint").first.is_visible()


def test_a_checkpoint_without_words_causes_no_notice(visit):
    def respond(server: FakeServer, message: dict) -> None:
        if message["type"] == "session":
            server.tell("session")
        elif message["type"] == "say":
            server.tell("started", id=1, text=message["text"])
            server.play(0.4)
            server.tell("done", id=1, seconds=0.4, cancelled=False, notices="no_words")

    FakeServer(visit.page, respond)
    visit.write("A: one")
    visit.start()
    visit.status("0.4 s of speech")
    assert not visit.page.locator(".line .hint").is_visible()
    assert visit.page.locator(".line [data-part=text]").text_content() == "one"


def contrast(one: str, other: str) -> float:
    """The contrast ratio of two colors "rgb(r, g, b)" by WCAG 2."""
    first, second = sorted(map(luminance, (one, other)))
    return (second + 0.05) / (first + 0.05)


def luminance(color: str) -> float:
    shares = [int(each) / 255 for each in color[4:-1].split(", ")]
    linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in shares]
    return sum(x * weight for x, weight in zip(linear, (0.2126, 0.7152, 0.0722), strict=True))
