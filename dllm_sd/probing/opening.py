"""A probe of a config before its run: checks, model and teachers as the trainer has them, and no optimizer."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from tempfile import TemporaryDirectory

from dllm_sd.config import Config
from dllm_sd.engines import Local
from dllm_sd.errors import InputError
from dllm_sd.evaluation.evaluate import check_ids, first
from dllm_sd.experience.pipeline import RolloutPipeline
from dllm_sd.pairing import check_data, check_model, check_tokenizer
from dllm_sd.parallel.sharding import start_accelerator
from dllm_sd.policies.loading import build_policy, make_teacher
from dllm_sd.policies.weights import add_adapter
from dllm_sd.probing.probe import Probe
from dllm_sd.tasks.task import Problem


@contextmanager
def opened(config: Config) -> Iterator[tuple[Probe, list[Problem]]]:
    """The probe of a config, and the held-out problems for it; the run folder is neither read nor written.

    Everything is decoded by this process, whatever `decode.engine` is.

    Raises:
        InputError: if config, data or model are wrong, or no dev problem is there.
    """
    accelerator = start_accelerator(config)
    if accelerator.num_processes > 1:
        raise InputError("probe runs in one process; leave out accelerate launch")
    training = config.task.problems("train")
    dev = first(config.task.problems("dev"), config.eval.probe_problems)
    check_ids(dev)
    if not dev:
        raise InputError("the dev split holds no problems to probe on; set task.size_dev, or name other data in task")
    check_data(config, training)
    blueprint = check_model(config)
    for warning in check_tokenizer(config, blueprint, training).values():
        print(warning, file=sys.stderr)
    with TemporaryDirectory() as folder:  # for texts of writers
        local = replace(config.decode, engine=Local())  # servers may have the weights of a run
        config = replace(config, run=folder, resume="fresh", decode=local)
        policy = build_policy(blueprint, accelerator.device)
        adapters = {weights: add_adapter(weights, policy) for weights in config.method.models()}
        module = accelerator.prepare_model(policy.module, evaluation_mode=True)
        models = {weights: make_teacher(weights, policy, name, config.model) for weights, name in adapters.items()}
        pipeline = RolloutPipeline(config, training, policy, module, models, accelerator)
        pipeline.open(None)
        yield Probe(config, pipeline, module, models, accelerator), dev
