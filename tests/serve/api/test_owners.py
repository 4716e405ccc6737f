"""Tenants cannot reach each other's data, in any route."""

import json
import time

import httpx
import pytest
from serving import SMALL, as_samples, serve
from test_batch_jobs import lines

from csm_jax.serve.settings import Limits, Settings

VOICES = "/v1/audio/voices"
QUEUE = "/queue/fal-ai/csm-1b"
KEYS = {"anna": "key-of-anna-1", "ben": "key-of-ben-1", "anna too": "key-of-anna-2"}


@pytest.fixture(scope="module")
def tenants(model, tmp_path_factory):
    """A server with two keys of one tenant, and one of another."""
    keys = ("key-of-anna-1 tenant=anna", "key-of-anna-2 tenant=anna", "key-of-ben-1 tenant=ben")
    data = tmp_path_factory.mktemp("data")
    settings = Settings(**SMALL, api_keys=keys, data=data, limits=Limits(voices_per_owner=2))
    with serve(model, settings) as running:
        yield running


@pytest.fixture
def ask(tenants):
    """A client for each key."""
    clients = {
        name: httpx.Client(
            base_url=tenants.url, headers={"Authorization": f"Bearer {key}"}, timeout=60
        )
        for name, key in KEYS.items()
    }
    yield clients
    for client in clients.values():
        client.close()


def add_voice(client, recording, name="mine", text="six zero", speaker=0) -> httpx.Response:
    fields = {"name": name, "text": text, "speaker": speaker}
    return client.post(VOICES, data=fields, files={"audio": ("a.flac", recording)})


def wait(client, path: str, until) -> dict:
    deadline = time.monotonic() + 60
    while not until(response := client.get(path).json()):
        assert time.monotonic() < deadline, response
        time.sleep(0.05)
    return response


@pytest.fixture
def things(ask, recording):
    """Ids of the rows of a tenant, by the name of the parameter in the routes."""
    anna = ask["anna"]
    batch = anna.post("/v1/batches", files={"file": lines(1)}).json()
    wait(anna, f"/v1/batches/{batch['id']}", lambda batch: batch["status"] == "completed")
    scene = {"scene": [{"text": "one", "speaker_id": 0}]}
    job = anna.post(QUEUE, json=scene).json()["request_id"]
    status = f"{QUEUE}/requests/{job}/status"
    wait(anna, status, lambda state: state["status"] == "COMPLETED")
    assert add_voice(anna, recording).status_code == 201
    yield {
        "file_id": [batch["input_file_id"], batch["output_file_id"]],
        "batch_id": [batch["id"]],
        "job_id": [job],
        # The route of a voice.
        "name": ["mine"],
    }
    anna.delete(f"{VOICES}/mine")


def test_every_route_gives_404_to_another_tenant(ask, things):
    """Covers all routes, so that a new one is covered too."""
    open_names = {"/files/{name}", "/v1/models/{name}"}
    tried = 0
    routes = ask["ben"].get("/openapi.json").json()["paths"]
    for path, methods in routes.items():
        names = [name for name in things if f"{{{name}}}" in path]
        if not names or path in open_names:
            continue
        [name] = names
        for method in methods:
            for thing in things[name]:
                response = ask["ben"].request(method, path.replace(f"{{{name}}}", thing))
                assert response.status_code == 404, (method, path, response.text)
                assert "key-of" not in response.text
                tried += 1
    assert tried >= 12
    # The rows are unchanged.
    for path in owned_paths(things):
        assert ask["anna too"].get(path).status_code == 200, path


def owned_paths(things) -> list[str]:
    return [
        *(f"/v1/files/{name}" for name in things["file_id"]),
        *(f"/v1/files/{name}/content" for name in things["file_id"]),
        f"/v1/batches/{things['batch_id'][0]}",
        f"{QUEUE}/requests/{things['job_id'][0]}",
        f"{VOICES}/mine",
    ]


def test_lists_contain_only_rows_of_the_owner(ask, things):
    for name, own in (("anna", True), ("anna too", True), ("ben", False)):
        files = [each["id"] for each in ask[name].get("/v1/files?limit=100").json()["data"]]
        batches = [each["id"] for each in ask[name].get("/v1/batches").json()["data"]]
        voices = [each["name"] for each in ask[name].get(VOICES).json()["voices"]]
        assert (set(things["file_id"]) <= set(files)) is own
        assert (things["batch_id"][0] in batches) is own
        assert ("mine" in voices) is own
        listed = ask[name].get("/v1/voices").json()["voices"]
        assert [each["voice_id"] for each in listed] == voices
        assert "slt" in voices


def test_paging_after_another_owners_row_gets_404(ask, things):
    batch, file = things["batch_id"][0], things["file_id"][0]
    for path in (f"/v1/batches?after={batch}", f"/v1/files?after={file}"):
        assert ask["anna"].get(path).status_code == 200
        assert ask["ben"].get(path).status_code == 404


def test_a_batch_of_another_tenants_file_is_refused(ask, things):
    body = {"input_file_id": things["file_id"][0]}
    assert ask["ben"].post("/v1/batches", json=body).status_code == 404


def test_two_tenants_have_a_voice_of_one_name(ask, things, recording):
    add_voice(ask["ben"], recording, text="three", speaker=9)
    found = {
        name: {each["name"]: each for each in ask[name].get(VOICES).json()["voices"]}["mine"]
        for name in ("anna", "ben")
    }
    assert (found["anna"]["text"], found["ben"]["text"]) == ("six zero", "three")
    assert ask["ben"].delete(f"{VOICES}/mine").status_code == 204
    assert ask["anna"].get(f"{VOICES}/mine").status_code == 200


def test_voices_of_other_owners_are_refused(ask, things):
    asked = [
        ("/generate", {"text": "one", "voice": "mine"}),
        ("/v1/audio/speech", {"model": "csm-1b", "input": "one", "voice": "mine"}),
        ("/v1/inference/sesame/csm-1b", {"text": "one", "preset_voice": "mine"}),
        ("/v1/text-to-speech/mine", {"text": "one"}),
    ]
    for path, body in asked:
        assert ask["anna"].post(path, json=body).status_code == 200
        refused = ask["ben"].post(path, json=body)
        assert refused.status_code == 400
        assert "there is no voice 'mine'" in refused.text


def test_lines_of_a_batch_use_the_voices_of_their_owner(ask, things):
    spoken = {}
    for name in ("anna", "ben"):
        data = lines(1, voice="mine")
        batch = ask[name].post("/v1/batches", files={"file": data}).json()
        path = f"/v1/batches/{batch['id']}"
        wait(ask[name], path, lambda batch: batch["status"] == "completed")
        text = ask[name].get(f"/v1/files/{batch['output_file_id']}/content").text
        spoken[name] = json.loads(text)
    assert spoken["anna"]["error"] is None
    assert "there is no voice" in spoken["ben"]["error"]["message"]


def test_shared_voices_are_read_only(ask, recording):
    for name in ("anna", "ben"):
        assert add_voice(ask[name], recording, name="slt").status_code == 400
        assert ask[name].delete(f"{VOICES}/slt").status_code == 400


def test_a_tenant_can_add_a_limited_number_of_voices(ask, recording):
    names = ["one", "two", "three"]
    codes = [add_voice(ask["ben"], recording, name=name).status_code for name in names]
    assert codes == [201, 201, 429]
    assert add_voice(ask["anna"], recording, name="one").status_code == 201
    for name in names:
        ask["ben"].delete(f"{VOICES}/{name}")
    ask["anna"].delete(f"{VOICES}/one")


def test_downloads_need_no_key(tenants, ask, things):
    """fal's clients send none; the name has 144 random bits."""
    job = things["job_id"][0]
    url = ask["anna"].get(f"{QUEUE}/requests/{job}").json()["audio"]["url"]
    assert len(as_samples(httpx.get(url).content)) > 1000
    name = url.rpartition("/")[2]
    assert len(name.partition(".")[0]) == 24
    for guess in (name[:-5], name.swapcase(), "%25", "_" * 24 + ".wav"):
        assert tenants.get(f"/files/{guess}").status_code in (401, 404)
