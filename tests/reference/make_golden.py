"""Writes `golden/`: a tiny random CSM and the outputs of transformers for it.

    python tests/reference/make_golden.py

With these files parity can be tested without torch. They are small (0.8 MB) and kept in git; write
them again only when `csm_jax.config.tiny()` changes.

`golden/checkpoint/` is a checkpoint of layout 2 (`config.json`, `model.safetensors`) of the size
`csm_jax.config.tiny()`. Its weights are stored as float16, exactly: the outputs below are those of
the same values in float32. Load it with dtype float32.

`golden/expected.safetensors` holds, with Q = 7 codebooks, D = 48, V = 35 audio ids:

| name | shape, dtype | content |
|---|---|---|
| `text.frames`, `audio.frames` | [T, Q + 1] int32 | prompts: codes, then a text id, in each row |
| `text.mask`, `audio.mask` | [T, Q + 1] bool | the columns that count |
| `text.hidden`, `audio.hidden` | [T, D] float32 | backbone after its last norm, every position |
| `text.logits`, `audio.logits` | [T, V] float32 | codebook 0 logits, every position |
| `text.greedy`, `audio.greedy` | [20, Q] int32 | greedy codes of the prompt alone |
| `batch.greedy` | [2, 20, Q] int32 | of both prompts at once, text first, padded on the left |
| `depth.hidden` | [B, D] float32 | backbone states the depth decoder starts from |
| `depth.codes` | [B, Q] int32 | its inputs (teacher forcing) |
| `depth.logits` | [B, Q - 1, V] float32 | its logits for codebooks 1..Q-1 |
| `codec.pcm` | [29 * 1920] int16 | a waveform times 32768, 24 kHz mono |
| `codec.codes` | [29, Q] int32 | its Mimi codes |
| `codec.waveform` | [10 * 1920] float32 | the first 10 of these frames, decoded |
| `chat.input_ids` | [T] int32 | a chat prompt: the waveform as 29 audio ids, then an audio_eos id |
| `chat.greedy` | [20, Q] int32 | its greedy codes; transformers encodes the waveform |

`text` is one turn; `audio` has two turns with audio, each ending in a frame of zeros, before it.
No greedy run reaches an end of speech, and every code is within the codec's codebook.

`golden/manifest.json` names the versions of torch and transformers, the seed, and the margins: the
smallest lead of a greedy code's logit over the next, and of a nearest centroid over the next (as a
distance). Codes are expected to be equal for as long as rounding stays below these.
"""

import copy
import json
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file

import oracles
from csm_jax.config import tiny

GOLDEN = Path(__file__).parent / "golden"
SEED = 11  # chosen for its margins
NUM_FRAMES = 20
NUM_AUDIO_FRAMES = 29
NUM_DECODED_FRAMES = 10
LEAST_MARGIN = 1e-3

Tensors = dict[str, torch.Tensor]


def main() -> None:
    config = tiny()
    model = oracles.hf_model(config, SEED)
    oracles.round_to_float16(model)
    pcm = waveform(config)
    prompts = {
        "text": oracles.random_prompt(config, seed=1, num_ids=9),
        "audio": oracles.random_prompt(config, seed=2, num_ids=6, context=[(5, 11), (3, 4)]),
    }
    expected = language_tensors(model, prompts)
    expected |= depth_tensors(model, prompts["audio"])
    expected |= codec_tensors(model, pcm)
    expected |= chat_tensors(model, config, pcm)
    prompts["chat"] = oracles.frames_from_ids(
        config, expected["chat.input_ids"], expected["codec.codes"]
    )
    margins = {name: margin(model, prompts[name], expected[f"{name}.greedy"]) for name in prompts}
    margins["codec"] = oracles.hf_code_margin(model, samples(pcm))
    write(model, expected, margins)


def language_tensors(model, prompts: dict[str, oracles.Prompt]) -> Tensors:
    tensors = {}
    for name, (frames, mask) in prompts.items():
        prompt = frames, mask
        tensors |= {
            f"{name}.frames": frames,
            f"{name}.mask": mask,
            f"{name}.hidden": oracles.hf_hidden(model, prompt),
            f"{name}.logits": oracles.hf_logits(model, prompt),
            f"{name}.greedy": oracles.hf_greedy(model, prompt, NUM_FRAMES),
        }
    batch = oracles.hf_greedy_batch(model, list(prompts.values()), NUM_FRAMES)
    return tensors | {"batch.greedy": batch}


def depth_tensors(model, prompt: oracles.Prompt) -> Tensors:
    """Every position's state with the codes of its row; they need not be likely ones."""
    hidden, codes = oracles.hf_hidden(model, prompt), prompt[0][:, :-1]
    logits = oracles.hf_depth_logits(model, hidden, codes)
    return {"depth.hidden": hidden, "depth.codes": codes, "depth.logits": logits}


def waveform(config) -> torch.Tensor:
    """A chirp from 120 Hz to 1.5 kHz that swells three times a second, in noise: int16."""
    num_samples = NUM_AUDIO_FRAMES * config.codec.frame_size
    time = torch.arange(num_samples, dtype=torch.float64) / config.codec.sample_rate
    chirp = torch.sin(2 * torch.pi * (120 + 300 * time) * time)
    swell = 0.25 * (1 - torch.cos(2 * torch.pi * 3 * time))
    noise = torch.randn(num_samples, generator=torch.Generator().manual_seed(SEED))
    return (32768 * (swell * chirp + 0.03 * noise)).round().to(torch.int16)


def samples(pcm: torch.Tensor) -> torch.Tensor:
    return pcm.float() / 32768


def codec_tensors(model, pcm: torch.Tensor) -> Tensors:
    codes = oracles.hf_encode(model, samples(pcm))
    decoded = oracles.hf_decode(model, codes[:NUM_DECODED_FRAMES])
    return {"codec.pcm": pcm, "codec.codes": codes, "codec.waveform": decoded}


def chat_tensors(model, config, pcm: torch.Tensor) -> Tensors:
    rng = torch.Generator().manual_seed(SEED)
    ids = oracles.random_chat_ids(config, rng, context=[(6, NUM_AUDIO_FRAMES)], num_ids=8)
    codes = oracles.hf_greedy_from_audio(model, ids, [samples(pcm)], NUM_FRAMES)
    return {"chat.input_ids": ids, "chat.greedy": codes}


def margin(model, prompt: oracles.Prompt, codes: torch.Tensor) -> float:
    """The margin of a greedy run, which must have its full length and no near ties."""
    assert len(codes) == NUM_FRAMES, "this seed meets an end of speech"
    assert codes.max() < model.config.codec_config.codebook_size
    return oracles.greedy_margin(model, prompt, codes)


def compact(tensors: Tensors) -> Tensors:
    """Indices as int32, everything contiguous."""
    return {
        name: (tensor.int() if tensor.dtype == torch.int64 else tensor).contiguous()
        for name, tensor in tensors.items()
    }


def write(model, expected: Tensors, margins: dict[str, float]) -> None:
    assert min(margins.values()) > LEAST_MARGIN, margins
    oracles.save_hf(copy.deepcopy(model).half(), GOLDEN / "checkpoint")
    save_file(compact(expected), GOLDEN / "expected.safetensors")
    manifest = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "seed": SEED,
        "margins": margins,
    }
    (GOLDEN / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
    for file in sorted(GOLDEN.rglob("*")):
        if file.is_file():
            print(f"{file.stat().st_size:8d} {file.relative_to(GOLDEN)}")


if __name__ == "__main__":
    main()
