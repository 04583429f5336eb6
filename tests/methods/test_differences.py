"""The named method that a method is closest to, and what differs from it."""

import json
from dataclasses import replace
from typing import Any

from dllm_sd.config import build_config, load_config, shipped_configs, to_tree, to_yaml
from dllm_sd.files.plain_yaml import parse_yaml, read_yaml
from dllm_sd.losses.divergences import GeneralisedJSD
from dllm_sd.losses.targets import Each
from dllm_sd.methods import METHODS
from dllm_sd.methods.differences import named_differences
from dllm_sd.methods.method import Method
from dllm_sd.policies.weights import EmaWeights
from dllm_sd.teachers import Nothing


def rebuilt(method: Method) -> Method:
    """The method that results when the differences are set as keys of the named method."""
    named = named_differences(method)
    tree: dict[str, Any] = {"name": named.name}
    for change in named.changes:
        *steps, last = change.key.split(".")
        node = tree
        for step in steps:
            node = node.setdefault(step, {})
        node[last] = json.loads(json.dumps(change.value))
    return build_config({"task": "gsm8k", "method": tree}).method


def test_a_named_method_differs_in_nothing_from_itself():
    for name, row in METHODS.items():
        named = named_differences(row.method)
        assert (named.name, named.changes, named.sentence) == (name, (), name)


def test_without_a_name_the_method_with_the_fewest_differences_is_taken():
    jsd = replace(METHODS["d_opsd"].method, divergence=GeneralisedJSD(beta=0.5))
    assert named_differences(jsd).sentence == "d_opsd, changed: divergence jsd (not reverse_kl)"
    assert named_differences(replace(jsd, name="later_step")).sentence.startswith("later_step, changed: rollout.")


def test_the_differences_of_every_shipped_config_give_the_method_again():
    methods = {name: load_config(name).method for name in shipped_configs()}
    methods |= {f"{name} at 0.5": replace(row.method, average="rollouts") for name, row in METHODS.items()}
    methods["with jsd"] = replace(METHODS["opsd"].method, divergence=GeneralisedJSD(beta=0.3))
    averaged = replace(METHODS["opsd"].method, contexts=(Nothing(),) * 3, teacher=(EmaWeights(0.5),), target=Each())
    for name, method in {**methods, "averaged": averaged}.items():
        assert rebuilt(method) == method, name


def test_a_shipped_config_is_closest_to_the_method_that_it_names():
    for name, path in shipped_configs().items():
        method = read_yaml(path, name)["method"]
        written = method if isinstance(method, str) else method.get("name")
        assert named_differences(load_config(name).method).name == written, name


def test_the_sentence_names_each_key_with_both_values():
    named = named_differences(load_config("quickstart").method)
    assert named.sentence == (
        "d_opsd, changed: rollout.problems 64 (not 16), contexts.0.ratio 1.0 (not 0.25), "
        "divergence jsd (not reverse_kl)"
    )


def test_the_resolved_config_says_it_in_a_comment_and_loads_again():
    for name in ("quickstart", "tiny_opcod"):
        config = load_config(name)
        text = to_yaml(config)
        before, _, _ = text.partition("\nmethod:\n")
        comment = before.splitlines()[-1]
        assert comment.startswith("# ")
        assert build_config(parse_yaml(text, "it")) == config
        told = " ".join(line.removeprefix("# ") for line in text.splitlines() if line.startswith("# "))
        assert told == " ".join(named_differences(config.method).sentence.split())
        assert to_tree(config)["method"]["rollout"]["name"] == "pass_at_k"
