"""Keys of a config: the schema describes them all, misspelt ones are refused with the nearest, before any import."""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from dllm_sd.cli.main import main
from dllm_sd.config import build_config, load_config, shipped_configs, to_tree
from dllm_sd.config_files import read_config
from dllm_sd.errors import InputError
from dllm_sd.keys import SYNONYMS, all_keys, check_names, find_keys, read_schema, unknown_key
from dllm_sd.methods import METHODS
from dllm_sd.reports.run_report import flat
from dllm_sd.schema import field_docs

PLAIN = sorted({key.path for key in all_keys() if "*" not in key.path and not key.parts})
TASK = {"name": "sudoku", "prompt": "{puzzle}", "answer": "{solution}"}


@cache
def resolved(name: str) -> dict[str, Any]:
    """A shipped config with all that it leaves out."""
    return to_tree(load_config(name))


def test_the_schema_accepts_every_shipped_config_also_resolved_and_refuses_wrong_ones():
    check = pytest.importorskip("jsonschema").Draft7Validator(read_schema()).is_valid
    for name in shipped_configs():
        assert check(read_config(name)), name
        assert check(json.loads(json.dumps(resolved(name)))), name
    assert check({"task": "gsm8k", "method": "opsd"})
    assert check({"task": {"name": "gsm8k"}, "method": {"contexts": {"0": {"ratio": 0.5}}}})
    wrong: list[dict[str, Any]] = [
        *({}, {"task": "gsm9k"}, {"task": {"size_dev": 3}}, {"task": "gsm8k", "optm": {}}),
        *({"optim": {"lr": value}} for value in (0, -1, "fast", 2000)),
        *({"optim": {"betas": value}} for value in ([0.9], [0.9, 1.0], 0.9)),
        *({"method": value} for value in ("dopsd", {"name": "kl"}, {"divergence": "kl"}, {"divergence": {"bta": 1}})),
        {"method": {"divergence": {"name": "reverse_kl", "beta": 0.5}}},
        {"method": {"contexts": [{"name": "suffix", "ratio": 2}]}},
        *({"model": {"lora": value}} for value in ({"r": 8}, {"rank": 0}, 8)),
        *({"updates": value} for value in (0, 1.5, "many")),
        *({"eval": {"decode": {"lenght": 4}}}, {"eval": {"schedules": {"x": {"lenght": 4}}}}),
    ]
    for tree in wrong:
        assert not check({"task": "gsm8k", **tree} if tree and "task" not in tree else tree), tree


def test_every_key_is_explained_with_its_type_and_what_it_means(capsys: pytest.CaptureFixture[str]):
    for path in PLAIN:
        assert any(key.path == path for key in find_keys(path))
    assert main(["explain", "optim.warmup", "--json"]) == 0
    (entry,) = json.loads(capsys.readouterr().out)
    assert (entry["key"], entry["type"], entry["default"]) == ("optim.warmup", "a whole number at least 0", 0)
    assert entry["meaning"] == "Updates of linear warm-up."
    assert "quickstart (5)" in entry["set_in"]
    assert main(["explain", "method.contexts.0.ratio"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "at least 0 and at most 1; default 0.25" in said
    assert "of suffix" in said
    assert "Share of the positions in scope" in said


def test_a_slot_of_a_method_is_explained_by_what_it_is_for(capsys: pytest.CaptureFixture[str]):
    slots = [key for key in all_keys() if key.path.startswith("method.") and key.path.count(".") == 1]
    meanings = {key.path: key.node.get("description", "") for key in slots}
    assert {path: text for path, text in meanings.items() if "Protocol of" in text or "Defaults" in text} == {}
    assert main(["explain", "method.gate"]) == 0
    assert "Which rollouts are trained on." in capsys.readouterr().out


def test_every_key_has_a_meaning_in_a_whole_sentence():
    assert len(all_keys()) > 500
    meanings = {key.path: key.node.get("description", "") for key in all_keys()}
    assert {path: text for path, text in meanings.items() if len(text.split()) < 2 or not text.endswith(".")} == {}


def test_a_section_of_fields_in_a_docstring_gives_their_meanings():
    @dataclass
    class Part:
        """A part.

        Fields:
            wide: how wide it is,
                in metres.
            high: how high.

        More words: these mean no field.
        """

        wide: int = 1
        high: int = 2

    assert field_docs(Part) == {"wide": "How wide it is, in metres.", "high": "How high."}


def test_every_key_that_show_prints_is_explained():
    for name in ("quickstart", "qwen3_1.7b_sgsd", "llada_8b_rcsd", "tiny_opcod"):
        for path in flat(resolved(name)):
            assert find_keys(path), path


@pytest.mark.parametrize(
    ("asked", "paths"),
    [
        ("lr", {"optim.lr"}),
        ("*.lr", {"optim.lr"}),
        ("method.contexts.3.answer_only", {"method.contexts.*.answer_only"}),
        ("method.contexts.answer_only", {"method.contexts.*.answer_only"}),
        ("eval.schedules.mine.length", {"eval.schedules.*.length"}),
        ("divergence.beta", {"method.divergence.beta"}),
        ("method.trust.name", {"method.trust"}),
        ("trust.name", {"method.trust"}),
        ("task.name", {"task"}),
        ("method.contexts.0.name", {"method.contexts"}),
        ("method.name", {"method.name"}),
    ],
)
def test_a_key_is_found_by_its_end_and_without_indices(asked: str, paths: set[str]):
    assert {key.path for key in find_keys(asked)} == paths


def test_what_is_listed_is_what_there_is(capsys: pytest.CaptureFixture[str]):
    listed = {}
    for kind in ("methods", "configs", "tasks", "families", "parts"):
        assert main(["list", kind, "--json"]) == 0
        listed[kind] = json.loads(capsys.readouterr().out)
        assert all(all(isinstance(value, str) and value for value in row.values()) for row in listed[kind][:-1])
    assert [row["name"] for row in listed["methods"]] == list(METHODS)
    assert [row["name"] for row in listed["configs"]] == list(shipped_configs())
    assert {"slot": "divergence", "name": "jsd"}.items() <= listed["parts"][
        [row["name"] for row in listed["parts"]].index("jsd")
    ].items()
    assert main(["list", "tasks"]) == 0
    said = capsys.readouterr().out
    assert "countdown" in said
    assert "``" not in said
    assert main(["list", "--json"]) == 0
    counts = {row["name"]: int(row["number"]) for row in json.loads(capsys.readouterr().out)}
    assert counts == {kind: len(rows) for kind, rows in listed.items()}


def refusal(tree: dict[str, Any]) -> str:
    with pytest.raises(InputError) as refused:
        build_config({"task": TASK, **tree})
    return str(refused.value)


def test_a_letter_too_few_in_any_key_is_answered_by_that_key():
    missed = []
    for path in PLAIN:
        parent, _, name = path.rpartition(".")
        if len(name) < 4 or parent == "task":
            continue
        wrong = name[:-2] + name[-1]
        siblings = [other.rpartition(".")[2] for other in PLAIN if other.rpartition(".")[0] == parent]
        said = str(unknown_key(parent, wrong, siblings))
        if wrong not in siblings and repr(path) not in said:
            missed.append((path, said))
    assert missed == []


def test_a_key_without_its_section_is_answered_by_the_whole_key():
    missed = []
    for path in PLAIN:
        name = path.rpartition(".")[2]
        places = {key.path for key in all_keys() if key.name == name}
        if len(places) == 1 and "." in path and name not in SYNONYMS:
            said = refusal({name: 1})
            missed += [] if f"unknown key {name!r}; did you mean" in said and repr(path) in said else [said]
    assert missed == []


def test_the_names_of_other_trainers_lead_to_keys_that_exist():
    paths = {key.path for key in all_keys()}
    assert [(name, key) for name, keys in SYNONYMS.items() for key in keys if key not in paths] == []
    top = {path for path in paths if "." not in path}
    assert [name for name in SYNONYMS if name in top] == []


@pytest.mark.parametrize(
    ("tree", "said"),
    [
        ({"lr": 1}, "unknown key 'lr'; did you mean 'optim.lr'?"),
        ({"optim": {"learning_rate": 1}}, "unknown key 'optim.learning_rate'; did you mean 'optim.lr'?"),
        ({"model": {"lora": {"r": 1}}}, "unknown key 'model.lora.r'; did you mean 'model.lora.rank'?"),
        ({"batch_size": 4}, "unknown key 'batch_size'; did you mean 'method.rollout.problems' or 'optim."),
        (
            {"method": {"divergence": {"name": "token_nll", "beta": 1}}},
            "the part jsd has it: leave it out, or set method.diverg",
        ),
        ({"method": "D-OPSD"}, "method 'D-OPSD' is unknown; did you mean 'd_opsd'?"),
        ({"method": {"divergence": "kl"}}, "method.divergence.name 'kl' is unknown; did you mean 'forward_kl' or 'rev"),
        ({"method": {"contexts": "sufix"}}, "method.contexts.0.name 'sufix' is unknown; did you mean 'suffix'?"),
        ({"method": {"contexts": [{"name": "suffix", "ration": 1}]}}, "did you mean 'method.contexts.0.ratio'?"),
        ({"task": {"name": "sudoku", "promt": ""}}, "unknown key 'task.promt'; did you mean 'task.prompt'?"),
    ],
)
def test_misspelt_keys_and_names_are_refused_alike_with_and_without_the_libraries(tree: dict[str, Any], said: str):
    assert said in refusal(tree)
    with pytest.raises(InputError) as refused:
        check_names({"task": TASK, **tree})
    assert str(refused.value) == refusal(tree)


def test_right_configs_are_not_refused_without_the_libraries():
    for name in shipped_configs():
        check_names(read_config(name))
        check_names(json.loads(json.dumps(resolved(name))))


def test_short_names_of_types_are_understood():
    config = build_config({"task": TASK, "model": {"dtype": "fp32"}, "optim": {"autocast": "bf16"}})
    assert (config.model.dtype, config.optim.autocast) == ("float32", "bfloat16")


@pytest.mark.parametrize("words", [["--lr", "1e-4"], ["--lr=1e-4"], ["--learning-rate", "1e-4"]])
def test_settings_written_as_options_are_answered_by_the_key(words: list[str], capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as ended:
        main(["train", "quickstart", *words])
    assert ended.value.code == 2
    assert "write settings as key=value, as in optim.lr=" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["eval", "runs/nope"], "'runs/nope' is no folder here, and no run; correct the path"),
        (["export", "runs/nope", "--to", "peft", "out"], "'runs/nope' does not exist; give the folder that"),
        (["train", "runs/nope"], "there is no config file and no run 'runs/nope'; correct the path"),
        (["train", "folder"], "folder 'folder' holds no run (config.yaml is missing)"),
        (["train", "open.yaml"], "a { is not closed by }, or a comma is missing between its keys in line 2"),
        (["train", "twice.yaml"], "the key 'seed' is given twice in line 3"),
        (["train", "quickstart", "optim.autocast=true"], "optim.autocast is True; choose bfloat16 or null"),
        (["train", "quickstart", "model.lora={rank:8}"], "put a space after the colon: {rank: 8}"),
        (["train", "quickstart", "method.contexts.ratio=0.5"], "number its entries from 0, as in method.contexts.0"),
        (["train"], "the following arguments are required: CONFIG"),
    ],
)
def test_a_mistake_is_answered_in_one_sentence_with_the_remedy(
    words: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "open.yaml").write_text("task: {name: sudoku\nmodel: x\n", encoding="utf-8")
    (tmp_path / "twice.yaml").write_text("task: sudoku\nseed: 1\nseed: 2\n", encoding="utf-8")
    try:
        status = main(words)
    except SystemExit as ended:
        status = ended.code
    told = capsys.readouterr().err
    assert status == 2
    assert said in told
    assert told.count("\n") == 1
