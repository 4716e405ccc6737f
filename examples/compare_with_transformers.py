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
import json
import os
import re
import statistics
import subprocess
import sys
import time
from typing import Any, NamedTuple

from library_runs import AUDIO_S, BUILDERS, CHECKPOINTS, Task, prepare

MAX_FRAMES = 200  # the frame loop of csm_jax.benchmark has 256 positions
FRAME_S = 0.08
WARM_UPS = {"cpu": 1, "cuda": 2}  # CUDA graphs are recorded after the first compiled run
# Idle threads of a pool may spin for 0.2 s before they sleep (Intel's KMP_BLOCKTIME).
PAUSE_S = 0.3
ENVIRONMENT = {
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # two frameworks share a card
    "TRANSFORMERS_VERBOSITY": "error",
    "PYTHONWARNINGS": "ignore",
}


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
