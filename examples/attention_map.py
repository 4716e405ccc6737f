"""Draws which positions of a text the heads of a layer attend to while the model speaks it.

    python examples/attention_map.py --text="three one four" --layer=1 --out=attention.png

Every head of the layer has a map of frames by tokens. A head that follows the speech shows as a
staircase. It needs matplotlib: pip install "csm-jax[evaluate]".
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

import csm_jax
from csm_jax.inference.states import States


def plot(states: States, layer: int) -> Figure:
    """The maps of all heads; the attention of frame f is that of the position that predicts it."""
    maps = states.backbone_attention.values[0]  # [head, position, attended]
    text = slice(states.start - states.num_text, states.start)
    columns = min(4, len(maps))
    rows = -(-len(maps) // columns)
    figure = Figure(figsize=(3 * columns, 2.6 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for head, axes in enumerate(grid.flat):
        axes.set_visible(head < len(maps))
        if head < len(maps):
            weights = maps[head, states.start - 1 : -2, text]
            image = axes.imshow(weights.T, origin="lower", aspect="auto", vmin=0, vmax=1)
            axes.set_title(f"layer {layer}, head {head}", fontsize="small")
    figure.supxlabel("frame")
    figure.supylabel("token of the text")
    figure.colorbar(image, ax=grid, label="attention")
    return figure


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", default="demo")
    parser.add_argument("--text", default="three one four")
    parser.add_argument("--speaker", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--layer", type=int, help="counted from 0; default: of the alignment head")
    parser.add_argument("--out", type=Path, default=Path("attention.png"))
    arguments = parser.parse_args(argv)

    model = csm_jax.load(arguments.checkpoint)
    layer, text, speaker = arguments.layer, arguments.text, arguments.speaker
    if layer is None:
        layer = model.alignment.heads[0][0] if model.alignment else 0
    codes = model.generate_codes(text, speaker, seed=arguments.seed)
    states = model.states(text, codes, speaker, backbone_attention=[layer])
    plot(states, layer).savefig(arguments.out, dpi=120)
    print(f"{arguments.out}: {len(codes)} frames, {states.num_text} tokens")


if __name__ == "__main__":
    main()
