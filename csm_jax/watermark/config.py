"""Sizes of a watermark's network, as SilentCipher's hparams.yaml has them."""

import dataclasses
from dataclasses import dataclass

# Mean power of the recordings that the network was trained on (VCTK), of samples from -1 to 1.
TRAINED_POWER = 0.002837200844477648


@dataclass(frozen=True)
class WatermarkConfig:
    """Sizes of SilentCipher's networks; the defaults are those of its model for 44.1 kHz.

    Attributes:
      sample_rate: Hz, of the audio that the network marks.
      n_fft: samples of a frame of the STFT; frames overlap by half.
      band: bins of the spectrum, from the lowest, that are marked.
      num_symbols: different symbols; 0 ends a message, the others are two bits each.
      period: symbols of a message, one a frame; it repeats without end.
      carrier_channels, decoder_channels, message_channels: of the carrier's encoder, of the
        decoder that makes the mark, and of the decoder that reads it.
      carrier_layers, decoder_layers, message_layers: layers of the three.
    """

    sample_rate: int = 44_100
    n_fft: int = 4096
    band: int = 1024
    num_symbols: int = 5
    period: int = 21
    carrier_channels: int = 32
    decoder_channels: int = 96
    message_channels: int = 128
    carrier_layers: int = 3
    decoder_layers: int = 4
    message_layers: int = 10

    @property
    def hop(self) -> int:
        return self.n_fft // 2

    @property
    def num_bins(self) -> int:
        return self.n_fft // 2 + 1

    @property
    def reach(self) -> int:
        """Frames before and after a frame on which its mark depends: one for each layer of 3 x 3.

        The decoder's last layer is 1 x 1.
        """
        return self.carrier_layers + self.decoder_layers - 1

    @property
    def num_inputs(self) -> int:
        """Bins that the mark depends on: those of the band, and what its layers reach beyond."""
        return min(self.num_bins, self.band + self.reach)

    def to_dict(self) -> dict[str, int]:
        return dataclasses.asdict(self)


def tiny() -> WatermarkConfig:
    """Sizes for tests."""
    return WatermarkConfig(
        n_fft=128,
        band=32,
        carrier_channels=4,
        decoder_channels=6,
        message_channels=8,
        message_layers=4,
    )
