"""`python -m csm_jax.generate`: its files, its messages, its errors and exit codes."""

import json
import os
import pty
import shutil
import subprocess
import sys
import termios

import fixtures
import numpy as np
import pytest
import soundfile
from fixtures import CONFIG, params

import csm_jax
from csm_jax.checkpoints import native_format
from csm_jax.generate import run
from csm_jax.prompt.splitting import needed_seconds

RATE = 24_000
NOISE = "random:tiny: the weights are random, the sound is noise and not speech"
CUT = "the speech was cut at 0.4 s and it may lack its end: raise max_audio_length_ms"
SHORT = ["--checkpoint=random:tiny", "--max_audio_length_ms=400"]
GREEDY = csm_jax.Sampling(greedy=True)
NUM_FRAMES = 5


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The files that the flags below name: recordings, scripts and damaged files."""
    directory = tmp_path_factory.mktemp("files")
    tone = 0.3 * np.sin(2 * np.pi * 200 * np.arange(RATE) / RATE)
    soundfile.write(directory / "voice.wav", tone[: RATE // 2], RATE)
    soundfile.write(directory / "long.wav", np.tile(tone, 11), RATE)
    (directory / "text.wav").write_text("this is not a recording")
    (directory / "empty.wav").write_bytes(b"")
    scripts = {
        "broken": "[{",
        "object": "{}",
        "none": "[]",
        "word": '["Hello."]',
        "wrong_field": '[{"speaker": 0, "text": "Hi."}, {"speaker": 0, "txet": "Hi."}]',
        "no_text": '[{"speaker": 0}]',
        "no_speaker": '[{"text": "Hi."}]',
        "speaker_word": '[{"speaker": "Ann", "text": "Hi."}]',
        "speaker_bool": '[{"speaker": true, "text": "Hi."}]',
        "text_number": '[{"speaker": 0, "text": 5}]',
        "text_empty": '[{"speaker": 0, "text": " "}]',
        "audio_missing": '[{"speaker": 0, "text": "Hi.", "audio": "gone.wav"}, '
        '{"speaker": 0, "text": "Hi."}]',
        "only_audio": '[{"speaker": 0, "text": "Hi.", "audio": "voice.wav"}]',
    }
    for name, content in scripts.items():
        (directory / f"{name}.json").write_text(content)
    (directory / "latin.json").write_bytes('[{"speaker": 0, "text": "é"}]'.encode("latin-1"))
    (directory / "directory.wav").mkdir()
    (directory / "codes.npy").mkdir()
    return directory


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory, native):
    """Directories that are not valid checkpoints, by their fault."""
    root = tmp_path_factory.mktemp("checkpoints")
    (root / "nothing").mkdir()
    good = fixtures.huggingface_tensors()
    head = good.pop("lm_head.weight")
    fixtures.write_huggingface(root / "missing", good)
    fixtures.write_huggingface(root / "extra", good | {"lm_head.weight": head, "lm_head.x": head})
    fixtures.write_huggingface(root / "misshapen", good | {"lm_head.weight": head[:, 1:]})
    cut = fixtures.write_huggingface(root / "cut", good | {"lm_head.weight": head})
    (file,) = cut.glob("*.safetensors")
    os.truncate(file, file.stat().st_size // 2)
    shutil.copytree(native, root / "no_tokenizer")
    (root / "no_tokenizer" / "tokenizer.json").unlink()
    return root


def failed(capsys, flags: list[str], out) -> str:
    """Runs a command that must fail; returns its line on stderr.

    It exits with 2, prints one line and nothing on stdout, and writes no file.
    """
    before = sorted(out.parent.rglob("*"))
    assert run(flags) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = (line for line in captured.err.splitlines() if line != NOISE)
    assert line.startswith("csm_jax.generate: error: ")
    assert sorted(out.parent.rglob("*")) == before, "something was written"
    return line


HI = "--text=Hi."
# Flags, with --out and --checkpoint=random:tiny unless they give others, and a part of the error.
BAD_INPUT = {
    # Text and context.
    "no text": ([], "give either --text or --script"),
    "text and script": ([HI, "--script={files}/none.json"], "give either --text or --script"),
    "empty text": (["--text="], "the text is empty"),
    "blank text": (["--text= \t\n"], "the text is empty"),
    "text that is no Unicode": (["--text=a\udcff"], "invalid character at position"),
    "long text": (
        # Characters of four bytes, which are as many tokens here.
        ["--text=" + 300 * "\U00012000"],
        "the text takes 1205 positions of 1024, which leaves no room for its speech",
    ),
    "missing audio": ([HI, "--context_audio={files}/no.wav", "--context_text=a"], "does not exist"),
    "audio directory": (
        [HI, "--context_audio={files}/directory.wav", "--context_text=a"],
        "directory.wav does not exist",
    ),
    "unreadable audio": (
        [HI, "--context_audio={files}/text.wav", "--context_text=a"],
        "text.wav: not readable as audio",
    ),
    "empty audio": (
        [HI, "--context_audio={files}/empty.wav", "--context_text=a"],
        "empty.wav: not readable as audio (the file is empty)",
    ),
    "context without text": (
        [HI, "--context_audio={files}/voice.wav"],
        "1 --context_audio, 0 --context_text and 1 --context_speaker",
    ),
    "context without audio": ([HI, "--context_text=a"], "0 --context_audio, 1 --context_text"),
    "context of too many speakers": (
        [HI, "--context_audio={files}/voice.wav", "--context_text=a"] + 2 * ["--context_speaker=1"],
        "and 2 --context_speaker",
    ),
    "empty context text": (
        [HI, "--context_audio={files}/voice.wav", "--context_text="],
        "the text is empty",
    ),
    # Sampling.
    "temperature 0": ([HI, "--temperature=0"], "temperature is 0.0, but must be over 0"),
    "temperature under 0": ([HI, "--temperature=-1"], "temperature is -1.0"),
    "temperature nan": ([HI, "--temperature=nan"], "temperature is nan"),
    "depth temperature 0": ([HI, "--depth_temperature=0"], "depth_temperature is 0.0"),
    "top_k 0": ([HI, "--top_k=0"], "top_k is 0, but must be a whole number of at least 1"),
    "top_k under 0": ([HI, "--top_k=-3"], "top_k is -3"),
    "depth_top_k 0": ([HI, "--depth_top_k=0"], "depth_top_k is 0"),
    "top_p 0": ([HI, "--top_p=0"], "top_p is 0.0, but must be over 0 and at most 1"),
    "top_p over 1": ([HI, "--top_p=1.5"], "top_p is 1.5"),
    "min_p 1": ([HI, "--min_p=1"], "min_p is 1.0, but must be at least 0 (off) and under 1"),
    "penalty 0": ([HI, "--repetition_penalty=0"], "repetition_penalty is 0.0"),
    "negative seed": ([HI, "--seed=-1"], "seed"),
    # Length.
    "under a frame": ([HI, "--max_audio_length_ms=79"], "is 79, but one frame takes 80"),
    "no length": ([HI, "--max_audio_length_ms=nan"], "max_audio_length_ms is nan"),
    "endless": ([HI, "--max_audio_length_ms=inf"], "max_audio_length_ms is inf"),
    "unknown guard": ([HI, "--guard=perhaps"], "guard is perhaps, but must be on or off"),
    # Checkpoints.
    "unknown name": ([HI, "--checkpoint=csm"], "neither a directory nor a hub name"),
    "unknown random": (
        [HI, "--checkpoint=random:huge"],
        "nor one of demo, random:tiny, random:csm_1b, random:miso_8b",
    ),
    "unknown directory": ([HI, "--checkpoint=./some/where"], "neither a directory nor a hub name"),
    "unknown repository": (
        [HI, "--checkpoint=nobody/nothing"],
        "config.json of nobody/nothing could not be downloaded",
    ),
    "no checkpoint": ([HI, "--checkpoint={bad}/nothing"], "nothing holds no CSM checkpoint"),
    "missing tensor": ([HI, "--checkpoint={bad}/missing"], "missing tensor lm_head.weight"),
    "extra tensor": ([HI, "--checkpoint={bad}/extra"], "unexpected tensor lm_head.x"),
    "mis-shaped tensor": (
        [HI, "--checkpoint={bad}/misshapen"],
        "lm_head.weight is [35, 47] but the config wants [35, 48]",
    ),
    "truncated file": ([HI, "--checkpoint={bad}/cut"], "is damaged or was not downloaded whole"),
    "no tokenizer": ([HI, "--checkpoint={bad}/no_tokenizer"], "no tokenizer.json"),
    "unknown quantization": ([HI, "--quantize=int4"], "quantize is int4, but must be none or int8"),
    "unknown kernels": ([HI, "--kernels=cuda"], "kernels is cuda, but must be xla or pallas"),
    "unknown dtype": ([HI, "--dtype=int4"], "dtype is int4, but must be auto, float32"),
    # Outputs.
    "no out": ([HI, "--out="], "unknown audio format ''"),
    "missing parent": ([HI, "--out={out}/no/a.wav"], "cannot be written in directory"),
    "out is a directory": ([HI, "--out={files}/directory.wav"], "is a directory"),
    "unknown format": ([HI, "--out={out}/a.txt"], "unknown audio format '.txt'; use one of .wav"),
    "format of a pipe": ([HI, "--out=-", "--format=mp3"], "--out=- takes wav or pcm"),
    "format of a file": ([HI, "--format=wav"], "--format is for --out=- and --manifest"),
    "processes": ([HI, "--num_processes=2"], "--num_processes is for --manifest, which is missing"),
    "codes format": ([HI, "--codes_out={out}/a.txt"], "codes are written as .npy"),
    "codes parent": (
        [HI, "--codes_out={out}/no/a.npy"],
        "cannot be written (No such file or directory)",
    ),
    "codes directory": ([HI, "--codes_out={files}/codes.npy"], "codes.npy is a directory"),
    # Scripts.
    "script missing": (["--script={files}/no.json"], "no.json cannot be read: No such file"),
    "script directory": (["--script={files}"], "cannot be read: Is a directory"),
    "script not JSON": (["--script={files}/broken.json"], "broken.json is not JSON"),
    "script not UTF-8": (["--script={files}/latin.json"], "latin.json cannot be read as UTF-8"),
    "script no list": (["--script={files}/object.json"], "is not a JSON list of turns"),
    "script empty": (["--script={files}/none.json"], "is not a JSON list of turns"),
    "turn no object": (["--script={files}/word.json"], "turn 1: expected an object"),
    "turn of a wrong field": (
        ["--script={files}/wrong_field.json"],
        "turn 2: unknown field txet; known are speaker, text, audio",
    ),
    "turn without text": (["--script={files}/no_text.json"], "turn 1: field text is missing"),
    "turn without speaker": (["--script={files}/no_speaker.json"], "field speaker is missing"),
    "speaker is a word": (["--script={files}/speaker_word.json"], "speaker is 'Ann', expected int"),
    "speaker is true": (["--script={files}/speaker_bool.json"], "speaker is True, expected int"),
    "text is a number": (["--script={files}/text_number.json"], "text is 5, expected str"),
    "text is blank": (["--script={files}/text_empty.json"], "the text is empty"),
    "turn's audio missing": (["--script={files}/audio_missing.json"], "gone.wav does not exist"),
    "nothing to speak": (["--script={files}/only_audio.json"], "nothing to speak"),
    # Flags.
    "typo": ([HI, "--temprature=1"], "Did you mean: temperature"),
    "positional": ([HI, "hello"], "unexpected argument hello"),
    "no number": ([HI, "--top_k=many"], "--top_k=many"),
    "no whole number": ([HI, "--speaker=1.5"], "--speaker=1.5"),
    "no value": (["--text"], "Missing value for flag --text"),
}


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input_ends_with_one_line_and_code_2(name, files, checkpoints, tmp_path, capsys):
    flags, message = BAD_INPUT[name]
    where = {"files": files, "bad": checkpoints, "out": tmp_path}
    given = [flag.format(**where) for flag in flags]
    defaults = [f"--out={tmp_path / 'out.wav'}", "--checkpoint=random:tiny"]
    # Later flags win.
    assert message in failed(capsys, defaults + given, tmp_path / "out.wav")


def test_out_is_required(tmp_path, capsys):
    assert "--out is missing" in failed(capsys, [HI, *SHORT], tmp_path / "out.wav")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_directory_is_an_error(tmp_path, capsys):
    directory = tmp_path / "locked"
    directory.mkdir(mode=0o500)
    out = directory / "out.wav"
    assert "cannot be written" in failed(capsys, [HI, *SHORT, f"--out={out}"], out)


def test_a_failure_keeps_an_existing_output(files, tmp_path, capsys):
    out = tmp_path / "out.wav"
    out.write_text("precious")
    flags = [HI, *SHORT, f"--out={out}", f"--context_audio={files}/text.wav", "--context_text=a"]
    failed(capsys, flags, out)
    assert out.read_text() == "precious"


def test_help_lists_the_flags(capsys):
    assert run(["--help"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    shown = ["--text", "--checkpoint", "--context_audio", "--depth_top_k", "--codes_out"]
    for flag in [*shown, "--guard", "--quantize", "--stream", "--format", "--manifest"]:
        assert f"  {flag}: " in captured.out


# --- Output files -------------------------------------------------------------------------------


def spoken(tmp_path, name: str, *flags: str) -> tuple[np.ndarray, np.ndarray]:
    """The samples and codes that a command writes."""
    out, codes = tmp_path / f"{name}.wav", tmp_path / f"{name}.npy"
    assert run([*SHORT, *flags, f"--out={out}", f"--codes_out={codes}"]) == 0
    audio, rate = soundfile.read(out, dtype="float32")
    assert rate == RATE
    return audio, np.load(codes)


@pytest.fixture(scope="module")
def model():
    return csm_jax.load("random:tiny")


def test_the_command_line_gives_the_codes_of_the_library(model, files, tmp_path, capsys):
    flags = ["--text=Well then.", "--speaker=7", "--seed=3", "--temperature=0.8", "--top_k=9"]
    flags += ["--top_p=0.9", "--min_p=0.01", "--repetition_penalty=1.1"]
    flags += ["--depth_temperature=0.7", "--depth_top_k=5"]
    for speaker, text in ((4, "Once."), (9, "Twice.")):
        flags += [f"--context_audio={files}/voice.wav", f"--context_text={text}"]
        flags += [f"--context_speaker={speaker}"]
    audio, codes = spoken(tmp_path, "a", *flags)
    assert capsys.readouterr().err.splitlines() == [NOISE, CUT]
    recording = csm_jax.io.audio.load_audio(files / "voice.wav", RATE)
    context = [csm_jax.Segment(4, "Once.", recording), csm_jax.Segment(9, "Twice.", recording)]
    sampling = csm_jax.Sampling(0.8, 9, 0.9, 0.01, 1.1, depth_temperature=0.7, depth_top_k=5)
    wanted = model.generate_codes("Well then.", 7, context, sampling, 400, seed=3)
    assert (codes.dtype, codes.shape) == (np.int32, (NUM_FRAMES, CONFIG.num_codebooks))
    np.testing.assert_array_equal(codes, wanted)
    clipped = np.clip(model.decode(wanted), -1, 1)
    np.testing.assert_allclose(audio, clipped, atol=1 / 32_767)


@pytest.mark.parametrize("text", [[], ["--context_text="]])
def test_a_context_can_be_without_text(model, files, tmp_path, text):
    flags = [HI, f"--context_audio={files}/voice.wav", *text, "--context_without_text"]
    _, codes = spoken(tmp_path, "a", *flags)
    recording = csm_jax.io.audio.load_audio(files / "voice.wav", RATE)
    context = [csm_jax.Segment(0, None, recording)]
    wanted = model.generate_codes(HI.removeprefix("--text="), 0, context, max_audio_length_ms=400)
    np.testing.assert_array_equal(codes, wanted)


def test_the_same_seed_gives_the_same_file_and_another_seed_other_codes(tmp_path):
    same = [spoken(tmp_path, name, HI, "--seed=1") for name in "ab"]
    np.testing.assert_array_equal(same[0][1], same[1][1])
    assert (tmp_path / "a.wav").read_bytes() == (tmp_path / "b.wav").read_bytes()
    _, other = spoken(tmp_path, "c", HI, "--seed=2")
    assert (other != same[0][1]).any()


def test_greedy_codes_do_not_depend_on_the_seed(tmp_path):
    _, one = spoken(tmp_path, "a", HI, "--greedy", "--seed=1")
    _, two = spoken(tmp_path, "b", HI, "--greedy", "--seed=2")
    np.testing.assert_array_equal(one, two)


def test_without_a_length_the_guard_limits_speech_by_its_text(model, tmp_path, capsys):
    flags = [HI, "--checkpoint=random:tiny"]
    lengths = {}
    for guard in ("on", "off"):
        codes = tmp_path / f"{guard}.npy"
        out = f"--out={tmp_path / guard}.wav"
        assert run([*flags, f"--guard={guard}", out, f"--codes_out={codes}"]) == 0
        notices = []
        wanted = model.generate_codes("Hi.", guard=guard, notify=notices.append)
        np.testing.assert_array_equal(np.load(codes), wanted)
        lines = capsys.readouterr().err.splitlines()
        assert lines == [NOISE, *(notice.message for notice in notices)]
        assert len(notices) == 1
        lengths[guard] = len(wanted)
    assert lengths == {"on": int(needed_seconds("Hi.") / 0.08), "off": 125}


def test_turns_beyond_the_window_are_dropped_with_a_notice(files, tmp_path, capsys):
    turn = [f"--context_audio={files}/long.wav", "--context_text=a"]
    spoken(tmp_path, "a", HI, *(8 * turn))
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == NOISE
    assert lines[1].startswith("2 to 5 of 8 turns of context were left out")
    assert lines[2:] == [CUT]


def test_quantize_int8_gives_the_codes_of_the_int8_model(tmp_path):
    _, codes = spoken(tmp_path, "a", HI, "--quantize=int8", "--greedy")
    int8 = csm_jax.load("random:tiny", quantize="int8")
    wanted = int8.generate_codes("Hi.", sampling=GREEDY, max_audio_length_ms=400)
    np.testing.assert_array_equal(codes, wanted)
    _, full = spoken(tmp_path, "b", HI, "--greedy")
    assert (codes != full).any()


def test_each_turn_of_a_script_has_the_earlier_turns_as_context(model, files, tmp_path):
    """A recorded turn is context only; the seed counts the spoken turns."""
    shutil.copy(files / "voice.wav", tmp_path)
    turns = [
        {"speaker": 0, "text": "Who is there?", "audio": "voice.wav"},
        {"speaker": 1, "text": "Me."},
        {"speaker": 0, "text": "Oh."},
    ]
    (tmp_path / "script.json").write_text(json.dumps(turns))
    flags = [f"--script={tmp_path / 'script.json'}", "--seed=5"]
    audio, codes = spoken(tmp_path, "a", *flags)
    recording = csm_jax.io.audio.load_audio(tmp_path / "voice.wav", RATE)
    context = [csm_jax.Segment(0, "Who is there?", recording)]
    first = model.generate_codes("Me.", 1, context, max_audio_length_ms=400, seed=5)
    context.append(csm_jax.Segment(1, "Me.", codes=first))
    second = model.generate_codes("Oh.", 0, context, max_audio_length_ms=400, seed=6)
    np.testing.assert_array_equal(codes, np.concatenate([first, second]))
    assert len(audio) == len(codes) * CONFIG.codec.frame_size


@pytest.mark.parametrize("suffix", [".flac", ".opus", ".pcm"])
def test_the_suffix_chooses_the_format(tmp_path, suffix):
    out = tmp_path / f"out{suffix}"
    assert run([HI, *SHORT, f"--out={out}"]) == 0
    samples = csm_jax.io.audio.load_audio(out, RATE)
    assert len(samples) == NUM_FRAMES * CONFIG.codec.frame_size
    assert [path.name for path in tmp_path.iterdir()] == [out.name]


def test_speech_without_frames_is_an_empty_file_and_a_notice(tmp_path, capsys):
    """Heads of zeros make all codes equally likely: greedy takes code 0, the end of speech."""
    zeros = {
        path: array * 0 if path.endswith(("codebook0_head/weight", "depth_heads/weight")) else array
        for path, array in params().items()
    }
    native_format.save(tmp_path / "mute", CONFIG, zeros.items(), fixtures.TOKENIZER)
    flags = ["--greedy", f"--checkpoint={tmp_path / 'mute'}", "--watermark=off"]
    audio, codes = spoken(tmp_path, "a", HI, *flags)
    assert audio.shape == (0,)
    assert codes.shape == (0, CONFIG.num_codebooks)
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "the model generated no speech for 'Hi.': try another seed"


# --- Real processes -----------------------------------------------------------------------------

COMMAND = [sys.executable, "-m", "csm_jax.generate"]


@pytest.fixture(scope="module")
def first_run(tmp_path_factory, native):
    """A run with an empty cache and without a terminal: directory, command, environment, result."""
    directory = tmp_path_factory.mktemp("first")
    flags = [HI, f"--checkpoint={native}", "--max_audio_length_ms=400", "--watermark=off"]
    environment = os.environ | {"CSM_JAX_CACHE": str(directory / "cache")}
    command = [*COMMAND, *flags, f"--out={directory / 'out.wav'}"]
    return (
        directory,
        command,
        environment,
        subprocess.run(command, env=environment, capture_output=True, text=True),
    )


def test_without_a_terminal_only_notices_are_printed(first_run):
    directory, _, _, done = first_run
    assert (done.returncode, done.stdout, done.stderr) == (0, "", CUT + "\n")
    assert soundfile.info(directory / "out.wav").frames == NUM_FRAMES * CONFIG.codec.frame_size


def test_a_second_process_compiles_nothing(first_run):
    directory, command, environment, _ = first_run
    compiled = programs(directory)
    assert len(compiled) >= 3, "prefill, frame loop and codec at least"
    environment = environment | {"JAX_LOG_COMPILES": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stderr.count("compilation cache hit for") >= 3
    assert "CACHE MISS" not in done.stderr
    assert programs(directory) == compiled


def programs(directory) -> set[str]:
    return {path.name for path in (directory / "cache" / "xla").glob("*-cache")}


def test_a_terminal_gets_progress_and_speed(first_run):
    _, command, environment, _ = first_run
    terminal, stderr = pty.openpty()
    termios.tcsetwinsize(stderr, (24, 150))
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=stderr)
    os.close(stderr)
    shown = b""
    try:
        while block := os.read(terminal, 4096):
            shown += block
    except OSError:  # on Linux, the other end is closed
        pass
    os.close(terminal)
    assert process.communicate()[0] == b""
    assert process.returncode == 0
    text = shown.decode()
    assert "5frame" in text
    assert "0.4 s of audio, real-time factor" in text
    last = text.strip().splitlines()[-1]
    assert "out.wav: 5 frames, 0.4 s of audio, real-time factor" in last
    assert "x real time)" in last


def test_a_failed_process_prints_one_line_and_writes_nothing(tmp_path):
    command = [*COMMAND, HI, "--checkpoint=random:tiny", f"--out={tmp_path / 'out.wav'}"]
    done = subprocess.run([*command, "--top_k=0"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("csm_jax.generate: error: top_k is 0")
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
