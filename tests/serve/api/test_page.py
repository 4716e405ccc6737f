"""The page in headless Chromium: speech, voices, errors, keys, and the editor."""

import base64

import httpx
import numpy as np
import pytest
import trustme
from browser import SPEAK_MS, FakeServer, Visit, answer_with, pcm
from serving import SMALL, as_samples, as_wav, same, serve

from csm_jax.serve.settings import Settings


def scene(server, lines: list[tuple[str, int]], seed: int, context: list[dict] = ()) -> bytes:
    """The speech of the same dialogue by fal's API, as a WAV file."""
    turns = [{"text": text, "speaker_id": speaker} for text, speaker in lines]
    fields = {"scene": turns, "context": list(context), "seed": seed}
    url = server.post("/fal-ai/csm-1b", json=fields).raise_for_status().json()["audio"]["url"]
    return httpx.get(url).content


# Speech


def test_a_dialogue_equals_that_of_other_apis_with_the_same_seed(visit, server):
    for speaker in "AB":
        visit.panel(speaker).get_by_label("Voice", exact=True).select_option("none")
    visit.write("A: one two three\nB: four five six")
    visit.set("Seed", "7")
    audio = visit.speak()
    assert np.sqrt(np.mean(audio**2)) > 0.01
    assert same(as_wav(audio), scene(server, [("one two three", 0), ("four five six", 1)], 7))
    assert visit.page.locator("#used-seed").text_content() == "7"
    assert f"{len(audio) / 24_000:.2f} s" in visit.page.locator("#seconds").text_content()


def test_a_turn_in_a_voice_is_the_same_in_other_formats(visit, server):
    visit.write("A: one two three")
    visit.choose("A", "slt")
    wav = visit.speak()
    assert same(as_wav(visit.download("FLAC")), as_wav(wav))
    seed = visit.page.locator("#used-seed").text_content()
    fields = {"text": "one two three", "voice": "slt", "seed": int(seed)}
    assert same(server.post("/generate", json=fields).content, as_wav(wav))
    mp3 = visit.download("MP3")
    assert len(mp3) == pytest.approx(len(wav), abs=0.2 * 24_000)  # mp3 pads its ends


def test_a_seed_can_be_kept(visit):
    visit.write("A: one two")
    first = visit.speak()
    visit.page.get_by_role("button", name="use it again").click()
    assert same(as_wav(visit.speak()), as_wav(first))


def test_playback_starts_with_the_first_frame(visit):
    """While the rest is still being generated."""

    def respond(server: FakeServer, message: dict) -> None:
        if message["type"] == "session":
            server.tell("session")
        elif len(server.messages) == 2:
            server.tell("started", id=1, text=message["text"])
            server.play(0.08)

    server = FakeServer(visit.page, respond)
    visit.start()
    visit.wait_until("Number(document.querySelector('#position').value) >= 0.08")
    visit.status("Buffering")
    # Playback continues after a reserve has been buffered.
    server.play(0.16)
    visit.page.wait_for_timeout(200)
    assert visit.page.locator("#position").input_value() == "0.08"
    server.play(1.0)
    visit.wait_until("Number(document.querySelector('#position').value) > 0.5")
    visit.status("Line 1 of 3")
    highlighted = visit.page.locator("[aria-current=true]").inner_text()
    assert highlighted.split() == [
        "A",
        "one",
        "two",
        "three",
    ]
    visit.page.locator("#stop").click()
    visit.status("Stopped")


def test_chunks_are_played_without_gaps(visit):
    """The browser plays the samples that have arrived, however they were cut into chunks.

    A start in seconds is not exactly a sample, and the browser interpolates, so the last digits may
    differ.
    """
    differs = visit.page.evaluate("""async () => {
        const { Player } = await import("./player.js");
        const { Speech } = await import("./speech.js");
        const context = new OfflineAudioContext(1, 24000 * 4, 24000);
        const player = new Player(context), speech = new Speech();
        const samples = Float32Array.from({ length: 72000 }, () => Math.random() - 0.5);
        player.load(speech);
        for (let i = 0; i < samples.length; i += 1920) {
            speech.add(samples.slice(i, i + 1920));
            player.update();
        }
        const played = (await context.startRendering()).getChannelData(0);
        const start = played.findIndex((value) => value !== 0);
        const differs = (value, i) => Math.abs(played[start + i] - value) > 1e-6;
        return [start, samples.findIndex(differs)];
    }""")
    assert differs[0] < 24_000 / 10
    assert differs[1] == -1


def test_the_first_chunk_is_played_even_on_a_slow_page(visit):
    """It cannot be late: nothing was played before. The clock advances by 50 ms each step."""
    state = visit.page.evaluate("""async () => {
        const { Player } = await import("./player.js");
        const { Speech } = await import("./speech.js");
        const context = new OfflineAudioContext(1, 24000 * 4, 24000);
        let time = 0;
        Object.defineProperty(context, "currentTime", { get: () => (time += 0.05) });
        const player = new Player(context), speech = new Speech();
        player.load(speech);
        speech.add(new Float32Array(1920));
        player.update();
        return player.state;
    }""")
    assert state == "playing"


def test_speech_can_be_replayed_from_any_position(visit):
    page = visit.page
    FakeServer(page, answer_with(lambda server: server.play(0.4)))
    visit.start()
    visit.status("1.2 s of speech")
    visit.wait_until("document.querySelector('#speech').dataset.state === 'ended'")
    assert page.locator("#position").input_value() == "1.2"
    page.get_by_role("button", name="four five six").click()
    visit.wait_until("Number(document.querySelector('#position').value) > 0.4")
    page.get_by_role("button", name="Pause").click()
    page.locator("#position").fill("0.2")
    assert page.locator("#time").text_content() == "0:00.2"
    page.get_by_role("button", name="Play", exact=True).click()
    visit.wait_until("document.querySelector('#speech').dataset.state === 'ended'")


def test_stop_frees_the_slot(visit, server):
    visit.write("A: one two three four five six seven eight\n" * 10)
    visit.start()
    visit.status("Line 1 of 10", seconds=SPEAK_MS / 1000)
    visit.page.keyboard.press("Escape")
    visit.status("Stopped")
    server.wait_until_idle(seconds=5)
    assert visit.sent[-1] == {"type": "cancel"}


def test_stop_silences_chunks_that_have_arrived(visit):
    FakeServer(visit.page, answer_with(lambda server: server.play(2)))
    visit.start()
    visit.status("6.0 s of speech")
    visit.page.locator("#stop").click()
    visit.wait_until("document.querySelector('#speech').dataset.state === 'paused'")
    assert visit.page.locator("#stop").is_disabled()


def test_a_cut_turn_shows_a_notice(visit):
    visit.write("A: one two three four five six seven eight nine")
    visit.set("Longest turn, in seconds", "0.4")
    assert len(visit.speak()) <= 0.4 * 24_000
    assert "Cut at the longest length" in visit.page.locator("#lines").inner_text()


# Voices


def test_a_recording_from_a_file_gives_the_voice(visit, server, recording, transcript):
    upload(visit, recording, transcript)
    visit.write("A: one two three")
    visit.set("Seed", "3")
    audio = "data:audio/flac;base64," + base64.b64encode(recording).decode()
    context = [{"prompt": transcript, "audio_url": audio, "speaker_id": 0}]
    expected = scene(server, [("one two three", 0)], 3, context)
    assert same(as_wav(visit.speak()), expected)
    sent = next(message for message in visit.sent if message["type"] == "turn")
    np.testing.assert_allclose(pcm(sent["audio"]), as_samples(recording), atol=1 / 32768)


def test_a_recording_from_the_microphone_gives_the_voice(visit):
    panel = visit.panel("B")
    visit.choose("B", "My own recording")
    panel.get_by_role("button", name="Record", exact=True).click()
    visit.wait_until("document.querySelectorAll('meter')[1].value > 0.05")
    visit.page.wait_for_timeout(500)
    panel.get_by_role("button", name="Stop recording").click()
    panel.locator("audio").wait_for()
    panel.get_by_label("What is said in it").fill("beep")
    visit.write("B: one")
    visit.speak()
    sent = next(message for message in visit.sent if message["type"] == "turn")
    audio = pcm(sent["audio"])
    assert (sent["text"], sent["speaker"]) == ("beep", 1)
    assert 0.5 < len(audio) / 24_000 < 10
    assert np.abs(audio).max() > 0.05


def test_a_voice_can_be_saved_and_deleted(visit, server, recording, transcript):
    panel = upload(visit, recording, transcript)
    panel.get_by_label("Keep it as a voice").fill("no/name")
    panel.get_by_role("button", name="Save").click()
    panel.get_by_text("a voice cannot be called").wait_for()
    visit.delay("**/v1/audio/voices")
    panel.get_by_label("Keep it as a voice").fill("kept")
    panel.get_by_role("button", name="Save").click()
    panel.get_by_text("kept is saved").wait_for()
    assert panel.get_by_label("Voice", exact=True).input_value() == "preset:kept"
    kept = server.get("/v1/audio/voices/kept").content
    np.testing.assert_allclose(as_samples(kept), as_samples(recording), atol=1 / 32768)
    panel.get_by_role("button", name="Delete").click()
    panel.get_by_text("kept is deleted").wait_for()
    assert server.get("/v1/audio/voices/kept").status_code == 404
    assert panel.get_by_label("Voice", exact=True).input_value() != "preset:kept"


def test_a_voice_that_another_client_added_appears(visit, server, recording):
    """Its transcript is shown as text, with any characters."""
    attack = "<img src=x onerror=alert(1)><script>alert(2)</script>"
    fields, files = {"name": "late", "text": attack}, {"audio": ("a.flac", recording)}
    server.post("/v1/audio/voices", data=fields, files=files).raise_for_status()
    visit.page.evaluate("window.dispatchEvent(new Event('focus'))")
    visit.panel("A").locator("option[value='preset:late']").wait_for(state="attached")
    visit.choose("A", "late")
    visit.panel("A").get_by_text(attack).wait_for()
    httpx.delete(f"{server.url}/v1/audio/voices/late").raise_for_status()


def test_a_speaker_keeps_the_number_of_its_voice(visit):
    """The model may have been trained with it; two speakers never have the same number."""
    numbers = visit.page.evaluate("""async () => {
        const { speakerNumbers } = await import("./reading.js");
        const preset = (speaker) => ({ kind: "preset", name: "a", speaker });
        const none = { kind: "none" };
        const both = [true, true];
        return [
            speakerNumbers([none, none], both),
            speakerNumbers([preset(1), preset(0)], both),
            speakerNumbers([preset(1), none], both),
            speakerNumbers([preset(0), preset(0)], both),
            speakerNumbers([preset(1), preset(1)], both),
            speakerNumbers([preset(1), preset(1)], [false, true]),
            speakerNumbers([none, preset(0)], both),
        ];
    }""")
    assert numbers == [[0, 1], [1, 0], [1, 0], [0, 1], [1, 0], [0, 1], [1, 0]]


def upload(visit, recording: bytes, transcript: str):
    """Uploads a recording for speaker A."""
    visit.choose("A", "My own recording")
    panel = visit.panel("A")
    file = {"name": "a.flac", "mimeType": "audio/flac", "buffer": recording}
    panel.get_by_label("Recording, a file").set_input_files(file)
    panel.locator("audio").wait_for()
    panel.get_by_label("What is said in it").fill(transcript)
    return panel


# Errors


def test_each_error_is_shown_beside_its_control(visit):
    page = visit.page
    visit.write("   ")
    visit.start()
    page.locator("#dialogue-error").get_by_text("nothing to say").wait_for()
    visit.write("A: one\nB: " + "x" * 20_000)
    page.get_by_role("button", name="Turns", exact=True).click()
    visit.start()
    page.locator(".turn").nth(1).get_by_text("at most 10000").wait_for(timeout=SPEAK_MS)
    assert page.get_by_role("textbox", name="Turn 2").get_attribute("aria-invalid") == "true"
    visit.write("A: one")
    visit.set("Seed", "seven")
    visit.start()
    setting = page.locator(".setting", has=page.get_by_label("Seed", exact=True))
    setting.get_by_text("valid integer").wait_for(timeout=SPEAK_MS)
    visit.set("Seed", "")
    visit.choose("A", "My own recording")
    visit.start()
    visit.panel("A").get_by_text("There is no recording yet").wait_for()


def test_a_file_that_is_not_audio_shows_an_error(visit):
    visit.choose("A", "My own recording")
    file = {"name": "a.flac", "mimeType": "audio/flac", "buffer": b"no sound"}
    visit.panel("A").get_by_label("Recording, a file").set_input_files(file)
    visit.panel("A").get_by_text("cannot read this as a recording").wait_for()


def test_errors_and_texts_are_not_interpreted_as_html(visit):
    attack = "<img src=x onerror=alert(1)>"

    def respond(server: FakeServer, message: dict) -> None:
        if message["type"] == "session":
            server.tell("session")
        elif message["type"] == "say" and len(server.messages) == 2:
            server.tell("error", message=attack, id=1, param=None)

    FakeServer(visit.page, respond)
    visit.write(f"A: {attack}")
    visit.start()
    visit.page.locator("#speech-error").get_by_text(attack).wait_for()
    assert visit.page.locator("#lines").get_by_text(attack).count() == 1
    visit.page.get_by_role("button", name="Turns", exact=True).click()
    assert visit.page.get_by_role("textbox", name="Turn 1").input_value() == attack
    assert visit.page.locator("img").count() == 1


def test_a_broken_connection_keeps_the_speech_that_arrived(visit):
    page = visit.page

    def break_off(server: FakeServer) -> None:
        server.play(0.8)
        if sum(message["type"] == "say" for message in server.messages) == 2:
            server.socket.close(code=1011, reason="the engine has stopped")

    FakeServer(page, answer_with(break_off))
    visit.start()
    lost = "connection to the server was lost: the engine has stopped"
    page.locator("#speech-error").get_by_text(lost).wait_for()
    visit.status("Interrupted")
    assert len(visit.download("WAV")) >= 0.8 * 24_000
    page.unroute_all()
    FakeServer(page, answer_with(lambda server: server.play(0.4)))
    page.get_by_role("button", name="Try again").click()
    visit.status("1.2 s of speech")
    assert page.locator("#speech-error").is_hidden()


def test_an_unreachable_server_shows_an_error(model, browser):
    with serve(model, Settings(**SMALL)) as running:
        visit = Visit(browser.new_page(), running.url)
    visit.start()
    # The banner of the page may say it too.
    visit.page.locator("#speech-error").get_by_text("The server cannot be reached").wait_for()
    visit.status("Not spoken")
    visit.page.close()


# Keys


@pytest.fixture
def certificate(tmp_path):
    """Settings of uvicorn for https."""
    issued = trustme.CA().issue_cert("localhost")
    issued.private_key_pem.write_to_path(tmp_path / "key.pem")
    issued.cert_chain_pems[0].write_to_path(tmp_path / "cert.pem")
    return {f"ssl_{name}file": str(tmp_path / f"{name}.pem") for name in ("cert", "key")}


def test_the_page_asks_for_a_key(model, browser, certificate):
    """Over https, as a server with keys should run."""
    with serve(model, Settings(**SMALL, api_keys=("secret+/~key",)), **certificate) as guarded:
        page = browser.new_page(ignore_https_errors=True)
        visit = Visit(page, guarded.url)
        page.get_by_label("Key", exact=True).fill("wrong")
        page.get_by_role("button", name="Use key").click()
        page.locator("#key-panel").get_by_text("The server does not know this key").wait_for()
        assert page.evaluate("sessionStorage.length") == 0
        page.get_by_label("Key", exact=True).fill("secret+/~key")
        page.get_by_role("button", name="Use key").click()
        page.locator("#key-panel").wait_for(state="hidden")
        page.reload()
        page.locator("option[value='preset:slt']").first.wait_for(state="attached")
        visit.write("A: one")
        assert len(visit.speak()) > 0
        # The key is stored in this tab only.
        assert page.evaluate("[localStorage.length, document.cookie]") == [0, ""]
        assert not [url for url in visit.requests if "secret" in url or "key=" in url]
        assert any(url.startswith("wss:") for url in visit.requests)
        page.get_by_role("button", name="API key").click()
        page.get_by_role("button", name="Forget it").click()
        page.get_by_label("Key", exact=True).wait_for()
        assert page.evaluate("sessionStorage.length") == 0
        assert visit.complaints == []
        page.close()


# The editor


def test_lines_are_parsed(visit):
    text = "A: one\nb:two\n\n three\r\nA four\n A:\nB: A: x\n"
    turns = visit.page.evaluate(
        "async (text) => (await import('./lines.js')).parseLines(text)", text
    )
    assert [(turn["text"], turn["speaker"]) for turn in turns] == [
        ("one", 0),
        ("two", 1),
        ("three", 0),
        ("A four", 1),
        ("A: x", 1),
    ]


def test_turns_are_edited_with_the_keyboard(visit):
    page = visit.page
    page.get_by_role("textbox", name="Turn 3").focus()
    page.keyboard.press("Enter")
    page.keyboard.type("ten")
    assert page.get_by_role("textbox", name="Turn 4, speaker B").input_value() == "ten"
    page.keyboard.press("Alt+ArrowUp")
    assert page.get_by_role("textbox", name="Turn 3, speaker B").input_value() == "ten"
    page.get_by_role("button", name="Remove turn 1").press("Enter")
    page.get_by_role("button", name="Move down turn 1").press("Space")
    page.get_by_role("button", name="A, the speaker of turn 3").press("Enter")
    page.get_by_role("button", name="Text", exact=True).press("Enter")
    assert page.locator("#text").input_value() == "B: ten\nB: four five six\nB: seven eight nine"


# The Content-Security-Policy


def test_scripts_of_other_hosts_do_not_run(visit):
    ran = visit.page.evaluate("""() => {
        window.ran = [];
        const attempts = [
            () => { document.body.innerHTML += "<img src=x onerror='window.ran.push(1)'>"; },
            () => {
                const script = document.createElement("script");
                script.append("window.ran.push(2)");
                document.body.append(script);
            },
            () => {
                const script = document.createElement("script");
                script.setAttribute("src", "data:text/javascript,window.ran.push(3)");
                document.body.append(script);
            },
            () => { document.body.setAttribute("onclick", "window.ran.push(4)"); },
            () => { setTimeout("window.ran.push(5)", 0); },
        ];
        for (const attempt of attempts) try { attempt(); } catch { /* refused at once */ }
        document.body.click();
        return new Promise((resolve) => setTimeout(() => resolve(window.ran), 200));
    }""")
    assert ran == []
    assert visit.complaints
    visit.complaints.clear()


def test_the_documentation_loads_no_scripts_of_other_hosts(visit):
    visit.page.goto(f"{visit.url}/docs")
    visit.page.get_by_text("/v1/audio/speech", exact=True).click()
    visit.page.get_by_role("cell", name="response_format").wait_for()
