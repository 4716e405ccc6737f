"""Packages that speak through OpenAI's API, unchanged: their speech is what was asked for."""

import base64
import io
import wave

import numpy as np
import pytest
from hearing import median_pitch, recognize_digits
from serving import as_samples

from csm_jax.evaluate.word_errors import count_errors

TEXT = "one two three four"


def check_speech(audio: np.ndarray, rate: int = 24_000) -> None:
    """The speech of a woman (slt, OpenAI's ash) with the words of `TEXT`."""
    assert audio.dtype == np.float32
    assert median_pitch(audio, rate) > 130
    assert count_errors(TEXT.split(), recognize_digits(audio, rate)).errors <= 1


def from_pcm(data: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(data), "<i2").astype(np.float32) / 32768


@pytest.mark.parametrize("form", ["mp3", "wav", None])
def test_litellm(server, python, form):
    data = python(
        "litellm",
        """
        import base64, json, litellm
        more = {"response_format": FORM} if FORM else {}
        speech = litellm.speech(
            model="openai/csm-1b", input=TEXT, voice="ash", api_base=URL, api_key="none", **more
        )
        print(json.dumps(base64.b64encode(speech.content).decode()))
        """,
        TEXT=TEXT,
        URL=f"{server.url}/v1",
        FORM=form,
    )
    check_speech(as_samples(base64.b64decode(data)))


@pytest.mark.parametrize("name", ["tts-1", "gpt-4o-mini-tts"])
def test_livekit(server, python, name):
    """Its two forms: a file, and events with pieces of one."""
    data, rate = python(
        "livekit.plugins.openai",
        """
        import asyncio, base64, json
        from livekit.agents import utils
        from livekit.plugins import openai

        async def main():
            tts = openai.TTS(model=MODEL, voice="ash", base_url=URL, api_key="none")
            frames = [event.frame async for event in tts.synthesize(TEXT)]
            data = b"".join(bytes(frame.data) for frame in frames)
            await tts.aclose()
            print(json.dumps([base64.b64encode(data).decode(), frames[0].sample_rate]))

        asyncio.run(main())
        """,
        TEXT=TEXT,
        URL=f"{server.url}/v1",
        MODEL=name,
    )
    check_speech(from_pcm(data), rate)


def test_pipecat(server, python):
    data, rate = python(
        "pipecat",
        """
        import asyncio, base64, json
        from pipecat.frames.frames import TTSAudioRawFrame, TTSSpeakFrame
        from pipecat.services.openai.tts import OpenAITTSService
        from pipecat.tests.utils import SleepFrame, run_test

        async def main():
            service = OpenAITTSService(
                api_key="none", base_url=URL, voice="ash", sample_rate=24000
            )
            sent = [TTSSpeakFrame(TEXT), SleepFrame(15)]
            down, _ = await run_test(service, frames_to_send=sent)
            frames = [frame for frame in down if isinstance(frame, TTSAudioRawFrame)]
            data = b"".join(frame.audio for frame in frames)
            print(json.dumps([base64.b64encode(data).decode(), frames[0].sample_rate]))

        asyncio.run(main())
        """,
        TEXT=TEXT,
        URL=f"{server.url}/v1",
    )
    check_speech(from_pcm(data), rate)


def test_openai_agents(server, python):
    """The text-to-speech part of a voice pipeline."""
    data = python(
        "agents.voice",
        """
        import asyncio, base64, json
        from agents.voice import TTSModelSettings
        from agents.voice.models.openai_tts import OpenAITTSModel
        from openai import AsyncOpenAI

        async def main():
            client = AsyncOpenAI(base_url=URL, api_key="none")
            settings = TTSModelSettings(voice="ash")
            pieces = OpenAITTSModel("gpt-4o-mini-tts", client).run(TEXT, settings)
            data = b"".join([piece async for piece in pieces])
            print(json.dumps(base64.b64encode(data).decode()))

        asyncio.run(main())
        """,
        TEXT=TEXT,
        URL=f"{server.url}/v1",
    )
    check_speech(from_pcm(data))


def test_deepinfra(server, python):
    """Its client has no call of its own for speech, so it posts the documented request."""
    found = python(
        "deepinfra",
        """
        import json
        from deepinfra.clients import DeepInfraClient, RequestSpec

        body = {"text": TEXT, "preset_voice": "conversational_b", "response_format": "flac"}
        client = DeepInfraClient("key", base_url=URL)
        response = client.request(RequestSpec("POST", "/v1/inference/sesame/csm-1b", json=body))
        print(json.dumps(response.json()))
        """,
        TEXT=TEXT,
        URL=server.url,
    )
    head, data = found["audio"].split(",")
    assert head == "data:audio/flac;base64"
    assert found["inference_status"]["status"] == "succeeded"
    check_speech(as_samples(base64.b64decode(data)))


def test_open_webui(server, python):
    """The application itself lists the voices and models, and speaks."""
    found = python(
        "open_webui",
        """
        import base64, json, os, socket, subprocess, sys, tempfile, time
        import httpx

        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        api = f"http://127.0.0.1:{port}/api/v1"
        settings = {"AUDIO_TTS_ENGINE": "openai", "AUDIO_TTS_OPENAI_API_BASE_URL": URL}
        settings |= {"AUDIO_TTS_OPENAI_API_KEY": "none", "USE_SLIM_DOCKER": "true"}
        settings |= {"ENABLE_OLLAMA_API": "false", "OPENAI_API_BASE_URL": URL}
        settings |= {"OFFLINE_MODE": "true", "WEBUI_AUTH": "false", "WEBUI_SECRET_KEY": "x"}
        program = os.path.join(os.path.dirname(sys.executable), "open-webui")
        data = tempfile.TemporaryDirectory()
        server = subprocess.Popen(
            [program, "serve", "--host=127.0.0.1", f"--port={port}"],
            env=os.environ | settings | {"DATA_DIR": data.name},
            stdout=sys.stderr,
        )

        def sign_in():
            for _ in range(150):
                try:
                    account = {"email": "", "password": ""}
                    return httpx.post(f"{api}/auths/signin", json=account).json()["token"]
                except httpx.ConnectError:
                    time.sleep(1)
            raise SystemExit("the application does not start")

        try:
            client = httpx.Client(headers={"Authorization": f"Bearer {sign_in()}"}, timeout=60)
            voices, models = (client.get(f"{api}/audio/{x}").json() for x in ("voices", "models"))
            speech = client.post(f"{api}/audio/speech", json={"input": TEXT, "voice": "slt"})
            audio = base64.b64encode(speech.content).decode()
            print(json.dumps({"audio": audio} | voices | models))
        finally:
            server.terminate()
            server.wait()
            data.cleanup()
        """,
        TEXT=TEXT,
        URL=f"{server.url}/v1",
    )
    assert found["models"] == [{"id": "csm-1b", "name": "csm-1b"}]
    assert found["voices"] == [{"id": name, "name": name} for name in ("rms", "slt")]
    check_speech(as_samples(base64.b64decode(found["audio"])))


def test_home_assistant(server, python):
    """Its proxy `wyoming-openai` reads the head of a WAV file that is streamed."""
    data, rate = python(
        "wyoming_openai",
        """
        import asyncio, base64, json, socket, subprocess, sys
        from wyoming.audio import AudioChunk, AudioStart, AudioStop
        from wyoming.client import AsyncTcpClient
        from wyoming.tts import Synthesize, SynthesizeVoice

        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        proxy = subprocess.Popen(
            [sys.executable, "-m", "wyoming_openai", "--uri", f"tcp://127.0.0.1:{port}",
             "--tts-openai-url", URL, "--tts-openai-key", "none", "--tts-models", "csm-1b",
             "--tts-voices", "ash", "--languages", "en"],
        )

        async def connect():
            for _ in range(100):
                try:
                    client = AsyncTcpClient("127.0.0.1", port)
                    await client.connect()
                    return client
                except OSError:
                    await asyncio.sleep(0.2)
            raise SystemExit("the proxy does not start")

        async def main():
            client = await connect()
            voice = SynthesizeVoice(name="ash")
            await client.write_event(Synthesize(text=TEXT, voice=voice).event())
            data, rate = b"", None
            while True:
                event = await asyncio.wait_for(client.read_event(), 60)
                if AudioStart.is_type(event.type):
                    rate = AudioStart.from_event(event).rate
                elif AudioChunk.is_type(event.type):
                    data += AudioChunk.from_event(event).audio
                elif AudioStop.is_type(event.type):
                    break
            print(json.dumps([base64.b64encode(data).decode(), rate]))

        try:
            asyncio.run(main())
        finally:
            proxy.terminate()
            proxy.wait()
        """,
        TEXT=TEXT,
        URL=f"{server.url}/v1",
    )
    check_speech(from_pcm(data), rate)


def test_a_file_of_openai_client_opens_in_the_standard_library(server, python):
    data = python(
        "openai",
        """
        import base64, json, openai
        client = openai.OpenAI(base_url=URL, api_key="none")
        speech = client.audio.speech.create(
            model="tts-1", input=TEXT, voice="ash", response_format="wav"
        )
        print(json.dumps(base64.b64encode(speech.content).decode()))
        """,
        TEXT=TEXT,
        URL=f"{server.url}/v1",
    )
    with wave.open(io.BytesIO(base64.b64decode(data))) as file:
        samples = np.frombuffer(file.readframes(file.getnframes()), "<i2")
    check_speech(samples.astype(np.float32) / 32768)
