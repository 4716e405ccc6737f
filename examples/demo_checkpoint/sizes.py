"""Sizes of the demo checkpoint: the modules of CSM-1B, a thousand times smaller."""

from csm_jax.config import CSMConfig, LlamaConfig, MimiConfig, TextTokenIds

TEXT_VOCAB = 256
# File name of the trained codec.
CODEC_WEIGHTS = "codec.safetensors"
# 24 kHz and 12.5 frames a second, like the released codec.
CODEC = MimiConfig(
    num_filters=16,
    embed_dim=128,
    num_layers=2,
    num_heads=4,
    mlp_dim=256,
    attention_window=50,
    num_codebooks=8,
    codebook_size=256,
    codebook_dim=64,
)
# The codec of the open-vocabulary voice. Its strides are in the reverse order of the released
# codec's, so that the layers with many channels have low rates.
VOICE_CODEC = MimiConfig(
    num_filters=32,
    ratios=(8, 6, 5, 4),
    embed_dim=256,
    num_layers=2,
    num_heads=4,
    mlp_dim=512,
    attention_window=50,
    num_codebooks=8,
    codebook_size=1024,
    codebook_dim=64,
)
# Codebooks that the model generates. Speech is as intelligible as with all of the codec's, and the
# other codebooks are nearly noise, which would not improve training.
NUM_CODEBOOKS = 4
TEXT_TOKEN_IDS = TextTokenIds(bos=1, eos=2, audio=3, audio_eos=4)
MODEL = CSMConfig(
    backbone=LlamaConfig(
        num_layers=6,
        embed_dim=192,
        num_heads=6,
        num_kv_heads=2,
        head_dim=32,
        mlp_dim=512,
        max_seq_len=1024,
    ),
    depth_decoder=LlamaConfig(
        num_layers=3,
        embed_dim=128,
        num_heads=4,
        num_kv_heads=2,
        head_dim=32,
        mlp_dim=256,
        max_seq_len=NUM_CODEBOOKS + 1,
    ),
    codec=CODEC,
    text_vocab_size=TEXT_VOCAB,
    audio_vocab_size=259,
    num_codebooks=NUM_CODEBOOKS,
    text_token_ids=TEXT_TOKEN_IDS,
)
# The model of the open-vocabulary voice. With its codec it has 44 MB in bfloat16.
VOICE_MODEL = CSMConfig(
    backbone=LlamaConfig(
        num_layers=6,
        embed_dim=384,
        num_heads=6,
        num_kv_heads=2,
        head_dim=64,
        mlp_dim=832,
        max_seq_len=2048,
    ),
    depth_decoder=LlamaConfig(
        num_layers=3,
        embed_dim=192,
        num_heads=3,
        num_kv_heads=1,
        head_dim=64,
        mlp_dim=512,
        max_seq_len=VOICE_CODEC.num_codebooks + 1,
    ),
    codec=VOICE_CODEC,
    text_vocab_size=TEXT_VOCAB,
    audio_vocab_size=VOICE_CODEC.codebook_size + 3,
    num_codebooks=VOICE_CODEC.num_codebooks,
    text_token_ids=TEXT_TOKEN_IDS,
)
