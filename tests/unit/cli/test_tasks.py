"""The shipped task set, and which prompts a chat model gets."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from vllm_ouroboros.cli.inputs import InputError
from vllm_ouroboros.cli.tasks import Task, has_chat_template, one_of_each, read_tasks

from ..helpers.cli_fakes import job

KINDS = [
    "chat", "translation", "summary", "qa", "math", "rag", "code", "edit", "json",
]  # fmt: skip


def test_the_shipped_set_has_nine_tasks_of_ten_or_more() -> None:
    tasks = read_tasks()
    assert [one.task for one in one_of_each(tasks)] == KINDS
    assert min(Counter(one.task for one in tasks).values()) >= 10
    assert len({one.id for one in tasks}) == len(tasks)
    assert len({one.turns for one in tasks}) == len(tasks)
    assert all(len(one.turns) > 1 for one in tasks if one.task == "chat")
    assert all(sum(map(len, one.turns)) < 4000 for one in tasks), "too long for a small model"


def test_one_of_each_is_the_first() -> None:
    tasks = [Task(f"{kind}{i}", kind, ("x",)) for kind in "ab" for i in range(3)]
    assert [one.id for one in one_of_each(tuple(tasks))] == ["a0", "b0"]


@pytest.mark.parametrize(
    "line, message",
    [
        ("{", "line 2 is no task"),
        ('{"id": "a", "task": "b"}', "line 2 is no task (KeyError"),
        ('{"id": "a", "task": "b", "turns": []}', '"turns" must be a list of texts'),
        ('{"id": "a", "task": "b", "turns": ["x", " "]}', "none of them empty"),
        ('["turns"]', "line 2 is no task"),
    ],
)
def test_a_line_that_is_no_task(tmp_path: Path, line: str, message: str) -> None:
    file = tmp_path / "tasks.jsonl"
    file.write_text(f"\n{line}\n")
    with pytest.raises(InputError) as found:
        read_tasks(file)
    assert message in str(found.value)
    assert "\n" not in str(found.value)
    with pytest.raises(InputError, match="no task set"):
        read_tasks(tmp_path / "nowhere.jsonl")


def test_a_chat_model_gets_tasks_and_another_one_texts(model: str) -> None:
    folder = Path(model)
    assert not has_chat_template(model)
    assert not job(model=model, prompts=None).chat
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ messages }}"}))
    assert has_chat_template(model)
    chat = job(model=model, prompts=None)
    assert chat.chat
    assert [name for name, _ in chat.prompts] == KINDS
    assert chat.engine(ouroboros=False).chat
    assert job(model=model, prompts=["x"]).prompts == (("prompt 1", "x"),)
    assert not job(model=model, prompts=None, chat=False).chat
    (folder / "tokenizer_config.json").write_text("[]")
    assert not has_chat_template(model)
    (folder / "chat_template.jinja").write_text("")
    assert has_chat_template(model)
