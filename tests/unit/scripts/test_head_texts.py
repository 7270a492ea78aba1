"""Unit tests of the texts that draft heads are trained on, and of what users ask about them."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

from transformers import AutoTokenizer

SCRIPTS = Path(__file__).resolve().parents[3] / "scripts" / "train"
sys.path.insert(0, str(SCRIPTS))

import head_data  # noqa: E402
import head_prompts  # noqa: E402
import head_texts  # noqa: E402

TINY = Path(__file__).resolve().parents[3] / "vllm_ouroboros/assets/tiny-code/target"


def test_training_text_has_no_repeats_and_whole_conversations_are_held_out(tmp_path: Path) -> None:
    path = tmp_path / "conversations.jsonl"
    lines = []
    for i in range(300):
        opening = [7] * 30 + [i % 250] + [9] * 40
        prompt = opening + ([5, i] if i >= 250 else [])
        answer = [1, 2, 3, 4] * 20 if i == 3 else [*range(i, i + 20)]
        lines.append({"prompt": prompt, "answer": answer})
    path.write_text("".join(json.dumps(line) + "\n" for line in [*lines, lines[0]]))
    training, held_out = head_data.split(path, max_tokens=82, share=15)
    assert len(training) + len(held_out) == 299
    assert max(training.lengths) == 82
    first = {int(one[30]) for one in (training[i] for i in range(len(training)))}
    assert first.isdisjoint({int(held_out[i][30]) for i in range(len(held_out))})


def test_user_turns_are_the_same_each_time_and_of_all_kinds(tmp_path: Path) -> None:
    written = []
    for name in "ab":
        head_prompts.main(tmp_path / name, count=80, seed=3)
        written.append((tmp_path / name).read_text())
    assert written[0] == written[1]
    turns = [json.loads(line)["prompt"] for line in written[0].splitlines()]
    assert 70 < len(set(turns)) <= 80
    assert 10 < sum("```python" in turn for turn in turns) < 40
    assert any("Write a Python function" in turn for turn in turns)
    head_prompts.main(tmp_path / "code", count=30, code=True)
    texts = [json.loads(line)["prompt"] for line in (tmp_path / "code").read_text().splitlines()]
    assert len(texts) == 30 and sum("def " in text for text in texts) > 20


def test_user_turns_are_about_what_the_target_wrote(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    tokenizer.chat_template = (
        "{% for turn in messages %}<s>{{ turn.content }}</s>{% endfor %}"
        "{% if add_generation_prompt %}<s>{% endif %}"
    )
    chat = head_data.Chat(tokenizer)
    rng = random.Random(0)
    pairs = []
    for n in range(4):
        words = ["".join(rng.choices("abcdefgh", k=6)) for _ in range(40)]
        pairs.append((f"What is this thing, number {n}?", " ".join(words)))
    pairs.append(("Translate into French: a cat", "un chat"))
    lines = []
    for question, answer in [*pairs, ("Repeat a word.", "a word " * 20)]:
        prompt = [*chat.opening, *chat.encode(question), *chat.reply]
        lines.append({"prompt": prompt, "answer": chat.encode(answer)})
        later = [*prompt, *chat.encode(answer), *chat.next, *chat.encode("And?"), *chat.reply]
        lines.append({"prompt": later, "answer": chat.encode("Yes.")})
    path = tmp_path / "conversations.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert [*head_texts.answered(path, tokenizer)] == pairs
    turns = head_prompts.user_turns(300, rng, pairs)
    assert any("un chat" in turn for turn in turns)
    documents = [turn for turn in turns if "\n\n[3] " in turn]
    assert documents and all("What is this thing, number" in turn for turn in documents)
