"""Unit tests of scripts/train/train_head.py and its helpers."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

SCRIPTS = Path(__file__).resolve().parents[3] / "scripts" / "train"
sys.path.insert(0, str(SCRIPTS))

import head_compare  # noqa: E402
import head_loss  # noqa: E402
import head_model  # noqa: E402
import head_target  # noqa: E402
import pair_samples  # noqa: E402
import train_head  # noqa: E402
from head_model import Arm  # noqa: E402

from ..helpers.head_reference import reference  # noqa: E402

TINY = Path(__file__).resolve().parents[3] / "vllm_ouroboros/assets/tiny-code/target"
SHAPE = head_model.HeadShape(
    hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2,
    head_dim=8, rope_theta=10000.0, rms_norm_eps=1e-5,
)  # fmt: skip


@pytest.fixture(autouse=True)
def one_thread():
    """Toy tensors are faster on one thread, and the machine may be busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


def batch_of(rows: int, tokens: int, vocabulary: int = 64) -> head_loss.Batch:
    counts = torch.ones(rows, tokens - 1, dtype=torch.bool)
    counts[:, :3] = False
    return head_loss.Batch(
        torch.randint(0, vocabulary, (rows, tokens)), torch.randn(rows, tokens, 32), counts
    )


def teacher(vocabulary: int = 64, drafted: int = 40) -> head_loss.Teacher:
    ids = torch.randperm(vocabulary)[:drafted].sort().values
    return head_loss.Teacher(torch.randn(vocabulary, 32), torch.randn(vocabulary, 32)[ids], ids)


@pytest.mark.parametrize("arm", list(Arm))
def test_a_head_computes_the_formulas(arm: Arm) -> None:
    head = head_model.Head(replace(SHAPE, arm=arm))
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    e, f = torch.randn(2, 9, 32), torch.randn(2, 9, 32)
    out = head(e, f)
    for row in range(2):
        logit, feature = reference(head.state_dict(), e[row], f[row])
        torch.testing.assert_close(out.logit[row].double(), logit, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(out.feature[row].double(), feature, atol=1e-5, rtol=1e-5)
    assert torch.equal(out.logit, out.feature) == (not arm.splits_output)


@pytest.mark.parametrize("arm", [Arm.eagle, Arm.fspad])
def test_checkpoints_have_the_scale_of_embeddings_in_their_weights(arm: Arm) -> None:
    shape = replace(SHAPE, arm=arm)
    scaled = head_model.Head(shape, 17.0)
    for parameter in scaled.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    plain, again = head_model.Head(shape), head_model.Head(shape, 5.0)
    plain.load_weights(scaled.weights())
    again.load_weights(scaled.weights())
    e, f = 0.1 * torch.randn(2, 9, 32), torch.randn(2, 9, 32)
    for head in (plain, again):
        torch.testing.assert_close(head(e, f).logit, scaled(e, f).logit, atol=1e-4, rtol=1e-4)
    assert torch.equal(plain.weights()["fc.fc.weight"], scaled.weights()["fc.fc.weight"])


def test_a_head_begins_with_the_feature_it_reads() -> None:
    head = head_model.Head(SHAPE)
    f = torch.randn(2, 9, 32)
    out = head(torch.zeros_like(f), f)
    torch.testing.assert_close(out.feature, f + head.fc.fc.bias)


def test_arms_differ_in_what_their_names_say() -> None:
    sizes = {
        arm: sum(p.numel() for p in head_model.Head(replace(SHAPE, arm=arm)).parameters())
        for arm in Arm
    }
    assert sizes[Arm.eagle] < sizes[Arm.partial_alignment] < sizes[Arm.feature_sampling]
    assert sizes[Arm.feature_sampling] < sizes[Arm.fspad]
    assert abs(sizes[Arm.eagle_wide] / sizes[Arm.fspad] - 1) < 0.01


def test_features_and_confidence_are_aligned_on_halves_of_their_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    head = head_model.Head(SHAPE)
    down = head.layers[0].mlp.down_proj.weight
    for weight, touched in (("TOKEN_WEIGHT", slice(32, 64)), ("FEATURE_WEIGHT", slice(0, 32))):
        monkeypatch.setattr(head_loss, "TOKEN_WEIGHT", 0.1)
        monkeypatch.setattr(head_loss, "FEATURE_WEIGHT", 1.0)
        monkeypatch.setattr(head_loss, weight, 0.0)
        head.zero_grad()
        head_loss.head_loss(head, teacher(), batch_of(2, 12)).backward()
        rest = torch.ones(64, dtype=torch.bool)
        rest[touched] = False
        assert down.grad[touched].abs().sum() > 0
        assert down.grad[rest].abs().sum() == 0


def test_later_passes_read_what_the_head_predicted() -> None:
    """Pass by pass over a text, and one token at a time as drafting does, are the same."""
    head = head_model.Head(SHAPE).double()
    e, f = torch.randn(1, 10, 32).double(), torch.randn(1, 10, 32).double()
    earlier: list = []
    inputs, outs = f, []
    for _ in range(3):
        outs.append(head(e, inputs, earlier))
        inputs = torch.cat((f[:, :1], outs[-1].feature[:, :-1]), 1)
    for start in range(3, 8):  # the first row that reads the target's feature last
        features = f[:, : start + 1]
        for n in range(3):
            out = head(e[:, : start + 1 + n], features)
            torch.testing.assert_close(out.logit[:, -1], outs[n].logit[:, start + n])
            features = torch.cat((features, out.feature[:, -1:]), 1)


@pytest.mark.parametrize("drafted", [40, 64])
def test_trees_end_at_the_first_token_that_they_do_not_have(drafted: int) -> None:
    head, given = head_model.Head(SHAPE), batch_of(1, 10)
    ends = teacher(drafted=drafted)
    widths = 1, 8, 300
    expected = torch.zeros(3, 4, dtype=torch.long)
    for start in range(3, 7):
        features, product, accepted = given.before[:, : start + 1], 1.0, [0, 0, 0]
        for n in range(3):
            embeddings = ends.embeddings[given.tokens[:, : start + 1 + n]]
            out = head(embeddings, features)
            order = ends.ids[(out.logit[0, -1] @ ends.lm_head.T).argsort(descending=True)].tolist()
            token = int(given.tokens[0, start + 1 + n])
            product *= 1 + order.index(token) if token in order else float("inf")
            accepted = [n + (product <= w) for n, w in zip(accepted, widths, strict=True)]
            features = torch.cat((features, out.feature[:, -1:]), 1)
        for counts, n in zip(expected, accepted, strict=True):
            counts[n] += 1
    found = head_loss.accepted_counts(head, ends, given, 3, widths)
    assert found.tolist() == [expected.tolist()]
    assert expected[2, 1:].sum() > 0


def test_a_head_begins_with_the_looks_of_the_last_layer_and_adds_nothing() -> None:
    model = head_target.load_target(str(TINY), "cpu").float()
    shape = head_target.head_shape(model.config, Arm.eagle_wide)
    head = head_model.Head(shape)
    head_target.begin_as_last_layer(head, model)
    layer, own = model.model.layers[-1], head.layers[0]
    states = torch.randn(5, shape.hidden_size)
    feature = model.model.norm(states)
    wanted = layer.self_attn.q_proj(layer.input_layernorm(states))
    torch.testing.assert_close(own.self_attn.q_proj(feature), wanted, atol=1e-4, rtol=1e-4)
    assert own.mlp.gate_proj.weight[: model.config.intermediate_size].equal(
        layer.mlp.gate_proj.weight
    )
    embeddings = torch.zeros(1, 5, shape.hidden_size)
    head.fc.fc.bias.data.zero_()
    torch.testing.assert_close(head(embeddings, feature[None]).feature[0], feature)


def test_the_tokens_that_may_be_drafted_are_the_most_frequent_in_answers() -> None:
    samples = pair_samples.Samples.from_lists([[1, 1, 1, 5, 6, 6], [2, 6, 7, 5]], [3, 1])
    assert head_target.frequent_tokens(samples, 9, 2).tolist() == [5, 6]


def test_features_go_on_where_they_end_and_do_not_see_padding(tmp_path: Path) -> None:
    model = head_target.load_target(str(TINY), "cpu").float()
    rows = [np.random.default_rng(n).integers(2, 4000, n).tolist() for n in (5, 9, 7, 12)]
    samples = pair_samples.Samples.from_lists(rows, [1, 2, 3, 0])
    model.config.hidden_size = 256
    found = head_target.Features(tmp_path / "f", samples, 256)
    found.write(model, batch_tokens=20)
    whole = found.path.read_bytes()
    found.path.write_bytes(whole[: 2 * 256 * 6 + 10])  # ends within the second text
    found.write(model, batch_tokens=20)
    assert found.written == 33
    batch = found.batch([0, 1], "cpu")
    for features, row in zip(batch.features, rows[:2], strict=True):
        alone = model.model(input_ids=torch.tensor([row])).last_hidden_state
        torch.testing.assert_close(features[: len(row)], alone[0], atol=0.05, rtol=0.05)
    assert batch.counts.tolist() == [[True] * 4 + [False] * 4, [False] + [True] * 7]
    whole = found.batch([0, 1], "cpu", prompts=True).counts
    assert whole.tolist() == [[True] * 4 + [False] * 4, [True] * 8]


def test_heads_are_compared_text_by_text(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    easy = rng.integers(1, 9, (40, 1, 1))  # texts differ much, heads little
    for name, arm, seed, more in (("a", "eagle", 0, 0), ("b", "fspad", 0, 2), ("c", "fspad", 1, 4)):
        counts = np.concatenate((10 * easy - more, 10 * easy, 10 * easy + more), 2)
        np.save(head_compare.tallies_path(tmp_path, name), counts)
        with (tmp_path / "heads.jsonl").open("a") as file:
            file.write(json.dumps({"name": name, "arm": arm, "passes": 1, "seed": seed}) + "\n")
    base, better = head_compare.compare(tmp_path, ("eagle", 1), 0)
    assert base.kind == ("eagle", 1) and base.difference == base.low == base.high == 0
    assert base.accepted == pytest.approx(1.0)
    drafts = 30 * easy.sum()
    assert better.seeds == 2 and better.accepted == pytest.approx(1 + 3 * 2 * 40 / drafts)
    assert 0 < better.low < better.difference < better.high < 0.2
    with pytest.raises(head_compare.PairError, match="no head of eagle with 2 passes"):
        head_compare.compare(tmp_path, ("eagle", 2), 0)


def test_a_head_is_trained_resumed_and_exported(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    lines = [
        {"prompt": rng.integers(2, 99, 20).tolist(), "answer": rng.integers(2, 99, 20).tolist()}
        for _ in range(150)
    ]
    work = tmp_path / "work"
    work.mkdir()
    (work / "conversations.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    common = ["--target", str(TINY), "--work", str(work)]

    def run(*args: str) -> None:
        result = CliRunner().invoke(train_head.app, [args[0], *common, *args[1:]])
        assert result.exit_code == 0, result.output

    run("features", "--threads", "1")
    options = "--max-steps", "2", "--batch-tokens", "400", "--vocabulary", "64", "--threads", "1"
    run("train", "--accumulate", "2", "--passes", "2", *options)
    record = json.loads((work / "heads.jsonl").read_text())
    assert record["steps"] == 2 and len(record["agreement"]) == 5
    assert record["chain"] <= record["tree"]
    run("train", "--name", "wide", "--arm", "eagle", *options)
    compared = CliRunner().invoke(
        train_head.app, ["compare", "--work", str(work), "--baseline", "fspad", "--passes", "2"]
    )
    assert compared.exit_code == 0 and compared.output.count("eagle") == 2, compared.output
    run("export", "--out", str(tmp_path / "head"))
    config = json.loads((tmp_path / "head/config.json").read_text())
    assert config["architectures"] == ["EagleFSPADLlamaForCausalLM"]
    tensors = load_file(tmp_path / "head/model.safetensors")
    ids = tensors["d2t"] + torch.arange(64)
    assert (ids.diff() > 0).all() and ids.max() < 4096
    assert tensors["layers.0.mlp.down_proj.weight"].shape == (512, 704)
    run("train", "--name", "more", "--start", str(tmp_path / "head"), "--max-steps", "0",
        "--vocabulary", "64", "--threads", "1")  # fmt: skip
    run("export", "--name", "more", "--out", str(tmp_path / "more"))
    kept = load_file(tmp_path / "more/model.safetensors")
    assert kept.keys() == tensors.keys()
    assert all(torch.equal(kept[name], tensors[name]) for name in kept)
