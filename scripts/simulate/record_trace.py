"""Records a trace for simulation: a target writes, a draft model, if there is one, reads it.

\b
    python scripts/simulate/record_trace.py --target DIR --draft-model DIR --prompts FILE \
        --out TRACE
    python scripts/simulate/record_trace.py --target CHAT_MODEL --tasks FILE --out TRACE

See `simulate.py`, which needs no model any more.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from simulate_trace import FIRST, Text, Trace
from transformers import AutoTokenizer

from vllm_ouroboros.cli.inputs import InputError, read_prompts
from vllm_ouroboros.cli.tasks import Task, encode_chat, read_tasks

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False, rich_markup_mode=None)


def record(
    target: str, draft: str, prompts: Sequence[Sequence[int]], max_tokens: int, **engine: Any
) -> Trace:
    """Run both models of a pair through vLLM: the target writes, the draft model reads it.

    Args:
        target: folder of the model.
        draft: folder of the model.
        prompts: token ids.
        max_tokens: length of each answer; ends of text are written over.
        engine: arguments of both engines.
    """
    from vllm import LLM, SamplingParams

    params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
    given = [{"prompt_token_ids": list(ids)} for ids in prompts]
    llm = LLM(model=target, **engine)
    answers = [list(out.outputs[0].token_ids) for out in llm.generate(given, params)]
    eos = llm.get_tokenizer().eos_token_id
    vocab = llm.llm_engine.model_config.get_vocab_size()
    llm.llm_engine.engine_core.shutdown()
    texts = [[*ids, *answer] for ids, answer in zip(prompts, answers, strict=True)]
    reading = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=FIRST)
    llm = LLM(model=draft, **engine)
    read = llm.generate([{"prompt_token_ids": text} for text in texts], reading)
    llm.llm_engine.engine_core.shutdown()
    result = []
    for ids, text, out in zip(prompts, texts, read, strict=True):
        first = np.zeros((len(text), FIRST), np.int32)
        odds = np.zeros((len(text), FIRST), np.float32)
        for place, found in enumerate(out.prompt_logprobs[1:]):
            best = sorted(found.items(), key=lambda item: item[1].rank)[:FIRST]
            first[place] = [token for token, _ in best]
            odds[place] = np.exp([said.logprob for _, said in best])
        result.append(Text(np.array(text, np.int32), len(ids), first, odds))
    return Trace(result, vocab, eos)


def record_tasks(target: str, tasks: Sequence[Task], max_tokens: int, **engine: Any) -> Trace:
    """Let a chat model answer conversations, each answer to its end.

    Args:
        target: folder of the model.
        tasks: their later turns follow the answers to those before.
        max_tokens: length of an answer at most.
        engine: arguments of the engine.
    """
    from vllm import LLM, SamplingParams

    llm = LLM(model=target, **engine)
    tokenizer, params = llm.get_tokenizer(), SamplingParams(temperature=0, max_tokens=max_tokens)
    said: list[list[tuple[str, str]]] = [[] for _ in tasks]
    found: list[list[Text]] = [[] for _ in tasks]
    for turn in range(max(len(task.turns) for task in tasks)):
        going = [i for i, task in enumerate(tasks) if len(task.turns) > turn]
        for i in going:
            said[i].append(("user", tasks[i].turns[turn]))
        given = [{"prompt_token_ids": encode_chat(tokenizer, said[i])} for i in going]
        for i, out in zip(going, llm.generate(given, params), strict=True):
            answer, prompt = out.outputs[0], list(out.prompt_token_ids)
            said[i].append(("assistant", answer.text))
            found[i].append(Text.without_draft(prompt, answer.token_ids, tasks[i].task))
    vocab = llm.llm_engine.model_config.get_vocab_size()
    llm.llm_engine.engine_core.shutdown()
    return Trace([text for texts in found for text in texts], vocab, tokenizer.eos_token_id)


@app.command()
def main(
    target: Annotated[str, typer.Option(help="folder of the target")],
    out: Annotated[Path, typer.Option(help="file to write")],
    draft_model: Annotated[str | None, typer.Option(help="folder of the draft model")] = None,
    tasks: Annotated[
        Path | None, typer.Option(help="conversations for a chat model, as the shipped tasks.jsonl")
    ] = None,
    prompts: Annotated[Path | None, typer.Option(help='JSON lines {"prompt"}')] = None,
    limit: Annotated[int, typer.Option(help="first prompts only")] = 32,
    random_tokens: Annotated[int, typer.Option(help="prompts of so many random ids instead")] = 0,
    max_tokens: Annotated[int, typer.Option(help="length of each answer")] = 128,
    dtype: Annotated[str, typer.Option(help="of both models")] = "float32",
) -> None:
    """Run a pair, or a chat model alone, through vLLM and keep what it said."""
    engine: dict[str, Any] = {"dtype": dtype, "max_model_len": 2048, "enforce_eager": True}
    if tasks is not None:
        try:
            conversations = read_tasks(tasks)[:limit]
        except InputError as error:
            raise typer.BadParameter(str(error)) from None
        record_tasks(target, conversations, max_tokens, **engine).save(out)
        return
    if draft_model is None:
        raise typer.BadParameter("give --draft-model DIR, or --tasks FILE for a chat model alone")
    tokenizer = AutoTokenizer.from_pretrained(target)
    if random_tokens:
        shape = (limit, random_tokens)
        ids = np.random.default_rng(0).integers(0, len(tokenizer), shape).tolist()
    elif prompts is not None:
        try:
            texts = read_prompts(prompts, "--prompts")[:limit]
        except InputError as error:
            raise typer.BadParameter(str(error)) from None
        ids = [tokenizer.encode(text) for text in texts]
    else:
        raise typer.BadParameter("give --prompts FILE, or --random-tokens N")
    record(target, draft_model, ids, max_tokens, **engine).save(out)


if __name__ == "__main__":
    app()
