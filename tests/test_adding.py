"""A part from outside is a file and a line in a table: it runs, is written down, and is refused where it must be."""

import ast
import importlib.util
import json
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from dllm_sd.canvases import CANVASES, CanvasRule
from dllm_sd.config import Config, build_config, load_config, to_tree
from dllm_sd.errors import InputError
from dllm_sd.losses import DIVERGENCES, SUPPORTS, TARGETS, TRUSTS, Divergence, Support, Target, Trust
from dllm_sd.losses.sites import SITES, SiteRule
from dllm_sd.pairing import check_data, check_model
from dllm_sd.policies.teacher_weights import RolloutPolicy, Weights
from dllm_sd.policies.weights import WEIGHTS
from dllm_sd.pretrained.families import FAMILIES
from dllm_sd.rollouts.gates import GATES, Gate
from dllm_sd.rollouts.horizons import HORIZONS, Horizon
from dllm_sd.rollouts.rules import ROLLING, ROLLOUTS, RolloutRule
from dllm_sd.skills.retrieval import RETRIEVERS, Retriever
from dllm_sd.tasks import TASKS, Task
from dllm_sd.teachers import CONTEXTS, HINTS, Context, Hint
from dllm_sd.teachers.writing import WRITERS, TextSource
from dllm_sd.training.trainer import Trainer
from tests.sources import PACKAGE, modules

SLOTS: list[tuple[dict[str, Any], type]] = [
    *((ROLLOUTS, RolloutRule), (ROLLING, RolloutPolicy), (HORIZONS, Horizon), (GATES, Gate), (CANVASES, CanvasRule)),
    *((CONTEXTS, Context), (HINTS, Hint), (WEIGHTS, Weights), (WRITERS, TextSource), (RETRIEVERS, Retriever)),
    *((SITES, SiteRule), (SUPPORTS, Support), (TARGETS, Target), (DIVERGENCES, Divergence), (TRUSTS, Trust)),
    (TASKS, Task),
]
"""Every table, and what its parts must have."""

DIVERGENCE = '''
from dataclasses import dataclass

from dllm_sd.losses import DIVERGENCES, DivergenceDefaults, drawn_gap
from dllm_sd.ranges import Positive, Ranged


@dataclass(frozen=True)
class LogRatio(Ranged, DivergenceDefaults, key="method.divergence"):
    """Half the squared log-ratio of target and student at the drawn token."""

    scale: Positive = 0.5

    @property
    def reads_drawn_token(self):
        return True

    def entries(self, student_logp, target_logp, token):
        return self.scale * drawn_gap(student_logp, target_logp, token).square()[..., None]

    def __call__(self, student_logp, target_logp, token):
        return self.entries(student_logp, target_logp, token)[..., 0]


DIVERGENCES["log_ratio"] = LogRatio
'''
CONTEXT = '''
from dataclasses import dataclass
from typing import ClassVar

from dllm_sd.ranges import Count, Ranged
from dllm_sd.teachers import CONTEXTS, ContextDefaults
from dllm_sd.teachers.context import show


@dataclass(frozen=True)
class Tail(Ranged, ContextDefaults, key="method.contexts"):
    """The last tokens of the student's own answer stand on the canvas."""

    count: Count = 4
    needs_steps: ClassVar[bool] = True
    reveals: ClassVar[bool] = True

    @property
    def reveals_whole_block(self):
        return self.count >= 16

    def same_view(self, covers):
        return False

    def __call__(self, inputs):
        shown = inputs.canvases.masked & ~inputs.protected
        shown[:, : -self.count] = False
        return show(inputs, shown)


CONTEXTS["tail"] = Tail
'''
FAMILY = """
from transformers import LlamaConfig, LlamaForCausalLM

from dllm_sd.pretrained.families import FAMILIES, Family

KEYS = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


def native(written):
    return LlamaConfig(**{key: written[key] for key in KEYS}, eos_token_id=None, bos_token_id=None)


FAMILIES["blockwise"] = Family(
    name="blockwise",
    checkpoints="of this test",
    model_types=("blockwise_lm",),
    network=LlamaForCausalLM,
    config=native,
    assumes={"mlp_bias": False},
    block_causal_names={"bd": 4},
)
"""
TASK = '''
from dataclasses import dataclass

from dllm_sd.ranges import Ranged, Size
from dllm_sd.tasks import TASKS, Grade, Problem
from dllm_sd.tasks.task import NoChanceLevel


@dataclass(frozen=True)
class Parity(Ranged, NoChanceLevel, key="task"):
    """Any answer that begins with an even digit is right; nobody has written one down."""

    size: Size = 8

    def problems(self, split):
        return [Problem(f"parity/{split}/{i}", {"question": f"{i}+1="}) for i in range(self.size)]

    def messages(self, problem, question=True):
        return [{"role": "user", "content": problem.fields["question"] if question else "="}]

    def reference(self, problem):
        return None

    def final_answer(self, problem):
        return None

    @property
    def reference_remedy(self):
        return "there are none for parity"

    def grade(self, problem, completion):
        correct = completion[:1] in tuple("02468")
        return Grade(correct, float(correct), completion[:1] or None)


TASKS["parity"] = Parity
'''
RUN: dict[str, Any] = {
    "updates": 1,
    "model": {"path": "tiny"},
    "task": {"name": "sudoku", "prompt": "{puzzle}", "answer": "{solution}", "size_train": 8, "size_dev": 4},
    "decode": {"length": 16, "block_length": 4, "tokens_per_step": 2},
    "method": {"name": "d_opsd", "rollout": {"problems": 4, "attempts": 1}, "gate": "all"},
    "eval": {"every": 0, "final_problems": 0},
    "log": {"progress": False},
}


def changed(tree: Any, changes: Mapping[str, Any]) -> dict[str, Any]:
    """The tree with other values where the changes have them; a part that is named anew has no other keys."""
    merged = dict(tree)
    for key, value in changes.items():
        former = merged.get(key)
        renamed = not isinstance(value, dict) or not isinstance(former, dict) or (key != "method" and "name" in value)
        merged[key] = value if renamed else changed(former, value)
    return merged


@pytest.fixture
def add(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], ModuleType]]:
    """Writes a source into a file of its own and imports it; afterwards no table has what it added."""
    tables: list[dict[str, Any]] = [*(table for table, _ in SLOTS), FAMILIES]
    before = [dict(table) for table in tables]

    def load(source: str) -> ModuleType:
        file = tmp_path / "added_part.py"
        file.write_text(source)
        spec = importlib.util.spec_from_file_location("added_part", file)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, "added_part", module)
        spec.loader.exec_module(module)
        return module

    yield load
    for table, held in zip(tables, before, strict=True):
        table.clear()
        table.update(held)


def trained_once(run: Path, changes: Mapping[str, Any]) -> Config:
    """The config of a run of one update that learnt something, which its own file and tree give again."""
    config = build_config({"run": str(run), **changed(RUN, changes)})
    assert build_config(to_tree(config)) == config
    Trainer(config).train()
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert metrics[-1]["update"] == 1
    assert metrics[-1]["loss"] is not None
    assert metrics[-1]["grad_norm"] > 0
    assert load_config(str(run / "config.yaml")) == config
    return config


def refusal(changes: Mapping[str, Any]) -> str:
    """Why a config is refused, with its model and its data."""

    def check() -> None:
        config = build_config(changed(RUN, changes))
        check_model(config)
        check_data(config, config.task.problems("train"))

    with pytest.raises(InputError) as caught:
        check()
    return str(caught.value)


def test_a_divergence_is_one_file_and_one_line(add: Callable[[str], ModuleType], tmp_path: Path):
    module = add(DIVERGENCE)
    divergence = {"name": "log_ratio", "scale": 2.0}
    config = trained_once(tmp_path / "run", {"method": {"divergence": divergence}})
    assert config.method.divergence == module.LogRatio(scale=2.0)
    says = refusal({"method": {"divergence": divergence, "support": "top_k"}})
    assert says == "method.divergence log_ratio reads any token; set method.support to full"
    says = refusal({"method": {"divergence": divergence, "target": "sampled", "contexts": []}})
    assert says == "method.target sampled and method.divergence token_nll belong together; set both or neither"
    assert refusal({"method": {"divergence": {"name": "log_ratio", "scale": 0.0}}}).startswith(
        "method.divergence.scale"
    )


def test_a_teacher_context_is_one_file_and_one_line(add: Callable[[str], ModuleType], tmp_path: Path):
    module = add(CONTEXT)
    config = trained_once(tmp_path / "run", {"method": {"contexts": [{"name": "tail", "count": 6}]}})
    assert config.method.contexts == (module.Tail(count=6),)
    says = refusal({"method": {"contexts": ["tail"], "canvases": "random_masks"}})
    assert says == "method.contexts needs canvases that the decoder saw; set method.canvases to decoder_steps"
    assert refusal({"method": {"contexts": ["tail"]}, "model": {"path": "tiny_ar"}}).startswith(
        "method.contexts tail reveals tokens after the graded position"
    )
    whole = {"contexts": [{"name": "tail", "count": 16}], "sites": "teacher_top"}
    assert refusal({"method": whole}).startswith("method.contexts reveals the whole active block")
    assert build_config(changed(RUN, {"method": {**whole, "contexts": ["tail"]}})).method.contexts == (module.Tail(),)


def test_a_family_is_one_file_and_one_line(add: Callable[[str], ModuleType], tmp_path: Path):
    folder, blocks = tmp_path / "mine", tmp_path / "mine-bd"
    for place in (folder, blocks):
        shutil.copytree(PACKAGE / "assets" / "tiny", place)
        written = json.loads((place / "config.json").read_text())
        (place / "config.json").write_text(json.dumps({**written, "model_type": "blockwise_lm"}))
    assert "blockwise_lm" in refusal({"model": {"path": str(folder)}})
    add(FAMILY)
    config = trained_once(tmp_path / "run", {"model": {"path": str(folder)}})
    assert check_model(config).family.name == "blockwise"
    says = refusal({"model": {"path": str(blocks)}})
    assert says.startswith("method.contexts reveals later blocks, to which a block-causal model cannot attend")
    (folder / "config.json").write_text(json.dumps({**written, "model_type": "blockwise_lm", "mlp_bias": True}))
    assert refusal({"model": {"path": str(folder)}}).endswith("loads blockwise checkpoints with False only")


def test_a_task_is_one_file_and_one_line(add: Callable[[str], ModuleType], tmp_path: Path):
    module = add(TASK)
    config = trained_once(tmp_path / "run", {"task": {"name": "parity", "size": 6}})
    assert config.task == module.Parity(size=6)
    says = refusal({"task": {"name": "parity"}, "method": {"name": "sft", "rollout": {"name": "demonstrations"}}})
    assert says == (
        "method.rollout demonstrations needs references, but the task's data has none; there are none for parity"
    )


@pytest.mark.parametrize(("table", "protocol"), SLOTS, ids=lambda value: getattr(value, "__name__", ""))
def test_every_part_has_what_its_slot_asks_for(table: dict[str, Any], protocol: type):
    names = [name for name in vars(protocol) if not name.startswith("_")]
    names += ["__call__"] if "__call__" in vars(protocol) else []
    assert names
    for name, part in table.items():
        lacking = [x for x in names if not hasattr(part, x) and x not in getattr(part, "__dataclass_fields__", {})]
        assert not lacking, f"{name} lacks {lacking}"


def asked(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """The classes that a module asks a value for, and where: isinstance, issubclass, `type(x) is`, `case X()`."""
    for node in ast.walk(tree):
        found: list[ast.AST] = []
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and node.func.id in ("isinstance", "issubclass")
        ):
            found = [node.args[1]]
        elif isinstance(node, ast.MatchClass):
            found = [node.cls]
        elif isinstance(node, ast.Compare) and any(isinstance(x, ast.Is | ast.Eq) for x in node.ops):
            of_type = isinstance(node.left, ast.Call) and getattr(node.left.func, "id", "") == "type"
            found = [*node.comparators] if of_type else []
        for name in (x for part in found for x in ast.walk(part) if isinstance(x, ast.Name)):
            yield name.lineno, name.id


def test_nobody_asks_a_part_for_its_class():
    parts = {part.__name__ for table, _ in SLOTS for part in table.values()}
    found = [
        f"{module}:{line} {name}" for module, tree in modules().items() for line, name in asked(tree) if name in parts
    ]
    assert not found


@pytest.mark.parametrize(
    "code", ["isinstance(x, A)", "isinstance(x, B | A)", "type(x) is A", "match x:\n    case A():\n        pass"]
)
def test_asking_for_a_class_is_seen(code: str):
    assert "A" in {name for _, name in asked(ast.parse(code))}
