"""Following a request's prediction: where in it the text stands (compiled)."""

from __future__ import annotations

from vllm_ouroboros.phrases.compiling import compiled

SURE_RUN = 3
"""Tokens in a row that came as predicted, from which on the next one is likely to."""
_REACH = 24
"""Tokens that are compared to find the place again."""


@compiled
def follow(req, s, text, committed):
    """Find the place in a request's prediction that comes next behind ``text[:committed]``.

    A text that leaves its prediction is taken to have another token in the place of one. Behind
    that the place is looked for by the last tokens of the text; of places that fit as well, the one
    nearest to where it should be is taken. Nothing is left before the first token has come.
    """
    length = req.predicted_len[s]
    place, run, seen = req.predicted_at[s], req.predicted_run[s], req.predicted_seen[s]
    if seen >= committed:
        return
    for i in range(seen, committed):
        if place < length and req.predicted[s, place] == text[i]:
            place += 1
            run += 1
        else:
            place += place > 0
            run = 0
    if run < SURE_RUN:
        longest, nearest = max(run, 1), place
        for end in range(1, length + 1):
            same = 0
            most = min(_REACH, end, committed)
            while same < most and req.predicted[s, end - 1 - same] == text[committed - 1 - same]:
                same += 1
            nearer = same == longest and longest > 1 and abs(end - place) < abs(nearest - place)
            if same > longest or nearer:
                longest, nearest, run = same, end, same
        place = nearest
    req.predicted_at[s], req.predicted_run[s] = place, run
    req.predicted_seen[s] = committed
