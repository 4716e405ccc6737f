"""Measures how fast a model generates speech on this machine, and the memory that it needs.

    python -m csm_jax.benchmark --checkpoint=random:csm_1b --batch=1,8 --quantize=none,int8

Each configuration is a block of lines, or a JSON line with --json. Figures are medians where a
measurement can be repeated. "Real-time factor" is seconds of work per second of audio, "speed" its
inverse.
"""

import dataclasses
import itertools
import json
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from csm_jax.checkpoints.alignment_heads import AlignmentHeads
from csm_jax.cli import flags as cli
from csm_jax.cli import model_flags
from csm_jax.errors import InputError
from csm_jax.inference.decode_batch import DecodeBatch, Utterance
from csm_jax.inference.decode_loop import new_batch
from csm_jax.inference.decode_step import CHUNK_FRAMES
from csm_jax.inference.generator import Generator, load
from csm_jax.inference.request import Request
from csm_jax.inference.row_decoder import RowDecoder
from csm_jax.model.kernels.choice import XLA
from csm_jax.model.layers import linear_float32
from csm_jax.model.sampling import Sampling
from csm_jax.prompt.turns import Prompt, Segment

PROGRAM = "csm_jax.benchmark"
TEXT = "The quick brown fox jumps over the lazy dog, and runs away."
BANDWIDTH_BYTES = 2**29
COLUMNS = {
    "batch": "batch",
    "dtype": "weights",
    "quantize": "int8",
    "seconds_per_frame": "s/frame",
    "real_time_factor": "RTF",
    "speed_x_real_time": "x real time",
    "time_to_first_audio_ms": "first audio ms",
    "prefill_ms": "prefill ms",
    "compile_s": "compile s",
    "compile_cached_s": "cached s",
    "bandwidth_share": "of bandwidth",
    "peak_rss_bytes": "peak RSS",
    "peak_device_bytes": "peak device",
}


def define_flags(values: flags.FlagValues) -> None:
    define = cli.definer(values)
    whole, batches = flags.DEFINE_integer, "requests at once; several numbers with commas between"
    model_flags.define_checkpoint(values, "random:csm_1b")
    define(flags.DEFINE_list, "batch", ["1"], batches)
    define(whole, "frames", 16, "frames per measurement")
    define(whole, "repeats", 5, "measurements, of which the median is taken")
    model_flags.define_precisions(values)
    model_flags.define_kernels(values)
    define(whole, "prompt_tokens", 16, "positions of the prompt")
    define(flags.DEFINE_float, "context_s", 0.0, "seconds of context before the first audio")
    define(
        flags.DEFINE_float, "audio_s", 10.0, "seconds of audio for the codec to encode and decode"
    )
    define(flags.DEFINE_boolean, "align", False, "measure what an alignment head costs too")
    define(flags.DEFINE_boolean, "json", False, "JSON lines instead of a table")


def main(values: flags.FlagValues) -> None:
    if min(values.frames, values.repeats, values.prompt_tokens) < 1:
        raise InputError("--frames, --repeats and --prompt_tokens must be at least 1")
    batches = [_whole("batch", text) for text in values.batch]
    with tempfile.TemporaryDirectory() as cache:
        # An empty cache: the first compilation is a cold one, the second finds it.
        jax.config.update("jax_compilation_cache_dir", cache)
        for dtype, quantize in itertools.product(values.dtype, values.quantize):
            model = load(values.checkpoint, dtype, quantize, kernels=values.kernels)
            shared = _measure_model(model, values)
            for batch in batches:
                figures = _describe(model, values.checkpoint, quantize, batch)
                figures |= _measure_frames(model, batch, values) | shared
                if values.align:
                    figures["alignment_ratio"] = _alignment_ratio(model, batch, values)
                _print(figures, as_json=values.json)


def frame_loop_timer(
    checkpoint: str,
    dtype: str,
    quantize: str,
    batch: int,
    prompt_tokens: int,
    kernels: str = XLA,
) -> Callable[[int], float]:
    """A function that generates a number of frames and returns the seconds that they took."""
    model = load(checkpoint, dtype, quantize, kernels=kernels)
    timer, _ = _frame_loop(model, batch, prompt_tokens)
    return timer


def _frame_loop(
    model: Generator, batch: int, prompt_tokens: int
) -> tuple[Callable[[int], float], DecodeBatch]:
    limit = model.config.backbone.max_seq_len
    rows = new_batch(model, batch, min(256, limit))
    utterance = _utterance(model, prompt_tokens, rows.max_seq_len)

    def run(num_frames: int) -> float:
        # From the beginning every time, or the cache would run full. Random weights hardly ever
        # draw the end of speech: it is as likely as any other frame.
        for index in range(batch):
            rows.join(index, utterance._replace(seed=index))
        rows.run(1)
        seconds, left = 0.0, num_frames
        while left:
            started = time.perf_counter()
            frames = rows.run(min(left, CHUNK_FRAMES))
            seconds += time.perf_counter() - started
            left -= frames.codes.shape[1]
            if frames.done.all():
                raise InputError("all rows ended before the measurement did: use random weights")
        return seconds

    return run, rows


def _utterance(model: Generator, prompt_tokens: int, max_seq_len: int) -> Utterance:
    config = model.config
    frames = np.zeros((prompt_tokens, config.num_codebooks + 1), np.int32)
    frames[:, -1] = np.arange(prompt_tokens) % config.text_vocab_size
    mask = np.zeros(frames.shape, bool)
    mask[:, -1] = True
    max_frames = max_seq_len - prompt_tokens - 1
    return Utterance(Prompt(frames, mask), Sampling(), 0, max_frames, num_text=prompt_tokens)


def _with_alignment(model: Generator) -> Generator:
    """The model with an alignment head, whichever: what it costs does not depend on it."""
    last = model.config.backbone.num_layers - 1
    return dataclasses.replace(model, alignment=AlignmentHeads(((last, 0),), (0.0,), (1.0,)))


def _measure_frames(model: Generator, batch: int, values: flags.FlagValues) -> dict[str, Any]:
    """Figures of the compiled frame loop."""
    compile_s = [_compile_seconds(model, batch, values), _compile_seconds(model, batch, values)]
    timer, rows = _frame_loop(model, batch, values.prompt_tokens)
    timer(1)
    frames = min(values.frames, rows.max_seq_len - values.prompt_tokens - 2)
    per_frame = statistics.median(timer(frames) for _ in range(values.repeats)) / frames
    audio_s = model.config.frame_ms / 1000
    read = _bytes_per_frame(model) / per_frame
    return {
        "seconds_per_frame": per_frame,
        "real_time_factor": per_frame / audio_s / batch,
        "speed_x_real_time": batch * audio_s / per_frame,
        "compile_s": compile_s[0],
        "compile_cached_s": compile_s[1],
        "weights_gb_per_s": read / 1e9,
        "bandwidth_share": read / 1e9 / _bandwidth_gb_per_s(),
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "peak_device_bytes": (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use"),
    }


def _alignment_ratio(model: Generator, batch: int, values: flags.FlagValues) -> float:
    """The time of a frame with an alignment head by that without, measured in turns."""
    timers = [
        _frame_loop(each, batch, values.prompt_tokens)[0]
        for each in (model, _with_alignment(model))
    ]
    for timer in timers:
        timer(1)  # compiles
    pairs = [[timer(values.frames) for timer in timers] for _ in range(values.repeats)]
    return statistics.median(aligned / plain for plain, aligned in pairs)


def _compile_seconds(model: Generator, batch: int, values: flags.FlagValues) -> float:
    """The first call's time less the second's, with nothing compiled in this process before."""
    jax.clear_caches()
    timer, _ = _frame_loop(model, batch, values.prompt_tokens)
    return _seconds(lambda: timer(1)) - _seconds(lambda: timer(1))


def _measure_model(model: Generator, values: flags.FlagValues) -> dict[str, Any]:
    """Figures of a single request, and of the codec."""
    audio = _noise(model, values.audio_s)
    codes = model.encode(audio)
    context = [Segment(1, TEXT, _noise(model, values.context_s))] if values.context_s else []
    request = Request(TEXT, context=context, guard="off", max_audio_length_ms=10_000)
    frame, state = codes[None, :1], model.codec.decode_stream_state()

    def decode_frame() -> None:
        nonlocal state
        decoded, state = model.codec.decode_frames(frame, state)
        np.asarray(decoded)

    def prefill() -> None:
        _joined(model, values.prompt_tokens).wait()

    repeats = values.repeats
    return {
        "time_to_first_audio_ms": 1000 * _median(lambda: next(model.stream(request)), repeats),
        "context_s": values.context_s,
        "prefill_ms": 1000 * _median(prefill, repeats),
        "audio_s": values.audio_s,
        "mimi_encode_s": _median(lambda: model.codec.encode(audio), repeats),
        "mimi_decode_s": _median(lambda: model.codec.decode(codes), repeats),
        "mimi_stream_frame_ms": 1000 * _median(decode_frame, 10 * repeats),
        "mimi_eight_rows_ratio": _eight_rows_ratio(model, frame, 10 * repeats),
    }


def _eight_rows_ratio(model: Generator, frame: np.ndarray, repeats: int) -> float:
    """How many times longer a frame of eight streams takes than that of one, in turns."""

    def decoder(num_rows: int) -> Callable[[], Any]:
        rows = RowDecoder(model.codec, num_rows, together=num_rows)
        blocks = {row: frame[0] for row in range(num_rows)}
        return lambda: rows.decode(blocks)

    one, eight = decoder(1), decoder(8)
    one()
    eight()
    seconds = [(_seconds(eight), _seconds(one)) for _ in range(repeats)]
    return statistics.median(each[0] for each in seconds) / statistics.median(
        each[1] for each in seconds
    )


def _joined(model: Generator, prompt_tokens: int) -> DecodeBatch:
    rows = DecodeBatch(model.config, model.params, 1, min(256, model.config.backbone.max_seq_len))
    rows.join(0, _utterance(model, prompt_tokens, rows.max_seq_len))
    return rows


def _median(run: Callable[[], Any], repeats: int) -> float:
    """Seconds that `run` takes once it is warm."""
    run()
    return statistics.median(_seconds(run) for _ in range(repeats))


def _seconds(run: Callable[[], Any]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def _noise(model: Generator, seconds: float) -> np.ndarray:
    random = np.random.default_rng(0)
    return 0.1 * random.standard_normal(int(seconds * model.sample_rate), np.float32)


def _bytes_per_frame(model: Generator) -> int:
    """Bytes of weights read per frame: the backbone once, the depth decoder per codebook."""
    params, passes = model.params, model.config.num_codebooks - 1
    once = [params["backbone"], params["codebook0_head"], params["depth_heads"]]
    every_pass = [params["projection"], params["depth_decoder"]]

    def size(trees: list[Any]) -> int:
        return sum(leaf.nbytes for leaf in jax.tree.leaves(trees))

    return size(once) + passes * size(every_pass)


def _bandwidth_gb_per_s() -> float:
    """The memory bandwidth of a matrix-vector product, which does little but read."""
    rows = BANDWIDTH_BYTES // 4 // 8192
    weight, vector = jnp.ones((rows, 8192), jnp.float32), jnp.ones((1, 8192), jnp.float32)
    product = jax.jit(linear_float32)
    seconds = _median(lambda: product(vector, weight).block_until_ready(), 5)
    return BANDWIDTH_BYTES / seconds / 1e9


def _describe(model: Generator, checkpoint: str, quantize: str, batch: int) -> dict[str, Any]:
    device = jax.devices()[0]
    return {
        "checkpoint": checkpoint,
        "device": device.device_kind,
        "devices": jax.device_count(),
        "jax": jax.__version__,
        "dtype": str(model.precision.weights),
        "quantize": quantize,
        "kernels": model.kernels,
        "batch": batch,
    }


def _print(figures: dict[str, Any], as_json: bool) -> None:
    rounded = {k: round(v, 5) if isinstance(v, float) else v for k, v in figures.items()}
    cli.show(json.dumps(rounded) if as_json else _table(rounded))


def _table(figures: dict[str, Any]) -> str:
    lines = [f"{figures['checkpoint']} on {figures['device']}, jax {figures['jax']}"]
    for name, value in figures.items():
        if name in COLUMNS and value is not None:
            lines.append(f"  {COLUMNS[name]:16} {_readable(name, value)}")
    lines.append(
        f"  Mimi, {figures['audio_s']:g} s   encode {figures['mimi_encode_s']:.3f} s, decode "
        f"{figures['mimi_decode_s']:.3f} s; one streamed frame "
        f"{figures['mimi_stream_frame_ms']:.1f} ms, one of eight streams "
        f"{figures['mimi_eight_rows_ratio']:.1f} times as long"
    )
    return "\n".join(lines)


def _readable(name: str, value: Any) -> str:
    if name.endswith("_bytes"):
        return f"{value / 1e9:.2f} GB"
    if name.endswith("_share"):
        return f"{value:.0%}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _whole(name: str, text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise InputError(f"--{name} is {text}, but must be a whole number of at least 1")
    return int(text)


def run(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    return cli.run(PROGRAM, __doc__, define_flags, main, argv)


if __name__ == "__main__":
    sys.exit(run())
