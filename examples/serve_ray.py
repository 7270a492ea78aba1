"""Serve a model on a Ray cluster, Ouroboros on in every replica, behind one OpenAI address.

    pip install 'vllm-ouroboros[ray]'
    python examples/serve_ray.py --model TARGET --draft-model DRAFT --replicas 1-4

On a cluster run it on any node, with ``--address auto``. It stays until it is interrupted. Where
Ray Serve runs on the cluster already, its address is kept, whatever ``--host`` and ``--port`` say.
Replicas of one model may share a phrase pool: ``--ouroboros-config '{"pool_path":
"/shared/pool"}'``.
"""

from __future__ import annotations

import argparse
from typing import Any

from vllm_ouroboros.cli.batch.engines import engine_arguments, ray_options, replica_bounds
from vllm_ouroboros.cli.inputs import json_object

APP = "ouroboros"
"""Name of the application on the cluster: one that runs under it is replaced."""


def llm_config(options: argparse.Namespace) -> Any:
    """Ray Serve's configuration of one model."""
    from ray.serve.llm import LLMConfig

    target, engine = engine_arguments(
        options.model, options.draft_model,
        json_object(options.ouroboros_config, "--ouroboros-config", '{"phrase_len": 8}'),
        json_object(options.engine_args, "--engine-args", '{"tensor_parallel_size": 2}'),
    )  # fmt: skip
    fewest, most = replica_bounds(options.replicas)
    return LLMConfig(
        model_loading_config={"model_id": options.name or target, "model_source": target},
        engine_kwargs=engine,
        server_cls="vllm_ouroboros.cli.ray_server:ReplicaServer",
        log_engine_metrics=False,
        deployment_config={
            "autoscaling_config": {
                "min_replicas": fewest,
                "max_replicas": most,
                # without it Ray Serve never adds a replica
                "target_ongoing_requests": options.requests,
                "upscale_delay_s": options.delay,
                "look_back_period_s": max(1.0, options.delay),
            },
            # a replica that goes away answers first what it has begun
            "graceful_shutdown_timeout_s": 600,
            "health_check_timeout_s": 120,
        },
        **ray_options(),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="target: folder or hub id; default: the shipped one")
    parser.add_argument("--draft-model", help="folder or hub id, or 'none' for phrases alone")
    parser.add_argument("--name", help="what requests call the model; default: its path")
    parser.add_argument("--ouroboros-config", default="{}", metavar="JSON")
    parser.add_argument("--engine-args", default="{}", metavar="JSON", help="as of vllm.LLM")
    parser.add_argument("--replicas", default="1", help="a number, or FEWEST-MOST")
    parser.add_argument("--requests", type=float, default=32, help="that a replica should have")
    parser.add_argument("--delay", type=float, default=30, help="seconds until a replica is added")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--address", help="of a Ray cluster; default: a new local one")
    options = parser.parse_args()

    import ray
    from ray import serve
    from ray.serve.llm import build_openai_app

    ray.init(address=options.address)
    serve.start(http_options={"host": options.host, "port": options.port})
    app = build_openai_app({
        "llm_configs": [llm_config(options)],
        "ingress_deployment_config": {
            "autoscaling_config": {"min_replicas": 1},
            "ray_actor_options": {"num_cpus": 0},  # cores are for engines: it passes requests on
        },
    })  # fmt: skip
    try:
        serve.run(app, name=APP, blocking=True)
    except KeyboardInterrupt:
        pass
    finally:
        serve.delete(APP)  # the cluster may live on


if __name__ == "__main__":
    main()
