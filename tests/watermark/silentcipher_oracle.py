"""The package silentcipher with random weights in its released sizes, and files of them."""

import sys
import types
from pathlib import Path
from typing import Any

HPARAMS = """\
SR: 44100
N_FFT: 4096
HOP_LENGTH: 2048
message_band_size: 1024
message_dim: 5
message_len: 21
message_sdr: 47
n_messages: 1
model_type: 44.1k
ensure_negative_message: true
utterance_level_normalization: true
frame_level_normalization: false
no_normalization: false
enc_n_layers: 3
dec_c_n_layers: 4
"""


def make_reference(directory: Path) -> Any:
    """Writes random weights as the release lays them out, and loads them by the package."""
    import torch

    sys.modules.setdefault("librosa", types.ModuleType("librosa"))  # only resamples
    from silentcipher import server
    from silentcipher.model import CarrierDecoder, Encoder, MsgDecoder

    torch.manual_seed(5)
    config = types.SimpleNamespace()
    networks = {
        "enc_c.ckpt": Encoder(32, 3, message_dim=5, message_band_size=1024, n_fft=4096),
        "dec_c.ckpt": CarrierDecoder(config, 96, 4, message_band_size=1024),
        "dec_m_0.ckpt": MsgDecoder(message_dim=5, message_band_size=1024),
    }
    for file, network in networks.items():
        for name, value in network.state_dict().items():
            if "running" in name or "bn" in name:
                torch.nn.init.uniform_(value.float(), 0.5, 1.5)
                if value.dtype.is_floating_point:
                    value.uniform_(0.5, 1.5)
        state = {f"module.{name}": value for name, value in network.state_dict().items()}
        torch.save(state, directory / file)
    (directory / "hparams.yaml").write_text(HPARAMS)
    return server.get_model("44.1k", str(directory), str(directory / "hparams.yaml"))


def read_symbols(reference: Any, samples: Any) -> Any:
    """What the package's decoder reads, without the search and the message around it."""
    import torch

    scaled = samples * (reference.average_energy_VCTK / (samples**2).mean()) ** 0.5
    with torch.no_grad():
        carrier, _ = reference.stft.transform(torch.FloatTensor(scaled)[None])
        logits = reference.dec_m[0](carrier[:, None])[0, 0]
    return logits.argmax(dim=0).numpy(), logits.numpy()
