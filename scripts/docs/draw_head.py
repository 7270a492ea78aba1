"""Draw docs/method/head.svg: how a FSPAD head reads features and what its two outputs are for.

python scripts/docs/draw_head.py [--out docs/method/head.svg]
"""

from __future__ import annotations

import argparse
from pathlib import Path

from draw_method import COLOURS, FAINT, INK, MONO, Svg

LEFT, WIDTH = 168, 560  # of the boxes of the head
MIDDLE = LEFT + WIDTH / 2


def layer(svg: Svg, y: float, height: float, colour: str, title: str, formula: str) -> None:
    """One part of the head: its name and what it computes."""
    svg.rect(LEFT, y, WIDTH, height, COLOURS[colour], 8, 1.4)
    svg.text(LEFT + 14, y + 21, title, 13, COLOURS[colour][1], weight=600)
    svg.text(LEFT + 14, y + 41, formula, 12, INK, font=MONO)


def draw() -> Svg:
    """From the bottom, feature and token, to the top, two outputs."""
    svg = Svg(
        430,
        "A draft head (FSPAD): one layer on the target's features",
        "the row of token t at position i + 1; f is the target's hidden state after the final norm",
    )
    svg.chip(LEFT + 60, 378, 190, 28, "feature f of i", "target", 1.4)
    svg.chip(LEFT + 310, 378, 190, 28, "embedding e of t", "text", 1.4)
    svg.line((LEFT + 155, 378), (LEFT + 155, 352))
    svg.line((LEFT + 405, 378), (LEFT + 405, 352))
    layer(
        svg, 274, 74, "phrase", "Feature sampling",
        "x0 = W [e; f] + b,  x = x0 + W_d (SiLU(W_g e) ⊙ W_u norm(x0))",
    )  # fmt: skip
    svg.text(LEFT + 14, 335, "the chosen token settles what the feature left open", 11, FAINT)
    svg.line((MIDDLE, 274), (MIDDLE, 254))
    layer(
        svg, 176, 74, "draft", "Decoder layer, no norm in front",
        "r = x + Attn(x),  [logit; feature] = [r; r] + MLP(norm(r))",
    )  # fmt: skip
    svg.text(LEFT + 14, 237, "attention reads the head's own KV cache, which vLLM pages", 11, FAINT)
    svg.line((LEFT + 155, 176), (LEFT + 155, 142))
    svg.line((LEFT + 405, 176), (LEFT + 405, 142))
    svg.chip(LEFT + 60, 110, 190, 28, "h_logit", "draft", 1.4)
    svg.chip(LEFT + 310, 110, 190, 28, "h_reg", "target", 1.4)
    svg.text(LEFT + 155, 98, "target's LM head → next token", 11.5, INK, "middle")
    svg.text(LEFT + 405, 98, "next feature → next row of the chain", 11.5, INK, "middle")
    svg.text(24, 118, "trained on the target's", 10.5, FAINT)
    svg.text(24, 132, "distribution (0.1 · CE)", 10.5, FAINT)
    svg.text(LEFT + WIDTH - 44, 118, "trained on the target's next", 10.5, FAINT)
    svg.text(LEFT + WIDTH - 44, 132, "feature (1.0 · SmoothL1)", 10.5, FAINT)
    right = LEFT + WIDTH + 60
    svg.line(
        (LEFT + 500, 146), (right, 146), (right, 424), (LEFT + 155, 424), (LEFT + 155, 410),
        colour="target", width=2,
    )  # fmt: skip
    svg.text(right + 8, 290, "fed back", 11, COLOURS["target"][1])
    return svg


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("docs/method/head.svg"))
    out = parser.parse_args().out
    out.write_text("\n".join([*draw().parts, "</svg>\n"]))


if __name__ == "__main__":
    main()
