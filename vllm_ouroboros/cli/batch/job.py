"""A batch job: Ray Data reads rows, engines with Ouroboros answer them, the driver keeps answers.

The engines are an actor pool that Ray makes larger and smaller. Work that a dead one had is done
again by another; answers reach the driver once, and what it has written is never asked for again.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from vllm_ouroboros.cli.batch.answers import open_answers
from vllm_ouroboros.cli.batch.engines import ray_options
from vllm_ouroboros.cli.batch.requests import ERROR, KEYS, Requests, sampling
from vllm_ouroboros.cli.batch.rows import Rows, find, read
from vllm_ouroboros.cli.inputs import InputError
from vllm_ouroboros.phrases.shared_file import locked

ENGINES = "vLLMEngineStage"
BATCHES_AT_ONCE = 2
"""Batches that an engine works on: the next one fills the seats that the first one frees."""
MOST_ROWS = 4096  # of a block, which one engine reads at a time
TRIES = 3
"""Times that work is done again after an engine died over it."""


@dataclass(frozen=True)
class Job:
    """What a batch job does.

    Attributes:
        inputs: files of rows, JSON lines or Parquet.
        out: see `open_answers`.
        model: target.
        engine: arguments of every engine, as of ``vllm.LLM``; what selects Ouroboros included.
        replicas: fewest and most engines.
        batch_size: rows that an engine takes at a time.
        sampling: parameters of rows that say nothing else.
        id_column: where rows have their id.
        retry_errors: whether to answer rows again that ended in an error.
        cores: of a rank of an engine on a machine without accelerators.
    """

    inputs: tuple[Path, ...]
    out: Path
    model: str
    engine: dict[str, Any]
    replicas: tuple[int, int] = (1, 1)
    batch_size: int = 32
    sampling: dict[str, Any] = field(default_factory=dict)
    id_column: str = "id"
    retry_errors: bool = False
    cores: float = 1


class Progress(NamedTuple):
    """Rows of a job: answered and failed in this run, finished before, and all."""

    answered: int
    failed: int
    before: int
    total: int


def run(job: Job, progressed: Callable[[Progress], object] = lambda _: None) -> Progress:
    """Answer the rows that have no answer yet, on the Ray cluster of `connect`.

    Args:
        job: what to do.
        progressed: called with each answer.

    Raises:
        InputError: something the user can mend, before any engine starts.
        Exception: Ray's, if no engine can be had.
    """
    defaults = _defaults(job.sampling)
    if not job.out.resolve().parent.is_dir():
        raise InputError(f"--out {job.out}: its folder does not exist")
    try:
        with locked(job.out, timeout_s=1):
            return _run(job, defaults, progressed)
    except TimeoutError:
        raise InputError(f"--out {job.out}: another batch is writing to it") from None


def _run(job: Job, defaults: dict[str, Any], progressed: Callable[[Progress], object]) -> Progress:
    answers = open_answers(job.out, retry=job.retry_errors)
    try:
        before = len(answers.finished)
        pieces = find(job.inputs, job.id_column, answers.finished, partial(_rows_of_block, job))
        wanted = {one for rows in pieces for one in rows.ids if one is not None}
        done = Progress(0, 0, before, before + len(wanted))
        progressed(done)
        if not wanted:
            return done
        for answer in _answers(job, pieces, defaults):
            if answer["id"] in wanted and answers.add(answer):
                done = _count(done, answer)
                progressed(done)
        for one in sorted(wanted - answers.finished):  # e.g. engines died over their blocks
            answer = _failed(
                one, f"no engine answered its block of rows in {TRIES + 1} tries: see --verbose"
            )
            answers.add(answer)
            done = _count(done, answer)
            progressed(done)
        return done
    finally:
        answers.close()


def connect(address: str | None = None, *, verbose: bool = False) -> None:
    """Join a Ray cluster, or start one on this machine.

    Args:
        address: of a cluster; None: what RAY_ADDRESS says, or a new local one.
        verbose: whether the logs of its workers are shown.

    Raises:
        InputError: Ray is missing, or nobody answers there.
    """
    try:
        import ray
        import ray.data.llm
    except ImportError as error:
        raise InputError(f"pip install 'vllm-ouroboros[ray]': {error}") from None
    if not verbose:
        logging.getLogger("ray.data").setLevel(logging.ERROR)
    try:
        ray.init(
            address=address, log_to_driver=verbose, ignore_reinit_error=True,
            logging_level=logging.INFO if verbose else logging.ERROR,
        )  # fmt: skip
    except (ConnectionError, ValueError) as error:
        raise InputError(f"--address {address}: {str(error).splitlines()[0]}") from None


def _count(done: Progress, answer: dict[str, Any]) -> Progress:
    failed = answer["error"] is not None
    return done._replace(answered=done.answered + (not failed), failed=done.failed + failed)


def _defaults(given: dict[str, Any]) -> dict[str, Any]:
    from vllm import SamplingParams

    usual = SamplingParams(temperature=0.0, max_tokens=256)
    try:
        return sampling(given, {key: getattr(usual, key) for key in KEYS})
    except ValueError as error:
        raise InputError(f"--sampling-params: {error}") from None


def _rows_of_block(job: Job, wanted: int) -> int:
    """Rows that are read together: enough blocks for all engines to be busy to the end."""
    blocks = job.replicas[1] * BATCHES_AT_ONCE * 4
    return min(MOST_ROWS, max(job.batch_size, wanted // blocks))


def _answers(job: Job, pieces: list[Rows], defaults: dict[str, Any]):
    """Answers as they come, in any order."""
    from ray.data import DataContext
    from ray.data.llm import build_processor

    context = DataContext.get_current()
    context.max_errored_blocks = -1  # one that no engine survives costs its own rows alone
    context.enable_progress_bars = False
    processor = build_processor(
        processor_config(job),
        preprocess=Requests(job.model, defaults, job.engine.get("trust_remote_code", False)),
        postprocess=_kept,
        preprocess_map_kwargs={"num_cpus": 0.25},
        postprocess_map_kwargs={"num_cpus": 0.25},
    )
    stage = processor.get_stage_by_name(ENGINES)
    stage.map_batches_kwargs["max_task_retries"] = TRIES
    for row in processor(_dataset(pieces)).iter_rows():
        yield _answer(row)


def processor_config(job: Job) -> Any:
    """Ray Data's configuration of the engines of a job."""
    from ray.data.llm import vLLMEngineProcessorConfig

    return vLLMEngineProcessorConfig(
        model_source=job.model,
        # Without statistics rows have no column of them: Ray 2.60 loses a block in which batches
        # with that column meet batches of errors alone, where it has another type.
        engine_kwargs={
            "distributed_executor_backend": "mp",
            **job.engine,
            "disable_log_stats": True,
        },
        batch_size=job.batch_size,
        concurrency=job.replicas,
        max_concurrent_batches=BATCHES_AT_ONCE,
        should_continue_on_error=True,
        log_engine_metrics=False,
        # rows come as tokens, so that a bad one fails alone
        chat_template_stage=False,
        tokenize_stage=False,
        detokenize_stage=False,
        **ray_options(job.cores),
    )


def _dataset(pieces: list[Rows]) -> Any:
    """The rows of pieces, each of which is read by the task that needs it."""
    import pyarrow as pa
    import ray
    from ray.data.block import BlockMetadata
    from ray.data.datasource import Datasource, ReadTask

    def blocks(rows: Rows):
        ids, texts = zip(*read(rows), strict=True)
        yield pa.table({"id": pa.array(ids, pa.string()), "row": pa.array(texts, pa.string())})

    class Source(Datasource):
        """Pieces of files."""

        def estimate_inmemory_data_size(self) -> int | None:
            return None

        def get_read_tasks(self, parallelism: int, *_, **__) -> list[ReadTask]:
            return [
                ReadTask(
                    partial(blocks, rows),
                    BlockMetadata(
                        num_rows=rows.wanted, size_bytes=None, input_files=[rows.path],
                        exec_stats=None,
                    ),
                )
                for rows in pieces
            ]  # fmt: skip

    return ray.data.read_datasource(Source(), override_num_blocks=len(pieces))


def _kept(row: dict[str, Any]) -> dict[str, Any]:
    """What the driver needs of an answered row."""
    names = ("id", ERROR, "generated_text", "num_input_tokens", "num_generated_tokens")
    return {name: row[name] for name in names}


def _answer(row: dict[str, Any]) -> dict[str, Any]:
    if row.get(ERROR):
        return _failed(row["id"], row[ERROR])
    return {
        "id": row["id"],
        "text": row["generated_text"],
        "prompt_tokens": int(row["num_input_tokens"]),
        "generated_tokens": int(row["num_generated_tokens"]),
        "error": None,
    }


def _failed(one: str, error: str) -> dict[str, Any]:
    nothing = dict.fromkeys(("text", "prompt_tokens", "generated_tokens"))
    return {"id": one, **nothing, "error": error}
