"""Draw the figures of docs/method.md: one step of a tiny example, run by the plugin's own code.

    python scripts/docs/draw_method.py [--out docs/method]

Rows, masks, trees, acceptance and phrases come from `Drafting` and its pool; only the two models
are made up: each repeats what follows in a text of its own. Words stand for token ids.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from vllm_ouroboros.phrases.arrays import PhraseSource
from vllm_ouroboros.phrases.pool import PhrasePool
from vllm_ouroboros.trees.draft_tree import NodeSource, step_mask, walk
from vllm_ouroboros.trees.drafting import Drafting

GAMMA, K, BETA, W, G, BUDGET = 4, 2, 3, 3, 3, 10  # BUDGET = γ + K·β
PROMPT = "then the old man sat by a lake . then the rain came . a dog ran . the old man sat"
TARGET = f"{PROMPT} by a fire . then the old man sat by a lake again . the dog ran to the"
DRAFT = "then the old man sat by a fire . a dog ran to the rain came . lake . again ."
WORDS = np.unique([*TARGET.split(), *DRAFT.split()])


def predict(corpus: str, longest: int, text: list[str]) -> str:
    """A model: what stands in ``corpus`` behind the longest end of ``text`` that is there."""
    words = corpus.split()
    ends = [(n, e) for n in range(longest, -1, -1) for e in range(n, len(words))]
    return next(words[e] for n, e in ends if words[e - n : e] == text[max(0, len(text) - n) :])


def ids(words) -> np.ndarray:
    return np.searchsorted(WORDS, words).astype(np.int32)


def visible(parents, starts) -> np.ndarray:
    """The plugin's mask of a step, unpacked: bool [T, T]; a row sees the path to it."""
    mask = step_mask(np.asarray(parents, np.int32), np.asarray(starts, np.int32))
    return np.array([[row[j >> 5] >> (j & 31) & 1 for j in range(len(mask))] for row in mask], bool)


class Request:
    """One request; the fields of the plugin's arrays are read here only."""

    def __init__(self) -> None:
        self.drafting = Drafting(
            PhrasePool(512, G, BETA), max_requests=1, budget=BUDGET, draft_tokens=GAMMA,
            num_suffixes=K, window_size=W, max_len=64,
        )  # fmt: skip
        self.slot, self.text, self.token_ids = self.drafting.add(), [], np.zeros((1, 64), np.int32)
        self.batch = np.array([self.slot]), np.zeros(1, np.int64), self.token_ids
        self.commit(PROMPT.split(), PhraseSource.PROMPT)
        self.drafting.reset(self.slot, len(self.text))  # the draft model has read the prompt

    def commit(self, words: list[str], source: PhraseSource) -> None:
        self.text = [*self.text, *words]
        self.token_ids[0, : len(self.text)] = ids(self.text)
        slots, rows, _ = self.batch
        self.drafting.commit(self.token_ids, slots, rows, rows + len(self.text), source)

    def chain(self) -> list[str]:
        state = self.drafting.state
        return [*WORDS[state.chain[self.slot, : state.chain_len[self.slot]]]]

    def step(self) -> SimpleNamespace:
        """Draft, lengthen, verify, accept, learn; shows the last draft forward and the tree."""
        drafting, slot, text, shown = self.drafting, self.slot, self.text, SimpleNamespace()
        drafting.start(slot, len(text), BUDGET, 64)
        while len(self.chain()) < GAMMA:
            out, total, wanted = drafting.plan(*self.batch)
            mask, words = visible(out.parents, out.query_start_loc), WORDS[out.tokens[:total]]
            context = [*text, *self.chain()][: out.context_lens[0]]
            asked = out.logits_rows[:wanted].tolist()
            predicted = {i: predict(DRAFT, 3, [*context, *words[mask[i]]]) for i in asked}
            flat = ids([predicted.get(i, ".") for i in range(total)])
            drafting.absorb(self.batch[0], out, flat.astype(np.int64))
            shown.round = SimpleNamespace(
                words=words, mask=mask, parents=out.parents, positions=out.positions,
                predicted=predicted, cached=len(context), uncached=int(out.num_uncached[0]),
                guesses=int(out.num_guesses[0]),
            )  # fmt: skip
        drafting.build(*self.batch)
        tree = drafting.tree(slot)
        shown.text, shown.chain = text, self.chain()
        shown.words = words = np.append(text[-1], WORDS[tree.tokens])  # the root, then the nodes
        shown.parents = np.append(-1, tree.parents + 1)
        shown.colours = ["text", *np.where(tree.sources == NodeSource.DRAFT, "draft", "phrase")]
        shown.mask = visible(shown.parents, [0, len(words)])
        shown.target = [predict(TARGET, 40, [*text[:-1], *words[row]]) for row in shown.mask]
        predicted, path = ids(shown.target), np.empty(len(words), np.int32)
        accepted = walk(tree.tokens, tree.parents, len(tree.tokens), predicted, path)
        shown.path = [0, *(path[:accepted] + 1)]
        emitted = [*words[shown.path[1:]], shown.target[shown.path[-1]]]
        drafting.learn([slot], [ids(words[0])], [tree], [predicted])
        drafting.settle(slot, ids(emitted).tolist())
        self.commit(emitted, PhraseSource.HISTORY)
        return shown


COLOURS = {  # fill and stroke of what comes from where
    "text": ("#e6e6e2", "#7b7b75"), "draft": ("#cdeed4", "#2c8a4b"),
    "phrase": ("#f6d3ee", "#ad2b91"), "window": ("#d3e4fb", "#2f6fc0"),
    "target": ("#fde7a9", "#b27d0c"), "none": ("#ffffff", "#d0d0ca"),
}  # fmt: skip
INK, FAINT = "#23272e", "#6b6f76"
SANS = "system-ui, -apple-system, 'Segoe UI', 'DejaVu Sans', sans-serif"
MONO = "ui-monospace, SFMono-Regular, Menlo, 'DejaVu Sans Mono', monospace"


class Svg:
    """Shapes on a light card, written as text."""

    def __init__(self, height: int, title: str, subtitle: str) -> None:
        self.parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="900" height="{height}" '
            f'viewBox="0 0 900 {height}" role="img">\n<title>{title}</title>'
        ]
        for name, (_, stroke) in COLOURS.items():  # heads of arrows
            self.parts.append(
                f'<marker id="{name}" viewBox="0 0 9 9" refX="6" refY="4.5" markerWidth="4.5" '
                'markerHeight="4.5" orient="auto">'
                f'<path d="M0 0 9 4.5 0 9z" fill="{stroke}"/></marker>'
            )
        self.rect(0.5, 0.5, 899, height - 1, ("#fcfcfa", "#dcdcd6"), 12)
        self.text(24, 34, title, 16, weight=600)
        self.text(24, 54, subtitle, 12, FAINT)

    def rect(self, x, y, w, h, colour, r=4, width=1.0) -> None:
        self.parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" rx="{r}" '
            f'fill="{colour[0]}" stroke="{colour[1]}" stroke-width="{width}"/>'
        )

    def text(self, x, y, words, size=12, fill=INK, at="start", font=SANS, weight=400) -> None:
        self.parts.append(
            f'<text x="{x:g}" y="{y:g}" font-family="{font}" font-size="{size}" fill="{fill}" '
            f'text-anchor="{at}" font-weight="{weight}">{words}</text>'
        )

    def note(self, x, y, words, size=10.5, at="middle") -> None:
        self.text(x, y, words, size, FAINT, at)

    def chip(self, x, y, w, h, word, colour, width=1.0) -> None:
        """A token: a box with its word in the middle."""
        self.rect(x, y, w, h, COLOURS[colour], 5, width)
        self.text(x + w / 2, y + h / 2 + 4.2, word, 12, INK, "middle", MONO)

    def line(self, *points, colour="text", width=1.4) -> None:
        """Straight pieces, with an arrow head at the end."""
        self.parts.append(
            f'<polyline points="{" ".join(f"{x:g},{y:g}" for x, y in points)}" fill="none" '
            f'stroke="{COLOURS[colour][1]}" stroke-width="{width}" marker-end="url(#{colour})"/>'
        )

    def grid(self, x, y, cell, mask, colours) -> None:
        """An attention mask: a row for each query, a column for each key, the cache first."""
        for i, row in enumerate(mask):
            self.rect(x, y + i * cell, 48, cell - 2, COLOURS["text"], 2, 0.8)
            for j, sees in enumerate(row):
                colour = COLOURS[colours[j] if sees else "none"]
                self.rect(x + 52 + j * cell, y + i * cell, cell - 2, cell - 2, colour, 2, 0.8)


def draw_forward(step: SimpleNamespace) -> Svg:
    """Rows of a draft forward, their mask and their predictions."""
    r, key, top, cell, x = step.round, step.text[-1], 118, 24, 268
    total, ends = len(r.words), [0, r.uncached, r.uncached + r.guesses, len(r.words)]
    svg = Svg(top + cell * total + 20, f"One draft forward: {total} rows of one request",
        f"γ = {GAMMA}, β = {BETA}, W = {W}, G = {G}; n = {len(step.text)} committed tokens, "
        f"{r.cached} of them in the draft KV cache; the current token is “{key}”")  # fmt: skip
    colours = ["text"] * r.uncached + ["phrase"] * r.guesses + ["window"] * (total - ends[2])
    names = ("uncached", "not in the KV cache"), ("guesses", f"phrases of “{key}”")
    for i, (name, note) in enumerate((*names, ("window", "β levels of W"))):
        y, height = top + cell * ends[i], cell * (ends[i + 1] - ends[i]) - 4
        stroke = COLOURS[colours[ends[i]]][1]
        svg.rect(24, y, 4, height, (stroke, stroke), 2)
        svg.text(35, y + height / 2 - 1, name, 13, stroke, weight=600)
        svg.note(35, y + height / 2 + 13, note, 9.5, "start")
    heads = "token", "l, j", "pos.", f"0–{r.cached - 1}", "predicts"
    for at, head in zip((168, 213, 246, x + 24, 726), heads, strict=True):
        svg.note(at, top - 9, head)
    svg.text(x, top - 28, "attention mask: a row sees the cache and the rows that lead to it")
    use, row = {}, r.uncached - 1
    while row is not None:
        use[row] = ("draft", f"token {len(use) + 1} of the chain")
        children = [i for i in range(*ends[1:3]) if r.parents[i] == row]
        row = next((i for i in children if r.words[i] == r.predicted[row]), None)
    for row in list(r.predicted)[-W:]:
        path = [*r.words[r.mask[row]][-BETA:], r.predicted[row]]
        use[row] = ("window", f"{path[0]} → {' '.join(path[1:])}")
    svg.grid(x, top, cell, r.mask, colours)
    for i, word in enumerate(r.words):
        y = top + cell * i
        svg.note(x + 63 + cell * i, top - 9, i)
        svg.note(132, y + 15, i, at="end")
        svg.chip(140, y, 56, cell - 3, word, colours[i])
        svg.text(246, y + 15, r.positions[i], 11, INK, "middle", MONO)
        svg.note(213, y + 15, "{}, {}".format(*divmod(i - ends[2] + 1, W)) if i >= ends[2] else "")
        if i in r.predicted:
            colour, note = use.get(i, ("none", "not reached"))
            svg.chip(698, y, 56, cell - 3, r.predicted[i], colour)
            svg.text(762, y + 15, note, 11, COLOURS[colour][1] if i in use else FAINT)
    return svg


def draw_verification(step: SimpleNamespace) -> Svg:
    """The tree, its mask, and the KV slots of the accepted path."""
    words, colours, path, size, x = step.words, step.colours, step.path, len(step.words), 392
    svg = Svg(512, f"One verification: {size - 1} nodes give {len(path)} tokens",
        f"the chain (green), K = {K} suffixes of “{step.chain[-1]}” and phrases of “{words[0]}” "
        f"(magenta), up to γ + K·β = {BUDGET} nodes")  # fmt: skip
    top, below, pitch = 102, 296, 96
    slots, names = ["n−1", "n", *(f"n+{d}" for d in range(1, size - 1))], ["root", *range(size)]
    nodes = [*zip(words, colours, step.parents, step.mask.sum(1) - 1, strict=True)]
    nodes.append((step.target[path[-1]], "target", path[-1], len(path)))
    best = {*path, size}  # the accepted path and the bonus token
    at = [(26 + pitch * node[3], top + (0 if i in best else 74)) for i, node in enumerate(nodes)]
    for i in sorted(range(1, size + 1), key=lambda i: i in best):  # the accepted path on top
        (x0, y0), (x1, y1) = at[nodes[i][2]], at[i]
        bend = [(x0 + 80, y0 + 14), (x0 + 80, y1 + 14)] if y0 != y1 else []
        style = {"colour": "target", "width": 2.4} if i in best else {}
        svg.line((x0 + 66, y0 + 14), *bend, (x1 - 4, y1 + 14), **style)
    for i, (word, colour, _, depth) in enumerate(nodes):
        note = f"{names[i]} · target: {step.target[i]}" if i < size else "bonus token"
        svg.chip(*at[i], 66, 28, word, colour, 2 if i in best else 1)
        svg.note(at[i][0] + 2, at[i][1] + 42, note, 9.5, "start")
        if i in path:
            svg.note(at[i][0] + 33, top - 9, slots[depth])
    svg.text(24, below - 36, "attention mask: query rows, key columns", weight=600)
    svg.grid(100, below, 18, step.mask, colours)
    svg.note(124, below - 9, f"0–{len(step.text) - 2}")
    for i, word in enumerate(words):
        svg.text(92, below + 13 + 18 * i, f"{word} {names[i]}", 10.5, INK, "end", MONO)
        svg.note(160 + 18 * i, below - 9, names[i], 9.5)
    rows = ("as the forward writes them", range(size)), ("after acceptance", path)
    for (state, filled), y in zip(rows, (below - 12, below + 96), strict=True):
        svg.text(x, y - 24, f"target KV slots {state}", weight=600)
        for slot, name in enumerate(slots):
            svg.note(x + 20 + 44 * slot, y - 6, name, 9.5)
            svg.chip(x + 44 * slot, y, 41, 24, "", "none")
        for slot, row in enumerate(filled):
            svg.chip(x + 44 * slot, y, 41, 24, words[row], colours[row])
            if slot != row:  # moved to its canonical slot
                start, end = (x + 20 + 44 * row, y - 81), (x + 34 + 44 * slot, y - 16)
                svg.line(start, end, colour="target", width=2.4)
    return svg


def draw_step(step: SimpleNamespace) -> Svg:
    """The loop of a step, and what goes into the pool and out of it."""
    nodes, tokens = len(step.words) - 1, len(step.path)
    svg = Svg(392, "One step", f"in numbers of the example: {tokens} tokens of one target forward")
    boxes = (
        ("draft", "1 Draft", f"a forward of {len(step.round.words)} rows", f"γ = {GAMMA} tokens"),
        ("phrase", "2 Lengthen", f"K = {K} suffixes, β = {BETA}", f"a tree of {nodes} nodes"),
        ("target", "3 Verify", f"a forward of {nodes + 1} rows", "under the tree mask"),
        ("text", "4 Accept", f"{tokens - 1} nodes, 1 bonus token", "KV to canonical slots"),
    )
    for i, (colour, *lines) in enumerate(boxes):
        svg.rect(28 + 217 * i, 112, 193, 82, COLOURS[colour], 10, 1.6)
        for j, line in enumerate(lines):
            svg.text(44 + 217 * i, 138 + 20 * j, line, 12 if j else 15, weight=400 if j else 600)
        end = [(241 + 217 * i, 153)] if i < 3 else [(886, 153), (886, 86), (124, 86), (124, 108)]
        svg.line((222 + 217 * i, 153), *end, width=2)
    svg.note(505, 80, "the next step begins at the bonus token", 11)
    svg.rect(28, 296, 844, 64, COLOURS["phrase"], 10, 1.6)
    svg.text(44, 323, "Phrase pool", 15, weight=600)
    svg.text(44, 344, "up to G phrases, of up to β tokens, behind a key of 1, 2, 4, 8 or 24 tokens")
    flows = (
        (44, 1, "phrase", "guesses for the", "current token"),
        (150, 0, "window", "phrases of", "the window"),
        (290, 1, "phrase", "phrases of the", "chain's last token"),
        (507, 0, "target", "5 the target's tokens", "along the tree"),
        (724, 0, "text", "6 history: prompts", "and outputs"),
    )
    for x, up, colour, *lines in flows:
        svg.line((x, 295 if up else 195), (x, 199 if up else 292), colour=colour, width=2)
        for j, line in enumerate(lines):
            svg.text(x + 9, 241 + 16 * j, line, 11, COLOURS[colour][1])
    return svg


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("docs/method"))
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    request = Request()
    _, step = request.step(), request.step()  # the first fills the window
    figures = {"draft-forward": draw_forward, "verification": draw_verification, "step": draw_step}
    for name, draw in figures.items():
        (out / f"{name}.svg").write_text("\n".join([*draw(step).parts, "</svg>\n"]), "utf-8")


if __name__ == "__main__":
    main()
