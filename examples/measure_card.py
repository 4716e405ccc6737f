"""Measures a GPU in one call: correctness first, then speed, the peers, and a profile.

    python examples/measure_card.py --out=card [--minutes=10] [--stages=scores,frames,...]

Each stage is a process of its own with a share of the time; one that fails or takes too long costs
the others nothing. `card/report.jsonl` has a line a stage: its figures, and where it failed the end
of its messages. The stages, in their order:

- scores: log-probabilities of speech of `demo` in each precision, against float32 on the CPU
- kernels: logits of the fused kernels (`--kernels=pallas`), against those of XLA's
- frames: `csm_jax.benchmark` at batch 1, 8, 32 and 128 in bfloat16 and int8, first audio, Mimi
- fused: the same with the fused kernels
- engine: 64 streams through an `Engine`
- training, peers: LoRA against transformers + PEFT, frames against transformers' compiled ones
- profile: the kernels of a frame by the time that they take, XLA's and the fused ones

`training` and `peers` need torch, transformers and peft.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

EXAMPLES = Path(__file__).parent
FULL_SIZE = "random:csm_1b"
TEXTS = [f"{one} {two} seven" for one in ("three", "eight") for two in ("nine", "four", "one")]
PRECISIONS = [("float32", "none"), ("bfloat16", "none"), ("auto", "int8")]
NUM_STREAMS, STREAM_MS = 64, 4_000
NUM_FRAMES, NUM_KERNELS = 8, 25
# More than a block of the fused kernels' attention.
NUM_POSITIONS = 150
# Two frameworks share the card; jax would take three quarters of its memory.
SHARED = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}


class Stage(NamedTuple):
    """A command, and the share of the time that it may take."""

    command: list[str]
    share: float


def stages(checkpoint: str, out: Path) -> dict[str, Stage]:
    """The stages by name, in their order."""
    own = [str(EXAMPLES / "measure_card.py"), f"--checkpoint={checkpoint}", f"--out={out}"]
    benchmark = ["-m", "csm_jax.benchmark", f"--checkpoint={checkpoint}", "--json"]
    sizes = ["--batch=1,8,32,128", "--dtype=bfloat16", "--quantize=none,int8", "--frames=32"]
    peers = str(EXAMPLES / "compare_with_transformers.py")
    rows = ["--rows=batch1,batch32", "--only=bfloat16 static", "--frames=16", "--json"]
    training = [str(EXAMPLES / "compare_training.py"), "--dtype=bfloat16", "--length=1024"]
    return {
        "scores": Stage([*own, "--stage=scores"], 0.09),
        "kernels": Stage([*own, "--stage=kernels"], 0.09),
        "frames": Stage([*benchmark, *sizes], 0.25),
        "fused": Stage([*benchmark, *sizes, "--kernels=pallas"], 0.2),
        "engine": Stage([*own, "--stage=engine"], 0.09),
        "training": Stage(training, 0.1),
        "peers": Stage([peers, *rows, f"--checkpoint={checkpoint}"], 0.13),
        "profile": Stage([*own, "--stage=profile"], 0.05),
    }


def run_stage(name: str, stage: Stage, seconds: float) -> dict[str, Any]:
    """Runs a stage for at most so many seconds; returns its line of the report."""
    started = time.monotonic()
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as messages:
        # Files keep what a process wrote before it was ended.
        try:
            done = subprocess.run(
                [sys.executable, *stage.command],
                env=os.environ | SHARED,
                stdout=output,
                stderr=messages,
                timeout=seconds,
                check=False,
            )
            code: int | None = done.returncode
        except subprocess.TimeoutExpired:
            code = None
        output.seek(0)
        messages.seek(0)
        report = {"stage": name, "exit_code": code, "seconds": time.monotonic() - started}
        report["output"] = [read_line(line) for line in output.read().splitlines() if line]
        return report if code == 0 else report | {"messages": messages.read()[-3000:]}


def read_line(line: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        return line


def measure_scores(_: str, out: Path) -> None:
    """Compares log-probabilities of `demo`'s speech on this device with those of a CPU in float32.

    The speech is greedy and generated on the CPU, so that all score the same codes.
    """
    import csm_jax

    reference = out / "scores.npz"
    if not reference.exists():
        environment = os.environ | {"JAX_PLATFORMS": "cpu"}
        command = [sys.executable, __file__, "--stage=reference", f"--out={out}"]
        subprocess.run(command, env=environment, check=True)
    expected = np.load(reference)
    for dtype, quantize in PRECISIONS:
        model = csm_jax.load("demo", dtype, quantize)
        differences = []
        for index, text in enumerate(TEXTS):
            score = model.score(text, expected[f"codes{index}"])
            differences.append(np.abs(score.log_probability - expected[f"scores{index}"]))
        each = np.concatenate([difference.ravel() for difference in differences])
        figures = {"mean": float(each.mean()), "max": float(each.max()), "codes": len(each)}
        show({"dtype": dtype, "quantize": quantize, "log_probability_difference": figures})


def write_reference(_: str, out: Path) -> None:
    """Codes of `demo` and their log-probabilities, in float32 on this device."""
    import csm_jax

    model = csm_jax.load("demo", "float32")
    arrays = {}
    for index, text in enumerate(TEXTS):
        codes = model.generate_codes(text, sampling=csm_jax.Sampling(greedy=True))
        arrays[f"codes{index}"] = codes
        arrays[f"scores{index}"] = model.score(text, codes).log_probability
    np.savez(out / "scores.npz", **arrays)


def measure_kernels(checkpoint: str, _: Path) -> None:
    """Compares the logits of the fused kernels with those of XLA's, in their spread."""
    import csm_jax
    from csm_jax.model.kernels.choice import KERNELS

    for quantize in ("none", "int8"):
        model = csm_jax.load(checkpoint, "bfloat16", quantize)
        for batch in (1, 2, 8, 32):
            shape = batch, model.config.num_codebooks
            codes = np.random.default_rng(0).integers(0, model.config.codec.codebook_size, shape)
            plain, fused = (
                logits_of(model.config, model.params, kernels, np.int32(codes), NUM_POSITIONS)
                for kernels in KERNELS
            )
            difference = np.abs(fused - plain) / np.std(plain)
            figures = {"mean": float(difference.mean()), "max": float(difference.max())}
            show({"quantize": quantize, "batch": batch, "logit_difference": figures})


def logits_of(
    config: Any, params: Any, kernels: str, codes: np.ndarray, num_positions: int
) -> np.ndarray:
    """Logits [Q, B, V] of given codes int32 [B, Q], after so many positions of the same codes."""
    import jax
    import jax.numpy as jnp

    from csm_jax.model.kernels.choice import bind_to_kernels
    from csm_jax.model.kv_cache import KVCache

    @jax.jit
    def run(params: Any) -> jax.Array:
        model, batch = bind_to_kernels(config, params, kernels), len(codes)
        frames = jnp.pad(codes, ((0, 0), (0, 1)))
        mask = jnp.ones(frames.shape, bool)

        def advance(cache: KVCache, _: None) -> tuple[KVCache, jax.Array]:
            hidden, cache, _ = model.advance(frames, mask, cache)
            return cache, hidden[:, 0]

        def predict(cache: KVCache, code: jax.Array) -> tuple[KVCache, jax.Array]:
            inputs = model.depth_input(code, cache.lengths[0])
            logits, cache = model.depth_step(inputs, cache)
            return cache, logits

        cache = KVCache.create(config.backbone, batch, num_positions, model.dtype, batch)
        hidden = jax.lax.scan(advance, cache, None, length=num_positions)[1][-1]
        first = model.embed_code(jnp.asarray(codes[:, 0]), 0)
        inputs = model.projection(jnp.stack([hidden, first], axis=1))
        second, cache = model.depth_step(inputs, model.depth_cache(batch))
        rest = jax.lax.scan(predict, cache, jnp.asarray(codes.T[1:-1]))[1]
        return jnp.concatenate([model.backbone_logits(hidden)[None], second[None], rest])

    return np.asarray(run(params))


def measure_engine(checkpoint: str, _: Path) -> None:
    """64 streams at once: the time to the first audio of each, and the speech of a second."""
    import csm_jax

    model = csm_jax.load(checkpoint)
    with csm_jax.Engine(model, NUM_STREAMS, max_queue=2 * NUM_STREAMS) as engine:
        speak_at_once(engine)  # compiles
        started = time.perf_counter()
        firsts, num_samples = speak_at_once(engine)
        seconds = time.perf_counter() - started
    p50, p95 = 1000 * np.percentile(firsts, (50, 95))
    speech = num_samples / model.sample_rate / seconds
    first = {"p50": p50, "p95": p95}
    show({"streams": NUM_STREAMS, "first_audio_ms": first, "speech_per_second": speech})


def speak_at_once(engine: Any) -> tuple[list[float], int]:
    """Seconds to the first audio of each stream, and the samples of all together."""
    started = time.perf_counter()
    firsts: dict[int, float] = {}
    tickets = []
    for seed in range(NUM_STREAMS):
        tickets.append(
            engine.submit("three one four", seed=seed, guard="off", max_audio_length_ms=STREAM_MS)
        )
        tickets[-1].add_listener(first_chunk(firsts, seed, started))
    num_samples = sum(len(ticket.result()) for ticket in tickets)
    return list(firsts.values()), num_samples


def first_chunk(
    firsts: dict[int, float], index: int, started: float
) -> Callable[[np.ndarray | None], None]:
    """A listener that notes when the first audio came."""

    def listen(chunk: np.ndarray | None) -> None:
        if chunk is not None and len(chunk):
            firsts.setdefault(index, time.perf_counter() - started)

    return listen


def measure_profile(checkpoint: str, out: Path) -> None:
    """The kernels of a frame at batch 1, by name, with their number and microseconds."""
    from csm_jax.model.kernels.choice import KERNELS

    for kernels in KERNELS:
        profile_frames(checkpoint, out / "profile" / kernels, kernels)


def profile_frames(checkpoint: str, directory: Path, kernels: str) -> None:
    import jax

    from csm_jax.benchmark import frame_loop_timer

    timer = frame_loop_timer(checkpoint, "bfloat16", "none", 1, 16, kernels)
    timer(NUM_FRAMES)
    with jax.profiler.trace(directory):
        seconds = timer(NUM_FRAMES)
    trace = max(directory.rglob("*.xplane.pb"), key=lambda path: path.stat().st_mtime)
    nanoseconds, number = count_kernels(jax.profiler.ProfileData.from_file(str(trace)))
    total = sum(nanoseconds.values())
    show(
        {
            "kernels": kernels,
            "frame_ms": 1000 * seconds / NUM_FRAMES,
            "kernels_a_frame": sum(number.values()) / NUM_FRAMES,
            "in_kernels_ms": total / 1e6 / NUM_FRAMES,
            "largest": [
                {
                    "kernel": name,
                    "a_frame": number[name] / NUM_FRAMES,
                    "us": time_ns / 1e3 / number[name],
                    "share": time_ns / total,
                }
                for name, time_ns in nanoseconds.most_common(NUM_KERNELS)
            ],
        }
    )


def count_kernels(profile: Any) -> tuple[Counter[str], Counter[str]]:
    """Nanoseconds and number of events by name: of the streams of a GPU, else of the host."""
    planes = list(profile.planes)
    on_card = [plane for plane in planes if plane.name.startswith("/device:GPU")]
    nanoseconds: Counter[str] = Counter()
    number: Counter[str] = Counter()
    for plane in on_card or planes:
        for line in plane.lines:
            if on_card and not line.name.startswith("Stream"):
                continue  # the same time again, by program and by operation
            for event in line.events:
                nanoseconds[event.name] += event.duration_ns
                number[event.name] += 1
    return nanoseconds, number


def show(figures: dict[str, Any]) -> None:
    print(json.dumps(figures), flush=True)


MEASUREMENTS = {
    "scores": measure_scores,
    "reference": write_reference,
    "kernels": measure_kernels,
    "engine": measure_engine,
    "profile": measure_profile,
}


def measure_all(arguments: argparse.Namespace) -> None:
    chosen = stages(arguments.checkpoint, arguments.out)
    if unknown := set(arguments.stages or ()) - set(chosen):
        sys.exit(f"--stages: {', '.join(sorted(unknown))} is none of {', '.join(chosen)}")
    names = [name for name in chosen if not arguments.stages or name in arguments.stages]
    total = sum(chosen[name].share for name in names)
    with (arguments.out / "report.jsonl").open("a", encoding="utf-8") as report:
        for name in names:
            limit = 60 * arguments.minutes * chosen[name].share / total
            line = json.dumps(run_stage(name, chosen[name], limit))
            print(line, file=report, flush=True)
            print(line, flush=True)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--out", type=Path, required=True, help="a directory for the report and the profile")
    add("--minutes", type=float, default=10.0, help="for all stages together")
    add("--stages", type=lambda text: text.split(","), help="some of them, with commas between")
    add("--checkpoint", default=FULL_SIZE, help="the model whose speed is measured")
    add("--stage", choices=MEASUREMENTS, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.stage:
        MEASUREMENTS[arguments.stage](arguments.checkpoint, arguments.out)
    else:
        measure_all(arguments)


if __name__ == "__main__":
    main()
