"""The two public torch implementations of CSM as references, with random weights at any size.

- `hf_*`: `transformers.CsmForConditionalGeneration`, checkpoint layout 2, with its Mimi codec.
- `SesameModel`: the model of SesameAILabs/csm (`models.py`) assembled from the same torchtune
  parts, checkpoint layout 1, without a codec.

`sesame_from_hf` gives both the same weights. Everything is float32 on the CPU, in eval mode.

A prompt is a pair `(frames, mask)`: int64 and bool arrays [T, Q + 1], whose columns are Q audio
codes and then one text id. The mask of a row is true for its text column or for its Q audio
columns. Functions take torch tensors or numpy arrays and return torch tensors.

Axes: B batch, T positions, F frames, Q codebooks, D backbone dim, V audio vocabulary.
"""

from oracles.huggingface import (
    greedy_margin,
    hf_attention,
    hf_code_margin,
    hf_codec_config,
    hf_config,
    hf_decode,
    hf_depth_logits,
    hf_embed,
    hf_encode,
    hf_greedy,
    hf_greedy_batch,
    hf_greedy_from_audio,
    hf_hidden,
    hf_logits,
    hf_model,
    save_hf,
)
from oracles.prompts import (
    Prompt,
    audio_rows,
    concatenate,
    frames_from_ids,
    random_chat_ids,
    random_prompt,
    random_turn_ids,
    text_rows,
)
from oracles.random_weights import randomize, round_to_float16
from oracles.sesame import (
    SesameModel,
    greedy,
    interleave,
    save_sesame,
    sesame_from_hf,
    sesame_model,
)

__all__ = [
    "Prompt",
    "SesameModel",
    "audio_rows",
    "concatenate",
    "frames_from_ids",
    "greedy",
    "greedy_margin",
    "hf_attention",
    "hf_code_margin",
    "hf_codec_config",
    "hf_config",
    "hf_decode",
    "hf_depth_logits",
    "hf_embed",
    "hf_encode",
    "hf_greedy",
    "hf_greedy_batch",
    "hf_greedy_from_audio",
    "hf_hidden",
    "hf_logits",
    "hf_model",
    "interleave",
    "random_chat_ids",
    "random_prompt",
    "random_turn_ids",
    "randomize",
    "round_to_float16",
    "save_hf",
    "save_sesame",
    "sesame_from_hf",
    "sesame_model",
    "text_rows",
]
