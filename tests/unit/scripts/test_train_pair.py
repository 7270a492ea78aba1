"""Unit tests of scripts/train/train_pair.py and its helpers."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

SCRIPTS = Path(__file__).resolve().parents[3] / "scripts" / "train"
sys.path.insert(0, str(SCRIPTS))

import pair_data  # noqa: E402
import pair_eval  # noqa: E402
import pair_generate  # noqa: E402
import pair_loss  # noqa: E402
import pair_model  # noqa: E402
import pair_samples  # noqa: E402
import pair_stages  # noqa: E402
import pair_train  # noqa: E402
import train_pair  # noqa: E402

from vllm_ouroboros.cli.loops import loops, max_ngram_count  # noqa: E402

SHAPE = pair_model.Shape(64, 2, 2, 1, 96, vocab_size=300, head_dim=32, max_position_embeddings=512)

SOURCE = '''
import os

def one_line(): return 1

@decorated
def top(a, b):
    """Adds."""
    # a comment
    return a + b

class Thing:
    async def method(self):
        """Doc,
        in two lines.
        """
        def inner(x):
            y = x
            return y
        return inner

    def test_without_docstring(self):
        assert self
        assert True
'''


@pytest.fixture(autouse=True)
def one_thread():
    """Toy tensors are faster on one thread, and the machine may be busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def tiny() -> pair_model.Llama:
    torch.manual_seed(0)
    return pair_model.Llama(SHAPE)


def toy_samples(count: int = 24) -> pair_samples.Samples:
    rng = np.random.default_rng(0)
    rows = [[0, *rng.integers(2, 300, 10 + i % 5).tolist(), 1] for i in range(count)]
    return pair_samples.Samples.from_lists(rows, [9] * count)


def test_extracts_dedented_functions_with_their_prompts():
    functions = {f.text.split("(")[0]: f for f in pair_data.extract_functions(SOURCE)}
    assert set(functions) == {"def top", "async def method"}
    assert functions["def top"].prompt == 'def top(a, b):\n    """Adds."""'
    assert functions["def top"].text.endswith("# a comment\n    return a + b")
    method = functions["async def method"]
    assert method.prompt.endswith('\n    """Doc,\n    in two lines.\n    """')
    assert "\n        return y\n    return inner" in method.text


@pytest.mark.parametrize("source", ["print 'python 2'", "def f(:\n", "x = '\\0'"])
def test_files_without_functions_or_python_3_give_nothing(source: str):
    assert pair_data.extract_functions(source) == []


@pytest.mark.parametrize("body_lines, kept", [(1, False), (2, True), (49, True), (50, False)])
def test_keeps_functions_of_3_to_50_lines(body_lines: int, kept: bool):
    source = "def f(x):\n" + "    x += 1\n" * body_lines
    assert bool(pair_data.extract_functions(source)) is kept


def test_reads_each_distinct_function_once(tmp_path: Path):
    for name in ("a.py", "b.py"):
        (tmp_path / name).write_text(SOURCE)
    assert len(list(pair_data.read_functions([tmp_path], workers=1))) == 2


def test_missing_source_names_option_value_and_fix(tmp_path: Path):
    with pytest.raises(pair_data.PairError, match=r"--sources: '.*nowhere'.*directory"):
        list(pair_data.read_functions([tmp_path / "nowhere"], workers=1))


PROMPT = 'def f(a):\n    """Doc."""'


@pytest.mark.parametrize(
    "text, prompt, excluded",
    [
        (PROMPT + "\n    return a", PROMPT, True),
        (PROMPT + "\n    return [a]", PROMPT, True),
        ("async " + PROMPT + "\n    return a", "async " + PROMPT, True),
        ('def f(a):\n  """Doc."""\n  return a', 'def f(a):\n  """Doc."""', True),  # other indent
        ('def f(a):\n    """Other."""\n    return a', 'def f(a):\n    """Other."""', False),
        ("def f(a):\n    b = a\n    return b", "", False),
        ('def f(a, b):\n    """Doc."""\n    return a', 'def f(a, b):\n    """Doc."""', False),
    ],
)
def test_exclusion(text: str, prompt: str, excluded: bool):
    exclusion = pair_data.Exclusion(["import os\n\n" + PROMPT + "\n"])
    assert (pair_data.Function(text, prompt) in exclusion) is excluded


def test_exclusion_reads_prompt_files_and_refuses_others(tmp_path: Path):
    good, bad = tmp_path / "good.jsonl", tmp_path / "bad.jsonl"
    good.write_text(json.dumps({"id": "x", "prompt": PROMPT}) + "\n")
    bad.write_text('{"text": 1}\n')
    assert pair_data.Function(PROMPT, PROMPT) in pair_data.Exclusion.from_files([good])
    with pytest.raises(pair_data.PairError, match=r'bad\.jsonl.*"prompt"'):
        pair_data.Exclusion.from_files([bad])


def test_held_out_split_keeps_versions_of_a_function_together():
    functions = [
        pair_data.Function(f'def f{i}():\n    """D."""\n    {body}', f'def f{i}():\n    """D."""')
        for i in range(400)
        for body in ("pass", "return 1")
    ]
    held = [pair_data.is_held_out(f, one_in=10) for f in functions]
    assert held[0::2] == held[1::2]
    assert 0.05 < np.mean(held) < 0.15


def test_tokenizer_makes_line_break_and_indentation_one_token():
    text = "def f(x12):\n    if x12:\n        return x12\n\n    return not(-1)"
    tokenizer = pair_data.build_tokenizer([text] * 20, 320)
    pieces = [piece for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text)]
    assert {"Ċ" + "Ġ" * 4, "Ċ" + "Ġ" * 8, "ĊĊ" + "Ġ" * 4} <= set(pieces)
    assert [p for p in pieces if p.isdigit()] == ["1", "2", "1", "2", "1", "2", "1"]
    assert "Ġx" in pieces and "(-" in pieces
    ids = tokenizer.encode(text).ids
    assert tokenizer.token_to_id("Ċ" + "Ġ" * 8) in ids
    assert tokenizer.decode(ids) == text
    assert [tokenizer.token_to_id(t) for t in ("<s>", "</s>")] == [0, 1]
    assert pair_data.add_bos(tokenizer).encode(text).ids == [0, *ids]


def test_loop_metric_counts_4_grams_beyond_8():
    assert max_ngram_count([1, 2, 3]) == 0
    assert max_ngram_count([1, 2, 3, 4] * 8) == 8
    assert not loops([1, 2, 3, 4] * 8)
    assert loops([1, 2, 3, 4] * 9)
    assert not loops(list(range(300)))


def test_repeated_positions_spare_the_first_occurrences():
    text = [5, 6, 7, 8] * 4
    assert pair_stages.repeated_positions(text, allowed=2) == list(range(11, 16))
    assert pair_stages.repeated_positions(list(range(20)), allowed=1) == []


def test_batches_cover_the_samples_within_the_token_budget():
    samples = toy_samples()
    stream = pair_samples.batches(samples, batch_tokens=64, seed=0)
    seen: list[int] = []
    while len(seen) < len(samples):
        batch = next(stream)
        assert len(batch) * max(samples.lengths[batch]) <= 64
        seen += batch
    assert sorted(seen) == list(range(len(samples)))


def test_labels_leave_out_prompts_and_padding():
    inputs, labels = pair_samples.pad_rows([np.array([0, 5, 6, 1]), np.array([0, 7, 1])], [2, 0])
    assert inputs.tolist() == [[0, 5, 6], [0, 7, 0]]
    assert labels.tolist() == [[-100, 6, 1], [7, 1, -100]]


def test_mixed_loss_and_its_gradient_equal_autograd(tiny: pair_model.Llama):
    torch.manual_seed(1)
    hidden = torch.randn(2, 7, 64, requires_grad=True)
    weight = torch.randn(300, 64, requires_grad=True)
    teacher, teacher_weight = torch.randn(2, 7, 32), torch.randn(300, 32)
    labels = torch.randint(0, 300, (2, 7))
    labels[0, :3] = -100
    loss = pair_loss.mixed_loss(hidden, weight, labels, teacher, teacher_weight, soft=0.7)
    gradients = torch.autograd.grad(loss, [hidden, weight])
    real = labels >= 0
    log_p = (hidden[real] @ weight.T).log_softmax(-1)
    log_q = (teacher[real] @ teacher_weight.T).log_softmax(-1)
    expected = 0.7 * torch.nn.functional.kl_div(
        log_p, log_q, reduction="batchmean", log_target=True
    )
    expected = expected + 0.3 * torch.nn.functional.nll_loss(log_p, labels[real])
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradients, torch.autograd.grad(expected, [hidden, weight]))


def test_generation_with_padding_and_cache_equals_full_forward(tiny: pair_model.Llama):
    prompts = [[0, 5, 6, 7, 8], [0, 9], [0, 10, 11]]
    for prompt, text in zip(prompts, pair_generate.generate(tiny, prompts, 12), strict=True):
        for end in range(len(text)):
            logits = tiny.logits(tiny(torch.tensor([prompt + text[:end]]))[0, -1])
            assert logits.argmax().item() == text[end]


def test_generation_stops_a_row_that_cycles(tiny: pair_model.Llama):
    with torch.no_grad():
        tiny.embed_tokens.weight.zero_()  # equal logits: token 0 for ever
    assert [len(t) for t in pair_generate.generate(tiny, [[0, 5]], 200, stop_cycle=16)] == [48]
    assert [len(t) for t in pair_generate.generate(tiny, [[0, 5]], 200)] == [200]


def test_a_model_that_ends_at_once_is_seen_as_such(tiny: pair_model.Llama):
    with torch.no_grad():
        tiny.norm.weight.zero_()  # logits 0: token 0 everywhere, for target and draft
    result, texts = pair_eval.evaluate(tiny, tiny, [[0, 5], [0, 6, 7]], max_new=16)
    assert texts == [[0] * 16] * 2
    assert (result.ended, result.looping, result.agreement) == (0.0, 1.0, 1.0)
    assert (result.agreement_clean, result.positions) == (0.0, 32)


def test_unlikelihood_steps_shorten_loops(tiny: pair_model.Llama):
    samples = toy_samples()
    settings = pair_train.Settings("unloop", minutes=1.0, batch_tokens=64)
    prompts = samples.prompts(1, 20)

    def repetitions() -> int:
        texts = pair_generate.generate(tiny, prompts, 24)
        return sum(len(pair_stages.repeated_positions(text, allowed=2)) for text in texts)

    before = repetitions()
    optimizer = pair_train.Optimizer(tiny, settings)
    step = pair_stages.unloop_steps(tiny, samples, settings, max_new=24, batch=8, weight=10.0)
    for _ in range(15):
        step()[0].backward()
        optimizer.step(1.0)
    assert before > 100 and repetitions() < before / 2


def run(*arguments: str | Path) -> str:
    result = CliRunner().invoke(train_pair.app, [str(a) for a in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.output


def test_two_steps_of_every_stage_make_a_loadable_pair(tmp_path: Path, monkeypatch):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    sources, work, pair = tmp_path / "sources", tmp_path / "work", tmp_path / "pair"
    sources.mkdir()
    text = "".join(
        f'def name_{i}(a, b):\n    """Adds {i}."""\n    c = a + {i}\n    return c * b\n\n'
        for i in range(600)
    )
    (sources / "toy.py").write_text(text)
    monkeypatch.setattr(train_pair, "TARGET_SHAPE", SHAPE)
    monkeypatch.setattr(train_pair, "DRAFT_SHAPE", SHAPE)
    run("corpus", "--work", work, "--sources", sources, "--vocab-size", 300, "--workers", 1)
    for stage in ("target", "unloop", "draft"):
        extra = [] if stage == "target" else ["--max-new", 16]
        run(stage, "--work", work, "--minutes", 5, "--max-steps", 2, "--threads", 1, *extra)
    run("export", "--work", work, "--out", pair, "--limit", 4, "--threads", 1, "--note", "A note.")

    report = run("evaluate", pair, "--prompts", work / "held_out.jsonl", "--limit", 2, "--show", 1)
    assert '"prompts": 2' in report and "def name_" in report
    card = (pair / "CARD.md").read_text()
    assert "held-out functions" in card and "\nA note.\n" in card and card.count("| 2 |") == 3
    for name in ("target", "draft"):
        tokenizer = AutoTokenizer.from_pretrained(pair / name)
        model = AutoModelForCausalLM.from_pretrained(pair / name)
        assert model.dtype == torch.bfloat16
        ids = tokenizer("def name_1(a, b):", return_tensors="pt").input_ids
        assert ids[0, 0] == pair_data.BOS_ID and ids[0, 1] != pair_data.BOS_ID
        ours = pair_model.load_model(pair / name)
        with torch.no_grad():
            expected = model.float()(ids).logits
            torch.testing.assert_close(ours.logits(ours(ids)), expected, rtol=1e-4, atol=1e-4)
    # A second pair may go on from the first one: same tokenizer, same weights.
    run("corpus", "--work", tmp_path / "next", "--sources", sources, "--init-from", pair)
    assert (tmp_path / "next/init/target/model.safetensors").read_bytes() == (
        pair / "target/model.safetensors"
    ).read_bytes()


def test_training_resumes_from_its_checkpoint(tiny: pair_model.Llama, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(pair_train, "CHECKPOINT_SECONDS", -1.0)
    samples = toy_samples()
    settings = pair_train.Settings("target", minutes=5.0, batch_tokens=64, max_steps=4)
    steps = pair_stages.target_steps(tiny, samples, settings)

    def stop_after_two() -> pair_train.Step:
        if (tmp_path / "target.checkpoint.pt").exists() and saved()["steps"] == 2:
            raise KeyboardInterrupt
        return steps()

    def saved() -> dict:
        return torch.load(tmp_path / "target.checkpoint.pt")["record"]

    with pytest.raises(KeyboardInterrupt):
        pair_train.train(tiny, settings, stop_after_two, lambda: 0.0, tmp_path)
    record = pair_train.train(tiny, settings, steps, lambda: 0.0, tmp_path)
    assert record.steps == 4 and (tmp_path / "target.pt").exists()
    assert not (tmp_path / "target.checkpoint.pt").exists()


def test_stage_without_corpus_says_what_to_run(tmp_path: Path):
    with pytest.raises(pair_data.PairError, match=r"--work: .*corpus command"):
        run("target", "--work", tmp_path)
