"""The streaming contract of the codec, and its causal convolutions.

Everything is channels last, [B, T, C], the layout that XLA lowers best on a CPU, and causal: an
output depends on inputs up to its own time only. So the state of a layer is a few past inputs, and
one method, `step`, serves both streams and whole recordings.

States are those of kyutai-labs/moshi `modules/conv.py`, except that a transposed convolution keeps
inputs here, where moshi keeps partial outputs.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from csm_jax.model.layers import Array, Rngs, normal, per_channel

State = Any  # a pytree whose leaves start with the batch axis


class StreamingLayer(nnx.Module):
    """A causal layer over a sequence of any length, a block at a time.

    `step` over consecutive blocks, with the state of one call passed to the next, equals one call
    over all of them, and the shapes of a state never change.
    """

    def init_state(self, batch: int) -> State:
        """The state before the first input of `batch` independent sequences."""
        raise NotImplementedError

    def step(self, x: Array, state: State) -> tuple[Array, State]:
        """Continues the sequences with [B, T, C]; returns the output and the next state."""
        raise NotImplementedError

    def __call__(self, x: Array) -> Array:
        """The output for whole sequences, [B, T, C]."""
        return self.step(x, self.init_state(x.shape[0]))[0]


def init_states(layers: Iterable[StreamingLayer], batch: int) -> State:
    """The states of several layers, as a tuple."""
    return tuple(layer.init_state(batch) for layer in layers)


def step_all(layers: Iterable[StreamingLayer], x: Array, states: State) -> tuple[Array, State]:
    """`step` of consecutive layers; their states are a tuple."""
    next_states = []
    for layer, state in zip(layers, states, strict=True):
        x, state = layer.step(x, state)
        next_states.append(state)
    return x, tuple(next_states)


class Chain(StreamingLayer):
    """Consecutive layers."""

    def __init__(self, layers: Iterable[StreamingLayer]):
        self.layers = nnx.List(layers)

    def init_state(self, batch: int) -> State:
        return init_states(self.layers, batch)

    def step(self, x: Array, state: State) -> tuple[Array, State]:
        return step_all(self.layers, x, state)


class Elu(StreamingLayer):
    """The exponential linear unit, without a state."""

    def init_state(self, batch: int) -> State:
        return ()

    def step(self, x: Array, state: State) -> tuple[Array, State]:
        return jax.nn.elu(x), state


class Conv1d(StreamingLayer):
    """A causal convolution, padded on the left with zeros.

    A block's length must be a multiple of the stride. The state is the last
    `(kernel_size - 1) * dilation + 1 - stride` inputs.

    Attributes:
      weight: [K, in_channels, out_channels].
      bias: [out_channels], or None.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        stride: int = 1,
        dilation: int = 1,
        use_bias: bool = True,
        rngs: Rngs,
    ):
        self.stride = stride
        self.dilation = dilation
        shape = (kernel_size, in_channels, out_channels)
        self.weight = nnx.Param(_init_weight(shape, kernel_size * in_channels, rngs))
        self.bias = nnx.Param(jnp.zeros((out_channels,), jnp.float32)) if use_bias else None

    def init_state(self, batch: int) -> Array:
        kernel_size, in_channels, _ = self.weight.shape
        past = (kernel_size - 1) * self.dilation + 1 - self.stride
        return jnp.zeros((batch, past, in_channels), jnp.float32)

    def step(self, x: Array, state: Array) -> tuple[Array, Array]:
        if x.shape[1] % self.stride:
            raise ValueError(
                f"a block of {x.shape[1]} inputs is not a multiple of the stride {self.stride}"
            )
        x, state = _with_past(x, state)
        y = _convolve(x, self.weight[...], self.stride, self.dilation)
        return _add_bias(y, self.bias), state


class ReplicateState(NamedTuple):
    """State of `ReplicateConv1d`.

    Attributes:
      previous: [B, past, C], the last inputs; meaningless until there was one.
      started: bool [B], whether there was one.
    """

    previous: Array
    started: Array


class ReplicateConv1d(Conv1d):
    """A causal convolution, padded on the left with copies of the first input."""

    def init_state(self, batch: int) -> State:
        return ReplicateState(super().init_state(batch), jnp.zeros((batch,), bool))

    def step(self, x: Array, state: State) -> tuple[Array, State]:
        previous = jnp.where(state.started[:, None, None], state.previous, x[:, :1])
        y, previous = super().step(x, previous)
        return y, ReplicateState(previous, jnp.ones_like(state.started))


class ConvTranspose1d(StreamingLayer):
    """A causal transposed convolution, without the overhang on the right.

    With a kernel of M strides, output `t * stride + s` is the sum over m of input `t - m` times
    kernel entry `m * stride + s`. That is an ordinary convolution of M taps with `stride` outputs
    per input, side by side (sub-pixel convolution, Shi et al., 2016). So the state is the last
    M - 1 inputs, and the bias is added once.

    Attributes:
      weight: [M, in_channels, stride, out_channels], the oldest input first; when depthwise, each
        channel has a kernel of its own and the last axis is 1.
      bias: [out_channels], or None.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        stride: int,
        depthwise: bool = False,
        use_bias: bool = True,
        rngs: Rngs,
    ):
        if kernel_size % stride:
            raise ValueError(f"kernel size {kernel_size} is not a multiple of the stride {stride}")
        taps = kernel_size // stride
        shape = (taps, in_channels, stride, 1 if depthwise else out_channels)
        fan_in = taps * (1 if depthwise else in_channels)
        self.depthwise = depthwise
        self.weight = nnx.Param(_init_weight(shape, fan_in, rngs))
        self.bias = nnx.Param(jnp.zeros((out_channels,), jnp.float32)) if use_bias else None

    def init_state(self, batch: int) -> Array:
        taps, in_channels, _, _ = self.weight.shape
        return jnp.zeros((batch, taps - 1, in_channels), jnp.float32)

    def step(self, x: Array, state: Array) -> tuple[Array, Array]:
        batch, length, _ = x.shape
        taps, in_channels, stride, out_channels = self.weight.shape
        x, state = _with_past(x, state)
        if self.depthwise:
            # A grouped convolution of 512 groups is slow on every backend.
            weight = self.weight[...][..., 0].swapaxes(1, 2)  # [M, S, C]
            shifted = [x[:, m : m + length, None] * weight[m, None, None] for m in range(taps)]
            y = sum(shifted[1:], shifted[0]).reshape(batch, length * stride, in_channels)
        else:
            y = _convolve(x, self.weight[...].reshape(taps, in_channels, -1))
            y = y.reshape(batch, length * stride, out_channels)
        return _add_bias(y, self.bias), state


def _init_weight(shape: tuple[int, ...], fan_in: int, rngs: Rngs) -> Array:
    # Less than LeCun's variance, because residual blocks add some: random weights then decode to
    # noise as loud as speech, which does not clip.
    return normal(rngs, shape, (0.7 / fan_in) ** 0.5, jnp.float32)


def _with_past(x: Array, past: Array) -> tuple[Array, Array]:
    """`x` with its past in front, and the past of the next block."""
    joined = jnp.concatenate([past, x], axis=1)
    return joined, joined[:, joined.shape[1] - past.shape[1] :]


def _convolve(x: Array, weight: Array, stride: int = 1, dilation: int = 1) -> Array:
    return jax.lax.conv_general_dilated(
        x,
        weight,
        window_strides=(stride,),
        padding="VALID",
        rhs_dilation=(dilation,),
        dimension_numbers=("NWC", "WIO", "NWC"),
        # Keeps float32 in float32 on TPU and GPU: rounded activations change codes.
        precision=jax.lax.Precision.HIGHEST,
    )


def _add_bias(y: Array, bias: nnx.Param | None) -> Array:
    return y if bias is None else y + per_channel(bias[...], y)
