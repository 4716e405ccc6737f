"""SEANet, the convolutional ends of the codec (Tagliasacchi et al., 2020).

The positions of layers in `layers` are those of kyutai-labs/moshi `modules/seanet.py`, with the
activations counted, so that checkpoints of any number of strides map by number.
"""

from csm_jax.config import MimiConfig
from csm_jax.mimi.conv import (
    Array,
    Chain,
    Conv1d,
    ConvTranspose1d,
    Elu,
    State,
    StreamingLayer,
)
from csm_jax.model.layers import Rngs


class ResidualBlock(Chain):
    """`x` plus a bottleneck of a dilated and a pointwise convolution."""

    def __init__(self, config: MimiConfig, channels: int, dilation: int, *, rngs: Rngs):
        hidden = channels // config.compress
        kernel_size = config.residual_kernel_size
        super().__init__(
            [
                Elu(),
                Conv1d(channels, hidden, kernel_size, dilation=dilation, rngs=rngs),
                Elu(),
                Conv1d(hidden, channels, 1, rngs=rngs),
            ]
        )

    def step(self, x: Array, state: State) -> tuple[Array, State]:
        update, state = super().step(x, state)
        return x + update, state


class Encoder(Chain):
    """The encoder: waveform [B, T * hop_length, channels] to latents [B, T, D]."""

    def __init__(self, config: MimiConfig, *, rngs: Rngs):
        channels = config.num_filters
        layers: list[StreamingLayer] = [
            Conv1d(config.channels, channels, config.kernel_size, rngs=rngs)
        ]
        for ratio in config.ratios:
            layers += _residual_blocks(config, channels, rngs)
            layers += [
                Elu(),
                Conv1d(channels, 2 * channels, 2 * ratio, stride=ratio, rngs=rngs),
            ]
            channels *= 2
        layers += [Elu(), Conv1d(channels, config.embed_dim, config.last_kernel_size, rngs=rngs)]
        super().__init__(layers)


class Decoder(Chain):
    """The mirror image of `Encoder`: latents [B, T, D] to [B, T * hop_length, channels]."""

    def __init__(self, config: MimiConfig, *, rngs: Rngs):
        channels = config.num_filters * 2 ** len(config.ratios)
        layers: list[StreamingLayer] = [
            Conv1d(config.embed_dim, channels, config.kernel_size, rngs=rngs)
        ]
        for ratio in reversed(config.ratios):
            layers += [
                Elu(),
                ConvTranspose1d(channels, channels // 2, 2 * ratio, stride=ratio, rngs=rngs),
            ]
            channels //= 2
            layers += _residual_blocks(config, channels, rngs)
        layers += [Elu(), Conv1d(channels, config.channels, config.last_kernel_size, rngs=rngs)]
        super().__init__(layers)


def _residual_blocks(config: MimiConfig, channels: int, rngs: Rngs) -> list[ResidualBlock]:
    dilations = [config.dilation_growth**i for i in range(config.num_residual_layers)]
    return [ResidualBlock(config, channels, dilation, rngs=rngs) for dilation in dilations]
