"""Custom logits processors, which vLLM refuses with its own speculation."""

from __future__ import annotations

import pytest
from vllm import SamplingParams

MODULE = '''
import torch
from vllm.v1.sample.logits_processor import AdapterLogitsProcessor, LogitsProcessor
from vllm.v1.sample.logits_processor.builtin import process_dict_updates


def no_echo(output_ids, logits):
    """Never the token before last, and every fifth token is token 40."""
    if len(output_ids) > 1:
        logits[output_ids[-2]] = float("-inf")
    if len(output_ids) % 5 == 4:
        logits[40] = 100.0
    return logits


class NoEcho(AdapterLogitsProcessor):
    def is_argmax_invariant(self):
        return False

    def new_req_logits_processor(self, params):
        return no_echo if (params.extra_args or {}).get("no_echo") else None


class Counting(LogitsProcessor):
    """Pushes token 30 more the more steps the engine has run: no function of the request."""

    def __init__(self, vllm_config, device, is_pin_memory):
        self.steps = 0

    def is_argmax_invariant(self):
        return False

    def update_state(self, batch_update):
        self.steps += 1

    def apply(self, logits):
        logits[:, 30] += 0.01 * self.steps
        return logits


class Banned(LogitsProcessor):
    """Bans the token that each request names."""

    ouroboros_stateless = True

    def __init__(self, vllm_config, device, is_pin_memory):
        self.banned = {}

    def is_argmax_invariant(self):
        return False

    def update_state(self, batch_update):
        process_dict_updates(
            self.banned, batch_update, lambda params, *_: (params.extra_args or {}).get("banned")
        )

    def apply(self, logits):
        for row, token in self.banned.items():
            logits[row, token] = float("-inf")
        return logits
'''


@pytest.fixture(scope="module")
def processors(tmp_path_factory):
    """Engines find the classes above as ``ouroboros_test_processors:NAME``."""
    folder = tmp_path_factory.mktemp("processors")
    (folder / "ouroboros_test_processors.py").write_text(MODULE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(folder))
        patch.syspath_prepend(str(folder))
        yield lambda *names: [f"ouroboros_test_processors:{name}" for name in names]


def requests(count: int) -> list[SamplingParams]:
    """Greedy and drawn; each kind of processor acts on some of them."""
    return [
        SamplingParams(
            temperature=0.8 * (i % 2),
            seed=i,
            max_tokens=32,
            extra_args={"no_echo": i % 3 != 0, **({"banned": 10 + i} if i % 4 else {})},
        )
        for i in range(count)
    ]


def test_processors_of_a_request_see_its_path(processors, ouroboros, vanilla, prompts, tools):
    arguments = {"logits_processors": processors("NoEcho", "Banned")}
    params = requests(16)
    expected = tools.tokens_of(vanilla(prompts[:16], params, **arguments))
    llm = ouroboros(**arguments)
    with tools.Used(llm) as used:
        assert tools.tokens_of(tools.generate(llm, prompts[:16], params)) == expected
    assert used["accepted_tokens"] > 0
    assert any(ids[4::5] == [40] * len(ids[4::5]) for ids in expected)


def test_other_processors_keep_the_engine_from_drafting(
    processors, ouroboros, vanilla, prompts, tools
):
    """One token a step, as vLLM would: one request at a time, so that both count alike."""
    arguments = {"logits_processors": processors("Counting"), "max_num_seqs": 1}
    params = requests(3)
    expected = tools.tokens_of(vanilla(prompts[:3], params, **arguments))
    llm = ouroboros(**arguments)
    with tools.Used(llm) as used:
        assert tools.tokens_of(tools.generate(llm, prompts[:3], params)) == expected
    assert used["verified_nodes"] == 0
