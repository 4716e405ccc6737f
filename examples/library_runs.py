"""How csm_jax, transformers and moshi generate frames, and how they encode and decode audio.

`BUILDERS` makes a function that does so once and returns the seconds of a frame, or of the audio.
"""

import dataclasses
import os
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
AUDIO_S, STREAM_FRAMES = 10.0, 25

Run = Callable[[], float]


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


def prepare(task: Task) -> str:
    """Sets up the framework; returns its name, version and device."""
    if task.library == "csm-jax":
        return f"csm-jax: jax {jax.__version__} on {jax.devices()[0].device_kind}"
    import torch

    torch.set_num_threads(os.cpu_count())
    torch.set_grad_enabled(False)
    where = torch.cuda.get_device_name() if task.device == "cuda" else f"{os.cpu_count()} cores"
    return f"{task.library} {version(task.library)}: torch {torch.__version__} on {where}"
