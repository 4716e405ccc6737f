"""Checkpoints by name, from a local server with the API of the Hugging Face hub."""

import itertools
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

import fixtures
import forked
import numpy as np
import pytest
from fixtures import CONFIG, assert_same_params, params

from csm_jax.checkpoints import native_format, peft_files
from csm_jax.model.layers import LowRank
from csm_jax.model.lora import LoRAConfig, init_adapters
from csm_jax.model.precision import FLOAT32

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LATER = "89abcdef0123456789abcdef0123456789abcdef"
TOKEN = "hf_secret"
# The hub's library asks for this once a day, if a program of this kind runs it.
AGENTS = "/api/agent-harnesses"


def write_adapters(directory, config):
    """Adapters with random updates. Returns the directory."""
    random = np.random.default_rng(0)
    lora = LoRAConfig(rank=2)
    adapters = {
        path: LowRank(low.down, random.standard_normal(low.up.shape).astype(np.float32))
        for path, low in init_adapters(config, lora).items()
    }
    peft_files.write_adapters(directory, adapters, lora, "sesame/gated-csm")
    return directory


class Hub(ThreadingHTTPServer):
    """A hub whose repositories are directories; those named gated need a token.

    Attributes:
      seen: "METHOD path" of every request for a repository.
      commit: what all branches of all repositories are at.
    """

    def __init__(self, root):
        super().__init__(("127.0.0.1", 0), Handler)
        self.root = root
        self.seen: list[str] = []
        self.commit = COMMIT

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def downloaded(self) -> list[str]:
        """REPOSITORY/FILE of every download, sorted."""
        gets = (path.split() for path in self.seen)
        return sorted(
            re.sub("resolve/[^/]+/", "", path.strip("/"))
            for method, path in gets
            if method == "GET" and "/resolve/" in path
        )


class Handler(BaseHTTPRequestHandler):
    def do_HEAD(self):
        self.answer()

    def do_GET(self):
        self.answer()

    def answer(self):
        path = urlsplit(self.path).path
        if path != AGENTS:
            self.server.seen.append(f"{self.command} {path}")
        parts = path.strip("/").removeprefix("api/models/").split("/")
        directory = self.server.root / "/".join(parts[:2])
        if not directory.is_dir():
            self.refuse(404, "RepoNotFound", "Repository not found")
        elif "gated" in parts[1] and self.headers["Authorization"] != f"Bearer {TOKEN}":
            self.refuse(401, "GatedRepo", "Access to this model is restricted")
        elif path.startswith("/api/"):
            files = (path for path in directory.rglob("*") if path.is_file())
            names = sorted(path.relative_to(directory).as_posix() for path in files)
            tree = [{"type": "file", "path": n, "size": 1, "oid": n} for n in names]
            info = {"id": "/".join(parts[:2]), "sha": self.server.commit}
            siblings = [{"rfilename": name} for name in names]
            self.send(json.dumps(tree if "tree" in parts else info | {"siblings": siblings}))
        elif (file := directory.joinpath(*parts[4:])).is_file():
            self.send(file.read_bytes(), parts[-1])
        else:
            self.refuse(404, "EntryNotFound", "Entry not found")

    def commit(self):
        """That of the request's path, or that of its branch."""
        named = re.search("/resolve/([0-9a-f]{40})/", self.path)
        return named[1] if named else self.server.commit

    def send(self, content, name=""):
        content = content.encode() if isinstance(content, str) else content
        self.send_response(200)
        self.send_header("X-Repo-Commit", self.commit())
        self.send_header("ETag", f'"{name}"')
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def refuse(self, status, code, message):
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", message)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    root = tmp_path_factory.mktemp("hub")
    both = fixtures.write_mixed(root / "sesame" / "gated-csm")
    for name in ("README.md", "ckpt.pt", "prompts.wav"):
        (both / name).write_text("not wanted")
    (both / "generation_config.json").write_text("{}")
    fixtures.write_sesame(root / "someone" / "tuned")
    fixtures.write_codec(root / "kyutai" / "mimi", "huggingface_codec")
    (both / "prompts").mkdir()
    for name in ("read_speech_c.wav", "mine.wav"):
        (both / "prompts" / name).write_bytes(b"a recording of " + name.encode())
    (both / "prompts" / "mine.txt").write_text("What I say.")
    (root / "someone" / "else").mkdir()
    write_adapters(root / "someone" / "lora", fixtures.CONFIG)
    (root / "someone" / "run").mkdir()
    write_adapters(root / "someone" / "run" / "checkpoint-500", fixtures.CONFIG)
    bare = fixtures.write_sesame(root / "someone" / "bare")
    (bare / "config.json").unlink()
    (root / "meta-llama" / "Llama-3.2-1B").mkdir(parents=True)
    shutil.move(bare / "tokenizer.json", root / "meta-llama" / "Llama-3.2-1B")
    (root / "meta-llama" / "Llama-3.2-1B" / "config.json").write_text("{}")
    several = root / "someone" / "several"
    several.mkdir()
    fixtures.write_config(several)
    for name in ("model_1000.pt", "model_final.pt"):
        (several / name).write_bytes(b"")
    with Hub(root) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def run(hub, tmp_path):
    """Looks up names in a process with separate caches; returns a line for each."""
    hub.seen.clear()
    hub.commit = COMMIT
    numbers = itertools.count()
    # The library retries for up to 23 s without a network.
    native = """
        import sys, time
        time.sleep = lambda seconds: None
        from csm_jax.loading import hub
        from csm_jax.errors import CheckpointError
        for name in sys.argv[1:]:
            try:
                print("native:", hub.native_copy(name))
            except CheckpointError as error:
                print("error:", error)
    """

    def run(*names: str, code: str = native, **environment: str) -> list[str]:
        paths = {"HF_HOME": str(tmp_path / "hf"), "CSM_JAX_CACHE": str(tmp_path / "ours")}
        settings = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN}
        variables = os.environ | paths | settings | environment
        output = tmp_path / f"{next(numbers)}.out"
        return forked.run_code(code, names, variables, output)

    return run


def closed_port() -> str:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{taken.getsockname()[1]}"


def test_a_repository_is_downloaded_and_converted_once(hub, run, tmp_path):
    native = tmp_path / "ours" / "checkpoints" / f"sesame--gated-csm@{COMMIT}"
    assert run("sesame/gated-csm") == [f"native: {native}"]
    wanted = ["config.json", "generation_config.json", "tokenizer.json"]
    wanted += [f"transformers-0000{i}-of-00002.safetensors" for i in (1, 2)]
    wanted += ["transformers.safetensors.index.json"]
    assert hub.downloaded() == [f"sesame/gated-csm/{name}" for name in wanted]
    loaded = fixtures.load_params(native, CONFIG, FLOAT32)
    assert_same_params(native_format.flatten(loaded), params())
    assert (native / "generation_config.json").is_file()

    # The second time needs no token, no cache of the hub's library and no download.
    hub.seen.clear()
    before = {path: path.stat().st_mtime_ns for path in native.rglob("*")}
    shutil.move(tmp_path / "hf", tmp_path / "aside")
    assert run("sesame/gated-csm", HF_TOKEN="") == [f"native: {native}"]
    assert hub.seen == ["HEAD /sesame/gated-csm/resolve/main/config.json"]
    assert run("sesame/gated-csm", HF_HUB_OFFLINE="1") == [f"native: {native}"]
    assert run("sesame/gated-csm", HF_ENDPOINT=closed_port()) == [f"native: {native}"]
    assert {path: path.stat().st_mtime_ns for path in native.rglob("*")} == before

    # Without the native copy, the hub's own cache suffices offline.
    hub.seen.clear()
    shutil.rmtree(native)
    shutil.move(tmp_path / "aside", tmp_path / "hf")
    assert run("sesame/gated-csm", HF_HUB_OFFLINE="1") == [f"native: {native}"]
    assert hub.seen == []
    assert native_format.is_native(native)


def test_sesames_layout_is_converted_with_kyutais_codec(hub, run, tmp_path):
    native = tmp_path / "ours" / "checkpoints" / f"someone--tuned@{COMMIT}"
    assert run("someone/tuned") == [f"native: {native}"]
    own = [f"someone/tuned/{name}" for name in ("config.json", "model.safetensors")]
    codec = [f"kyutai/mimi/{name}" for name in ("config.json", "model.safetensors")]
    assert hub.downloaded() == [*codec, *own, "someone/tuned/tokenizer.json"]
    loaded = fixtures.load_params(native, CONFIG, FLOAT32)
    assert_same_params(native_format.flatten(loaded), params())


def test_a_repository_of_weights_alone_is_converted(hub, run, tmp_path):
    """As MisoTTS: its shapes tell the model, and its tokenizer is the reference's."""
    code = """
        import sys
        from csm_jax.config import tiny
        from csm_jax.convert import flavors
        from csm_jax.loading import hub
        config = tiny()
        flavors.FLAVORS |= {"tiny": config.backbone, "tiny depth": config.depth_decoder}
        flavors.MODELS["tiny"] = config
        for name in sys.argv[1:]:
            print("native:", hub.native_copy(name))
    """
    native = tmp_path / "ours" / "checkpoints" / f"someone--bare@{COMMIT}"
    assert run("someone/bare", code=code) == [f"native: {native}"]
    codec = [f"kyutai/mimi/{name}" for name in ("config.json", "model.safetensors")]
    tokenizer = "meta-llama/Llama-3.2-1B/tokenizer.json"
    assert hub.downloaded() == [*codec, tokenizer, "someone/bare/model.safetensors"]
    loaded = fixtures.load_params(native, CONFIG, FLOAT32)
    assert_same_params(native_format.flatten(loaded), params())
    # Afterwards nothing is downloaded, with a network or without.
    hub.seen.clear()
    assert run("someone/bare") == [f"native: {native}"]
    assert hub.downloaded() == []
    assert run("someone/bare", HF_HUB_OFFLINE="1") == [f"native: {native}"]
    assert run("someone/bare", HF_ENDPOINT=closed_port()) == [f"native: {native}"]
    # Without the native copy, the hub's own cache suffices offline.
    shutil.rmtree(native)
    assert run("someone/bare", code=code, HF_HUB_OFFLINE="1") == [f"native: {native}"]


def test_a_revision_can_be_given_beside_the_name(hub, run, tmp_path):
    code = """
        import sys
        import csm_jax
        name, revision = sys.argv[1:]
        print(csm_jax.load(name, revision=revision).config.num_codebooks)
        for wrong in ("demo", f"{name}@main", "random:tiny", "."):
            try:
                csm_jax.load(wrong, revision=revision)
            except csm_jax.InputError as error:
                print(error)
    """
    codebooks, *errors = run("someone/tuned", COMMIT, code=code)
    assert codebooks == str(CONFIG.num_codebooks)
    assert [path.name for path in (tmp_path / "ours" / "checkpoints").iterdir()] == [
        f"someone--tuned@{COMMIT}"
    ]
    reasons = ["no repository", "a revision already", "no repository", "no repository"]
    for error, reason in zip(errors, reasons, strict=True):
        assert reason in error


def test_a_repository_that_was_updated_is_converted_again(hub, run, tmp_path):
    copies = tmp_path / "ours" / "checkpoints"
    old, new = (copies / f"someone--tuned@{commit}" for commit in (COMMIT, LATER))
    assert run("someone/tuned") == [f"native: {old}"]
    hub.commit = LATER
    assert run("someone/tuned") == [f"native: {new}"]
    assert native_format.is_native(new)
    # A commit in the name stays, and asks nobody.
    hub.seen.clear()
    assert run(f"someone/tuned@{COMMIT}", "someone/tuned@main") == [
        f"native: {old}",
        f"native: {new}",
    ]
    assert hub.seen == ["HEAD /someone/tuned/resolve/main/config.json"]
    # Without a network the last known commit of the branch is meant.
    assert run("someone/tuned", HF_ENDPOINT=closed_port()) == [f"native: {new}"]
    # That is the one in the cache of the hub's library, which other programs use too.
    (tmp_path / "hf" / "hub" / "models--someone--tuned" / "refs" / "main").write_text(COMMIT)
    assert run("someone/tuned", HF_HUB_OFFLINE="1") == [f"native: {old}"]


def test_a_copy_of_an_older_version_is_used_without_a_network(run, tmp_path):
    """Its name has no commit."""
    old = fixtures.write_native(tmp_path / "ours" / "checkpoints" / "someone--tuned")
    offline = {"HF_ENDPOINT": closed_port()}
    assert run("someone/tuned", **offline) == [f"native: {old}"]


def test_adapters_are_downloaded_by_name(hub, run, tmp_path):
    code = """
        import sys
        import csm_jax
        for name in sys.argv[1:]:
            model = csm_jax.load("random:tiny", adapters=name)
            block = model.params["backbone"]["layers"][0]
            print(float(abs(block["attn"]["qkv"]["weight"]).sum()))
    """
    local = hub.root / "someone" / "lora"
    there, here, pinned = run("someone/lora", str(local), f"someone/lora@{COMMIT}", code=code)
    assert there == here == pinned
    assert hub.downloaded() == [
        "someone/lora/adapter_config.json",
        "someone/lora/adapter_model.safetensors",
    ]


@pytest.mark.long
def test_adapters_in_a_folder_of_a_repository_are_found(hub, run):
    code = """
        import sys
        from csm_jax.loading import hub
        from csm_jax.errors import CheckpointError
        for name in sys.argv[1:]:
            try:
                print(hub.download_adapters(name).name)
            except CheckpointError as error:
                print("error:", error)
    """
    names = ["checkpoint-500", f"checkpoint-500@{COMMIT}", ""]
    names = [f"someone/run/{name}".rstrip("/") for name in names] + ["someone/tuned"]
    first, pinned, whole, model = run(*names, code=code)
    assert first == pinned == "checkpoint-500"
    assert whole == "error: someone/run holds no adapters itself: name someone/run/checkpoint-500"
    assert model.startswith("error: someone/tuned holds a whole model and no adapters")
    files = [f"checkpoint-500/{peft_files.CONFIG}", f"checkpoint-500/{peft_files.WEIGHTS}"]
    assert hub.downloaded() == [f"someone/run/{file}" for file in files]
    hub.seen.clear()
    assert run(names[0], code=code, HF_HUB_OFFLINE="1") == [first]
    assert run(names[0], code=code, HF_ENDPOINT=closed_port()) == [first]
    (line,) = run("someone/run")
    assert line.startswith("error: someone/run/checkpoint-500 holds adapters of sesame/gated-csm")


def test_adapters_named_as_a_checkpoint_are_an_error_that_names_the_flag(run):
    (line,) = run("someone/lora")
    assert line.startswith("error: someone/lora holds adapters of sesame/gated-csm and no model")
    assert "--adapters=someone/lora" in line


def test_several_checkpoints_in_a_repository_are_listed(hub, run):
    (line,) = run("someone/several")
    assert "someone/several holds several checkpoints, model_1000.pt, model_final.pt" in line
    assert hub.downloaded() == ["someone/several/config.json"]


def test_recordings_of_a_repository_are_voices(hub, run, tmp_path):
    """The transcripts are the repository's, or the package's for known recordings."""
    code = """
        import sys
        from pathlib import Path
        from csm_jax.serve.voices.presets import find_presets
        for directory in find_presets(sys.argv[1], Path(sys.argv[2])):
            print("presets:", directory)
    """
    native = tmp_path / "native"
    native.mkdir()
    assert run("sesame/gated-csm", str(native), code=code) == [f"presets: {native / 'prompts'}"]
    names = ["config.json", "prompts/mine.txt", "prompts/mine.wav", "prompts/read_speech_c.wav"]
    assert hub.downloaded() == [f"sesame/gated-csm/{name}" for name in names]
    prompts = native / "prompts"
    assert sorted(path.name for path in prompts.iterdir()) == [
        "mine.txt",
        "mine.wav",
        "read_speech_c.txt",
        "read_speech_c.wav",
    ]
    assert (prompts / "mine.txt").read_text() == "What I say."
    assert "the Tree quite forgot" in (prompts / "read_speech_c.txt").read_text()
    assert (prompts / "read_speech_c.wav").read_bytes() == b"a recording of read_speech_c.wav"

    # They are downloaded once; without a network there are no voices.
    hub.seen.clear()
    assert run("sesame/gated-csm", str(native), code=code) == [f"presets: {prompts}"]
    assert hub.seen == []
    shutil.rmtree(prompts)
    shutil.rmtree(tmp_path / "hf")
    assert run("sesame/gated-csm", str(native), code=code, HF_HUB_OFFLINE="1") == []
    assert list(native.iterdir()) == []


def test_two_concurrent_processes_make_one_copy(hub, run, tmp_path):
    native = tmp_path / "ours" / "checkpoints" / f"sesame--gated-csm@{COMMIT}"
    with ThreadPoolExecutor(2) as pool:
        said = list(pool.map(run, ["sesame/gated-csm"] * 2))
    assert said == [[f"native: {native}"]] * 2
    assert list(native.parent.iterdir()) == [native]
    loaded = fixtures.load_params(native, CONFIG, FLOAT32)
    assert_same_params(native_format.flatten(loaded), params())


def test_refused_requests_are_errors_that_name_the_way_out(hub, run, tmp_path):
    names = ["sesame/gated-csm", "nobody/nothing", "someone/else"]
    lines = run(*names, HF_TOKEN="hf_wrong")
    assert len(lines) == len(names), "an error took more than one line"
    reasons = ["GatedRepoError", "RepositoryNotFoundError", "EntryNotFoundError"]
    for name, line, reason in zip(names, lines, reasons, strict=True):
        assert line.startswith(f"error: config.json of {name} could not be downloaded (")
        assert reason in line
        assert "accept the model's terms" in line
        assert "`hf auth login` or HF_TOKEN" in line
        assert "name a local directory" in line
    assert hub.downloaded() == []
    assert not (tmp_path / "ours" / "checkpoints").exists()


def test_a_missing_network_is_an_error_of_one_line(run, tmp_path):
    (line,) = run("sesame/csm-1b", HF_ENDPOINT=closed_port())
    assert line.startswith("error: config.json of sesame/csm-1b could not be downloaded (")
    assert "check the network" in line
    assert "name a local directory" in line
    assert not (tmp_path / "ours" / "checkpoints").exists()


def test_a_failed_download_is_one_line_on_the_command_line(tmp_path):
    """The warnings that the hub's library prints for every attempt are suppressed."""
    code = "import time; time.sleep = lambda _: 0; from csm_jax import generate; generate.run()"
    flags = ["--text=Hi.", "--checkpoint=sesame/csm-1b", f"--out={tmp_path / 'out.wav'}"]
    settings = {"HF_ENDPOINT": closed_port(), "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code, *flags],
        env=os.environ | settings,
        capture_output=True,
        text=True,
    )
    assert done.stdout == ""
    assert done.stderr.startswith("csm_jax.generate: error: config.json of sesame/csm-1b could ")
    assert done.stderr.count("\n") == 1
