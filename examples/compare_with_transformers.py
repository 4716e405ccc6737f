"""Measures the speed of csm_jax and of the public torch implementations on this machine.

    python examples/compare_with_transformers.py [--rows=batch1,batch1_int8,mimi] [--json]

The program needs torch and transformers, and moshi for the codec; a library that fails is named
instead of its measurements. Weights are random and nothing is downloaded. The measured frames
follow a prompt of 16 tokens and the first frame, sampled with the defaults (temperature 0.9,
top-k 50), with everything compiled. The peer's caches are as long as its frames need; csm_jax's
have 256 positions.

Each configuration has its own process, and a group of them is measured in turns, so that all see
the same state of the machine. Do not use the machine meanwhile: torch's threads wait for each
other, and one busy core can slow them down tenfold. The results are medians, "spread" is slowest
over fastest, and "peer / ours" is above 1 where csm_jax is faster. At full size all rows take 20
GB and about half an hour on two cores.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import csm_jax
from csm_jax.benchmark import frame_loop_timer
from csm_jax.checkpoints.random_weights import random_params
from csm_jax.config import MimiConfig
from csm_jax.convert.configs import csm_to_huggingface

CHECKPOINTS = {"random:csm_1b": csm_jax.csm_1b(), "random:tiny": csm_jax.tiny()}
PROMPT_TOKENS, TEMPERATURE, TOP_K = 16, 0.9, 50
MAX_FRAMES = 200  # the frame loop of csm_jax.benchmark has 256 positions
AUDIO_S, FRAME_S, STREAM_FRAMES = 10.0, 0.08, 25
WARM_UPS = {"cpu": 1, "cuda": 2}  # CUDA graphs are recorded after the first compiled run
# Idle threads of a pool may spin for 0.2 s before they sleep (Intel's KMP_BLOCKTIME).
PAUSE_S = 0.3
ENVIRONMENT = {
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # two frameworks share a card
    "TRANSFORMERS_VERBOSITY": "error",
    "PYTHONWARNINGS": "ignore",
}

Run = Callable[[], float]


def _speaking(dtype: str, *modes: str) -> list[str]:
    return [*(f"transformers {dtype} {mode}" for mode in modes), f"csm-jax {dtype} frames"]


# Configurations that are measured in turns, ours last: "library dtype mode". A group must fit
# the memory: two models of 6.6 GB at float32, three of half that at bfloat16.
FLOAT_GROUPS = {
    "cpu": [_speaking("float32", "eager"), _speaking("bfloat16", "eager", "static")],
    "cuda": [
        _speaking("float32", "eager"),
        _speaking("bfloat16", "eager", "static", "static+compile", "static+graphs"),
        _speaking("float16", "static+graphs"),
    ],
}
INT8_GROUPS = [_speaking("int8", "quantize_dynamic")]
CODECS = ("transformers float32", "moshi float32", "csm-jax float32")
CODEC_MODES = ("encode", "decode", "stream")
MIMI_GROUPS = [[f"{codec} {mode}" for codec in CODECS] for mode in CODEC_MODES[:2]]
STREAM_GROUPS = [[f"{codec} stream" for codec in CODECS[1:]]]


class Row(NamedTuple):
    """Groups of configurations to compare, and the unit of their times."""

    name: str
    groups: list[list[str]]
    unit: str
    audio_s: float  # audio of a unit, all rows of a batch together
    batch: int = 1


def row_of(name: str, device: str) -> Row:
    if name == "mimi":
        return Row(name, MIMI_GROUPS, f"{AUDIO_S:g} s of audio", AUDIO_S)
    if name == "mimi_stream":
        return Row(name, STREAM_GROUPS, "a frame", FRAME_S)
    parts = re.fullmatch(r"batch([1-9]\d*)(_int8)?", name)
    if parts is None:
        sys.exit(f"row {name} is none of batchN, batchN_int8, mimi and mimi_stream")
    groups, batch = INT8_GROUPS if parts[2] else FLOAT_GROUPS[device], int(parts[1])
    return Row(name, groups, "a frame", batch * FRAME_S, batch)


class Task(NamedTuple):
    """The measurement of a worker; `device` is torch's."""

    library: str
    dtype: str
    mode: str
    batch: int
    checkpoint: str
    device: str
    frames: int


def our_frames(task: Task) -> Run:
    dtype, quantize = ("auto", "int8") if task.dtype == "int8" else (task.dtype, "none")
    timer = frame_loop_timer(task.checkpoint, dtype, quantize, task.batch, PROMPT_TOKENS)
    return lambda: timer(task.frames) / task.frames


def our_codec(task: Task) -> Run:
    config = CHECKPOINTS[task.checkpoint]
    sizes = {"codec": config.codec, "audio_vocab_size": config.audio_vocab_size}
    # The codec's parameters do not depend on the sizes of the model around it.
    small = dataclasses.replace(csm_jax.tiny(), **sizes)
    codec = csm_jax.Codec(config.codec, random_params(small)["codec"])
    audio, codes = noise_and_codes(config.codec)
    frame, state = jnp.asarray(codes[None, :1]), codec.decode_stream_state()

    def stream() -> None:
        nonlocal state
        decoded, state = codec.decode_frames(frame, state)
        np.asarray(decoded)

    runs = {"encode": lambda: codec.encode(audio), "decode": lambda: codec.decode(codes)}
    return codec_run(task, runs | {"stream": stream})


def transformers_frames(task: Task) -> Run:
    import torch

    if task.mode == "quantize_dynamic" and task.device != "cpu":
        raise RuntimeError("torch's quantize_dynamic is for the CPU only")
    model = transformers_model(task)
    num_codes = model.config.num_codebooks - 1
    model.generation_config = generation_config(task.mode, task.frames + 1)
    model.depth_decoder.generation_config = generation_config(task.mode, num_codes)
    prompt = torch.arange(PROMPT_TOKENS, device=task.device).repeat(task.batch, 1)

    def run() -> float:
        clock = FrameClock(num_codes + 1)
        model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), streamer=clock)
        # The end of speech is a frame of zeros, which random weights do not sample.
        if len(clock.times) != task.frames + 1:
            raise RuntimeError(f"{len(clock.times)} frames came, not {task.frames + 1}")
        return (clock.times[-1] - clock.times[0]) / task.frames

    return run


class FrameClock:
    """A streamer that records the time of each frame.

    So one generation gives the time from its first frame to its last, without the prompt. The
    difference of two generations would have the noise of both, and static caches of two lengths.
    Frames arrive on the host when a GPU has finished them; generation waits for each frame anyway,
    to check whether it is the last.
    """

    def __init__(self, num_codebooks: int):
        self.num_codebooks, self.times = num_codebooks, []

    def put(self, tokens: Any) -> None:
        if tokens.shape[-1] == self.num_codebooks:  # the first call has the prompt
            self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def transformers_model(task: Task) -> Any:
    import torch
    import transformers
    from transformers.initialization import no_init_weights

    # As `from_pretrained(dtype=...)` does it, which makes no float32 copy.
    torch.set_default_dtype(getattr(torch, "float32" if task.dtype == "int8" else task.dtype))
    config = transformers.CsmConfig.from_dict(csm_to_huggingface(CHECKPOINTS[task.checkpoint]))
    with torch.device(task.device), no_init_weights():
        model = transformers.CsmForConditionalGeneration(config).eval()
    model.tie_weights()
    model.codec_model = torch.nn.Identity()  # codes are generated without the codec
    randomize(model)
    if task.mode == "quantize_dynamic":
        linear = {torch.nn.Linear}
        torch.ao.quantization.quantize_dynamic(model, linear, dtype=torch.qint8, inplace=True)
    return model


def generation_config(mode: str, max_new_tokens: int) -> Any:
    """Sampling and caches, of the backbone or the depth decoder.

    With a static cache on a GPU, transformers compiles the step, by default with CUDA graphs (mode
    "reduce-overhead"): the fastest way in its documentation of CSM.
    """
    from transformers import CompileConfig, GenerationConfig

    settings = {"do_sample": True, "temperature": TEMPERATURE, "top_k": TOP_K}
    if mode.startswith("static"):
        settings |= {"cache_implementation": "static", "disable_compile": mode == "static"}
    if mode == "static+compile":
        settings |= {"compile_config": CompileConfig(mode="default")}
    return GenerationConfig(max_new_tokens=max_new_tokens, **settings)


def transformers_codec(task: Task) -> Run:
    import transformers

    values = csm_to_huggingface(CHECKPOINTS[task.checkpoint])["codec_config"]
    model = transformers.MimiModel(transformers.MimiConfig.from_dict(values)).eval()
    model = randomize(model.to(task.device))
    encode, decode = lambda x: model.encode(x).audio_codes, lambda x: model.decode(x).audio_values
    return torch_codec(task, encode, decode)


def moshi_codec(task: Task) -> Run:
    from moshi.models import loaders

    config = CHECKPOINTS[task.checkpoint].codec
    sizes = moshi_config(config, loaders._mimi_config)
    model = randomize(loaders.get_mimi(None, sizes, task.device, config.num_codebooks))
    if task.mode == "stream":
        model.streaming_forever(1)
    return torch_codec(task, model.encode, model.decode)


def moshi_config(config: MimiConfig, published: dict[str, Any]) -> dict[str, Any]:
    """moshi's own config with the sizes of `config`."""
    dim = config.embed_dim
    sizes = {
        "seanet": {"dimension": dim, "n_filters": config.num_filters}
        | {"ratios": config.ratios[::-1]},
        "quantizer": {"dimension": config.codebook_dim, "bins": config.codebook_size}
        | {"n_q": config.num_codebooks, "input_dimension": dim, "output_dimension": dim},
        "transformer": {"d_model": dim, "input_dimension": dim, "output_dimensions": [dim]}
        | {"num_heads": config.num_heads, "num_layers": config.num_layers}
        | {"context": config.attention_window, "dim_feedforward": config.mlp_dim},
    }
    return published | {name: published[name] | own for name, own in sizes.items()}


def torch_codec(task: Task, encode: Callable, decode: Callable) -> Run:
    import torch

    arrays = noise_and_codes(CHECKPOINTS[task.checkpoint].codec)
    audio, codes = torch.from_numpy(arrays[0])[None, None], torch.from_numpy(arrays[1]).T[None]
    frame = codes[..., :1].to(task.device)
    runs = {
        "encode": lambda: encode(audio.to(task.device)).cpu(),
        "decode": lambda: decode(codes.to(task.device)).cpu(),
        "stream": lambda: decode(frame).cpu(),
    }
    return codec_run(task, runs)


def randomize(model: Any) -> Any:
    """Sets random weights that keep activations in range: denormal numbers are slow."""
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.normal_(std=parameter[0].numel() ** -0.5)
        else:
            parameter.fill_(0.5)
    for name, buffer in model.named_buffers():
        if name.endswith(("embed_sum", "embedding_sum")):  # of codebooks
            buffer.normal_()
    return model


def noise_and_codes(codec: MimiConfig) -> tuple[np.ndarray, np.ndarray]:
    """Audio float32 [samples], and unrelated codes int64 [F, Q] of the same length."""
    random = np.random.default_rng(0)
    audio = 0.1 * random.standard_normal(int(AUDIO_S * codec.sample_rate), np.float32)
    shape = len(audio) // codec.frame_size, codec.num_codebooks
    return audio, random.integers(codec.codebook_size, size=shape)


def codec_run(task: Task, runs: dict[str, Callable[[], Any]]) -> Run:
    """A function that times one of `runs`, whose results are on the host when they return."""
    times = STREAM_FRAMES if task.mode == "stream" else 1

    def run() -> float:
        started = time.perf_counter()
        for _ in range(times):
            runs[task.mode]()
        return (time.perf_counter() - started) / times

    return run


# How each library generates frames, and how it encodes and decodes audio.
BUILDERS = {
    "csm-jax": (our_frames, our_codec),
    "transformers": (transformers_frames, transformers_codec),
    "moshi": (None, moshi_codec),
}


def work(task: Task) -> None:
    """Runs in a worker: builds the model, then measures once for every line of input."""
    # Libraries print too: their output must not mix with the results.
    responses = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    try:
        runs_on = prepare(task)
        run = BUILDERS[task.library][task.mode in CODEC_MODES](task)
        for _ in range(WARM_UPS[task.device]):
            run()
        print(json.dumps({"runs_on": runs_on}), file=responses)
        for _ in sys.stdin:
            print(json.dumps({"seconds": run()}), file=responses)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        print(json.dumps({"error": reason}), file=responses)


def prepare(task: Task) -> str:
    """Sets up the framework; returns its name, version and device."""
    if task.library == "csm-jax":
        return f"csm-jax: jax {jax.__version__} on {jax.devices()[0].device_kind}"
    import torch

    torch.set_num_threads(os.cpu_count())
    torch.set_grad_enabled(False)
    where = torch.cuda.get_device_name() if task.device == "cuda" else f"{os.cpu_count()} cores"
    return f"{task.library} {version(task.library)}: torch {torch.__version__} on {where}"


class Worker:
    """A configuration in its process, which sleeps except while `measure` runs."""

    def __init__(self, name: str, row: Row, arguments: argparse.Namespace):
        self.name, self.times = name, []
        values = vars(arguments) | {"worker": name, "rows": row.name}
        names = ("worker", "rows", "device", "checkpoint", "frames")
        self.process = subprocess.Popen(
            [sys.executable, __file__, *(f"--{flag}={values[flag]}" for flag in names)],
            env=os.environ | ENVIRONMENT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        response = self._read_response()  # when the model is built and warm
        self.error, self.runs_on = response.get("error"), response.get("runs_on")

    def measure(self) -> None:
        if self.error is None:
            time.sleep(PAUSE_S)
            with contextlib.suppress(BrokenPipeError):
                print("go", file=self.process.stdin, flush=True)
            response = self._read_response()
            self.error = response.get("error")
            self.times.append(response.get("seconds"))

    def median(self) -> float | None:
        return None if self.error else statistics.median(self.times)

    def _read_response(self) -> dict[str, Any]:
        gone = '{"error": "its process ended without a response"}'  # for example out of memory
        return json.loads(self.process.stdout.readline() or gone)


def measure_group(row: Row, names: list[str], arguments: argparse.Namespace) -> list[dict]:
    """Measures the configurations of a group in turns."""
    workers: list[Worker] = []
    with contextlib.ExitStack() as stack:
        for name in names:
            workers.append(Worker(name, row, arguments))
            stack.enter_context(workers[-1].process)  # a worker ends with its input
        for _ in range(arguments.repeats):
            for worker in workers:
                worker.measure()
    return [figures(row, worker, workers[-1].median()) for worker in workers]


def figures(row: Row, worker: Worker, ours: float | None) -> dict[str, Any]:
    known = {"row": row.name, "configuration": worker.name, "unit": row.unit, "batch": row.batch}
    median = worker.median()
    if median is None:
        return known | {"error": worker.error}
    is_peer = not worker.name.startswith("csm-jax")
    return known | {
        "seconds": median,
        "x_real_time": row.audio_s / median,
        "peer_over_ours": median / ours if ours and is_peer else None,
        "spread": max(worker.times) / min(worker.times),
        "repeats": worker.times,
        "runs_on": worker.runs_on,
    }


def compare(rows: list[Row], arguments: argparse.Namespace) -> None:
    machines = set()
    for row in rows:
        if not arguments.json:
            columns = f"{'seconds':>10}{'spread':>8}{'x real time':>13}{'peer / ours':>13}"
            print(f"{row.name + ', ' + row.unit:38}{columns}", flush=True)
        for *peers, ours in row.groups:
            peers = [peer for peer in peers if re.search(arguments.only, peer)]
            results = measure_group(row, [*peers, ours], arguments) if peers else []
            for result in results:
                print(json.dumps(result) if arguments.json else readable(result), flush=True)
            machines |= {result["runs_on"] for result in results if "runs_on" in result}
    if not arguments.json:
        print(*sorted(machines), sep="\n")


def readable(result: dict[str, Any]) -> str:
    name = f"  {result['configuration']:36}"
    if "error" in result:
        return f"{name}  could not run: {result['error']}"
    speed = f"{result['seconds']:10.4f}{result['spread']:8.2f}{result['x_real_time']:13.2f}"
    ratio = result["peer_over_ours"]
    return name + speed + ("" if ratio is None else f"{ratio:13.2f}")


def torch_device() -> str:
    """Asks another process, since the parent should use neither memory nor GPU."""
    program = "import torch; print('cuda' if torch.cuda.is_available() else 'cpu')"
    response = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    return response.stdout.strip() or "cpu"


def define_arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--checkpoint", default="random:csm_1b", choices=CHECKPOINTS)
    add("--rows", help="of batchN, batchN_int8, mimi, mimi_stream; default all")
    add("--batch", type=int, help="rows side by side, where --rows does not say; 8, on a GPU 32")
    add("--only", default="", help="only peers whose name contains this regular expression")
    add("--repeats", type=int, default=5, help="measurements, of which the median counts")
    add("--frames", type=int, default=8, help=f"frames per measurement, at most {MAX_FRAMES}")
    add("--device", default="auto", choices=["auto", "cpu", "cuda"], help="of torch; jax: its own")
    add("--json", action="store_true", help="JSON lines instead of a table")
    add("--worker", help=argparse.SUPPRESS)
    return parser


def main() -> None:
    parser = define_arguments()
    arguments = parser.parse_args()
    if not 1 <= arguments.frames <= MAX_FRAMES or arguments.repeats < 1:
        parser.error(f"--frames must be 1 to {MAX_FRAMES}, and --repeats at least 1")
    if arguments.device == "auto":
        arguments.device = torch_device()
    batch = arguments.batch or {"cpu": 8, "cuda": 32}[arguments.device]
    names = arguments.rows or f"batch1,batch1_int8,batch{batch},batch{batch}_int8,mimi,mimi_stream"
    rows = [row_of(name, arguments.device) for name in names.split(",")]
    if arguments.worker:
        sizes = arguments.checkpoint, arguments.device, arguments.frames
        work(Task(*arguments.worker.split(), rows[0].batch, *sizes))
    else:
        compare(rows, arguments)


if __name__ == "__main__":
    main()
