"""What a draft head is trained on: the target's next feature, and its next token."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from head_model import Head
from pair_loss import mixed_loss
from torch import Tensor

FEATURE_WEIGHT, TOKEN_WEIGHT = 1.0, 0.1  # of arXiv 2408.15562 and of EAGLE


@dataclass(frozen=True)
class Teacher:
    """The target's frozen ends.

    Attributes:
        embeddings: [vocab, hidden].
        lm_head: [draft vocab, hidden], rows of the tokens that may be drafted.
        ids: int64 [draft vocab], their ids.
    """

    embeddings: Tensor
    lm_head: Tensor
    ids: Tensor


@dataclass(frozen=True)
class Batch:
    """Some texts and the target's features of them.

    Row i of a head reads token i and the feature before it, and predicts feature i, whose LM head
    gives token i + 1. There is no feature before the first token: it is zero.

    Attributes:
        tokens: int64 [rows, T].
        features: [rows, T, hidden].
        counts: bool [rows, T - 1], rows whose prediction counts.
    """

    tokens: Tensor
    features: Tensor
    counts: Tensor

    @property
    def before(self) -> Tensor:
        """The feature before each row's token, [rows, T - 1, hidden]."""
        return F.pad(self.features[:, :-2], (0, 0, 1, 0))

    @property
    def predicted(self) -> Tensor:
        """The feature that each row predicts, [rows, T - 1, hidden]."""
        return self.features[:, :-1]

    @property
    def next_tokens(self) -> Tensor:
        """The token that each row predicts, [rows, T - 1]."""
        return self.tokens[:, 1:]


def head_loss(
    head: Head, teacher: Teacher, batch: Batch, passes: int = 1, noise: float = 0.0
) -> Tensor:
    """Mean over passes of the loss of one batch.

    A later pass reads the features that the one before it predicted, as drafting does (HASS,
    arXiv 2408.15766; training-time test of EAGLE-3, arXiv 2503.01840). Half of the time the first
    row is left out, as stock vLLM does, and one feature of each text is missing, as behind a hit
    of the prefix cache.

    Args:
        head: is trained.
        teacher: gives embeddings and LM head.
        batch: T tokens a row.
        passes: how many.
        noise: half the width of the uniform noise on the target's features.
    """
    true = batch.before
    inputs = true + noise * (2 * torch.rand_like(true) - 1) if noise else true.clone()
    rows = len(inputs)
    absent = torch.randint(1, inputs.shape[1], (rows,), device=inputs.device)
    absent[torch.rand(rows, device=inputs.device) < 0.5] = 0
    inputs[torch.arange(rows, device=inputs.device), absent] = 0
    inputs[:, 0] = 0
    first = int(torch.rand(()) < 0.5)
    inputs, true = inputs[:, first:], true[:, first:]
    at = torch.arange(inputs.shape[1], device=inputs.device)
    embeddings = teacher.embeddings[batch.tokens[:, first:-1]]
    earlier: list[tuple[Tensor, Tensor]] = []
    losses = []
    for n in range(passes):
        out = head(embeddings, inputs, earlier)
        counts = batch.counts[:, first:] & (at >= n)
        wanted = batch.predicted[:, first:][counts]
        regression = F.smooth_l1_loss(out.feature[counts].float(), wanted.float())
        labels = torch.zeros(1, len(wanted), dtype=torch.long, device=wanted.device)
        confidence = mixed_loss(
            out.logit[counts][None], teacher.lm_head, labels, wanted[None], teacher.lm_head, 1.0
        )
        losses.append(FEATURE_WEIGHT * regression + TOKEN_WEIGHT * confidence)
        inputs = torch.cat((true[:, :1], out.feature[:, :-1]), 1)
    return torch.stack(losses).mean()


@torch.no_grad()
def accepted_counts(
    head: Head, teacher: Teacher, batch: Batch, length: int, widths: tuple[int, ...]
) -> Tensor:
    """Counts int64 [rows, widths, length + 1] of trees by how many of their tokens the text has.

    A tree begins at every row that counts. It has the paths of tokens whose ranks, from 1 on,
    multiply to no more than its width: width 1 is the chain, 3 a tree of 35 nodes if ``length`` is
    5. The n-th pass predicts the n-th token of a path, given that those before it were right.
    """
    embeddings = teacher.embeddings[batch.tokens[:, :-1]]
    true, text = batch.before, batch.next_tokens
    earlier: list[tuple[Tensor, Tensor]] = []
    inputs, ranks = true, []
    for _ in range(length):
        out = head(embeddings, inputs, earlier)
        ranks.append(_ranks(out.logit @ teacher.lm_head.T, teacher.ids, text))
        inputs = torch.cat((true[:, :1], out.feature[:, :-1]), 1)
    starts = batch.counts[:, : text.shape[1] - length + 1]
    counts = []
    for width in widths:
        product = torch.ones_like(starts, dtype=torch.double)
        accepted = torch.zeros_like(starts, dtype=torch.long)
        for n, rank in enumerate(ranks):
            product *= rank[:, n : n + starts.shape[1]]
            accepted += product <= width
        counts.append((F.one_hot(accepted, length + 1) * starts[..., None]).sum(1))
    return torch.stack(counts, 1)


def _ranks(logits: Tensor, ids: Tensor, text: Tensor) -> Tensor:
    """Rank float64 [rows, T] of the text's token among logits [rows, T, draft vocab], from 1 on.

    Infinite where the token is none of ``ids`` int64 [draft vocab], which ascend.
    """
    at = torch.searchsorted(ids, text.contiguous()).clamp(max=len(ids) - 1)
    own = logits.gather(-1, at[..., None])
    rank = 1 + (logits > own).sum(-1).double()
    return rank.masked_fill(ids[at] != text, torch.inf)
