"""`dllm-sd init`: a model and a data file become a config that `train` takes; what does not fit is one sentence."""

import csv
import gzip
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from dllm_sd.cli import init
from dllm_sd.cli.main import main
from dllm_sd.cli.starter import Starter
from dllm_sd.config import load_config
from dllm_sd.errors import InputError, Unavailable
from dllm_sd.keys import read_schema
from dllm_sd.methods import METHODS
from dllm_sd.pairing import check_model
from dllm_sd.policies.loading import empty_network
from dllm_sd.pretrained.blueprint import read_blueprint
from dllm_sd.pretrained.model import Model
from dllm_sd.tasks.columns import Columns, find_columns
from dllm_sd.tasks.formats import Row

NONE: Mapping[str, str | None] = dict.fromkeys(("question", "answer", "reference", "grader"))
FAST = ["updates=2", "eval.every=2", "method.rollout.problems=4", "log.progress=false", "log.trackers=[]"]
"""What makes the test fast, and nobody needs."""


@pytest.fixture(autouse=True)
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A working directory with 50 lines of questions and answers."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.stdin.isatty", lambda: False, raising=False)
    rows = [{"question": f"{n % 4}{n // 4 % 4}{n // 16}", "answer": str(n % 4)} for n in range(50)]
    Path("own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def found(*fields: dict[str, Any], **given: str) -> Columns:
    return find_columns([Row(f"line {n}", n, row) for n, row in enumerate(fields)], {**NONE, **given})


def test_a_model_and_a_file_become_a_config_that_is_valid(capsys: pytest.CaptureFixture[str]):
    assert main(["init", "--model", "tiny", "--data", "own.jsonl"]) == 0
    said = capsys.readouterr().out
    assert "begin with: dllm-sd train own.yaml" in said
    assert "dllm-sd probe own.yaml shows how many the model makes" in said  # d_opsd needs correct rollouts
    assert main(["init", "--model", "tiny", "--data", "own.jsonl", "--method", "sft", "--out", "sft.yaml"]) == 0
    assert "dllm-sd probe" not in capsys.readouterr().out
    assert main(["init", "--model", "tiny_ar", "--data", "own.jsonl", "--method", "sdpo", "--out", "ar.yaml"]) == 0
    assert "sdpo needs correct rollouts" in capsys.readouterr().out  # its hints are successful attempts
    config, lines = load_config("own.yaml"), Path("own.yaml").read_text().splitlines()
    schema = next(line for line in lines if line.startswith("# yaml-language-server: $schema="))
    assert json.loads(Path(schema.partition("=")[2]).read_text()) == read_schema()
    assert (config.run, config.model.path, config.method.name) == ("runs/own", "tiny", "d_opsd")
    assert config.task.grade(config.task.problems("dev")[0], "it is 9").correct is False
    assert config.task.answer_field == "answer"  # pyright: ignore[reportAttributeAccessIssue]
    assert sum("  # " in line for line in lines) > 8
    pytest.importorskip("jsonschema").Draft7Validator(read_schema()).validate(init.parse_yaml("\n".join(lines), "it"))


def test_a_model_that_is_not_here_is_known_by_its_shape(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def absent(model: Model) -> None:
        raise Unavailable("there is no config.json")

    monkeypatch.setattr(init, "read_blueprint", absent)
    monkeypatch.setattr("dllm_sd.pairing.read_blueprint", absent)
    assert main(["init", "--model", "GSAI-ML/LLaDA-8B-Instruct", "--data", "own.jsonl"]) == 0
    assert "not checked against the model's files: there is no config.json" in capsys.readouterr().err
    config, text = load_config("own.yaml"), Path("own.yaml").read_text()
    assert (config.method.name, config.model.dtype, config.decode.block_length) == ("d_opsd", "bfloat16", 32)
    assert config.model.lora is not None
    assert config.task.prompt.endswith("by itself, inside \\boxed{{}}.")  # pyright: ignore[reportAttributeAccessIssue]
    assert "not measured without a tokenizer" in text


@pytest.mark.slow
@pytest.mark.learns_nothing
@pytest.mark.parametrize("model", ["tiny", "tiny_ar"])
def test_what_init_writes_trains(model: str):
    assert main(["init", "--model", model, "--data", "own.jsonl"]) == 0
    assert main(["train", "own.yaml", *FAST]) in (0, 3)  # two updates need not learn anything
    assert json.loads(Path("runs/own/report.json").read_text())["updates"] == 2


@pytest.mark.parametrize("name", ["data.csv", "data.csv.gz", "data.jsonl.gz", "data.parquet"])
def test_every_format_is_read(name: str):
    rows = [{"Question": f"{n}+1=", "Final Answer": str(n + 1), "note": "x"} for n in range(20)]
    if "parquet" in name:
        pytest.importorskip("pyarrow.parquet").write_table(pytest.importorskip("pyarrow").Table.from_pylist(rows), name)
    with Path("plain").open("w", newline="") as file:
        if "csv" in name:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
        else:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    if "parquet" not in name:
        text = Path("plain").read_bytes()
        Path(name).write_bytes(gzip.compress(text) if name.endswith(".gz") else text)
    assert main(["init", "--model", "tiny_ar", "--data", name, "--method", "sft", "--out", "it.yaml"]) == 0
    task: Any = load_config("it.yaml").task
    assert (task.prompt, task.answer_field, task.grader) == ("{Question}", "Final Answer", "number")
    assert len(task.problems("train")) == 18


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"question": "1+1", "answer": 2}, ("question", "answer", "answer", "number", False)),
        ({"question": "1+1", "answer": "one and one #### 2"}, ("question", "answer", "answer", "number", False)),
        ({"problem": "x", "solution": "y" * 90, "answer": "4"}, ("problem", "answer", "solution", "number", True)),
        ({"problem": "x", "answer": "$x^2$"}, ("problem", "answer", "answer", "math", False)),
        ({"q": "who", "a": "she"}, ("q", "a", "a", "exact", False)),
        ({"instruction": "say", "output": "z" * 90}, ("instruction", "output", "output", "exact", True)),
        ({"question": "x", "options": ["a", "b"], "answer": "B"}, ("question", "answer", "answer", "choice", False)),
        (
            {"messages": [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}]},
            ("messages", "messages", "messages", "number", False),
        ),
    ],
)
def test_columns_and_grader_are_found_by_name_and_content(row: dict[str, Any], expected: tuple[Any, ...]):
    columns = found(row, row)
    assert (columns.question, columns.answer, columns.reference, columns.grader, columns.worked) == expected


def test_named_columns_come_before_known_ones():
    row = {"question": "x", "answer": "1", "left": "a", "right": "b", "how": "c"}
    columns = found(row, question="left", answer="right", reference="how", grader="f.py:score")
    assert (columns.question, columns.answer, columns.reference) == ("left", "right", "how")
    assert columns.grader == "f.py:score"
    assert found({"question": "x", "note": "y"}, grader="f.py:score").answer is None


@pytest.mark.parametrize(
    ("rows", "given", "said"),
    [
        ([{"left": "x", "answer": "1"}], {}, r"hold the questions; name it by --question \(there are 'left, answer'\)"),
        ([{"question": "x", "b": "1"}], {}, r"hold the answers; name it by --answer \(there are 'b'\)"),
        ([{"question": "x", "answer": "1"}], {"answer": "nope"}, "--answer 'nope' is no column that every row fills"),
        ([{"question": "x", "answer": "1"}, {"question": "y", "answer": ""}], {}, "hold the answers"),
        ([{"question": "x", "answer": ["1"]}], {}, "the answer must be a string or a number"),
        ([{"question": None}], {}, "no column is filled in every row"),
    ],
)
def test_data_without_a_question_or_an_answer_is_refused(rows: list[dict[str, Any]], given: dict[str, str], said: str):
    with pytest.raises(InputError, match=said):
        found(*rows, **given)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--data", "own.jsonl"], "--model is missing"),
        (["--model", "tiny"], "--data is missing"),
        (["--model", "tiny", "--data", "nope.jsonl"], "--data: nope.jsonl cannot be read"),
        (["--model", ".", "--data", "own.jsonl"], "there is no config.json at '.'"),
        (["--model", "tiny", "--data", "own.jsonl", "--method", "d-opsdd"], "did you mean 'd_opsd'?"),
        (["--model", "tiny", "--data", "own.jsonl", "--method", "opd"], "opd needs more than init can write"),
        (["--model", "tiny_ar", "--data", "own.jsonl", "--method", "d_opsd"], "model.as=diffusion"),
        (["--model", "tiny", "--data", "own.jsonl", "--out", "there.yaml"], "is there already"),
        (["--model", "tiny", "--data", "own.jsonl", "--out", "link.yaml"], "is there already"),
        (["--model", "tiny", "--data", "own.jsonl", "--out", "it.txt"], "must end in .yaml"),
        (["--model", "tiny", "--data", "own.jsonl", "--out", "a\nb.yaml"], "cannot be printed"),
        (["--model", "tiny", "--data", "own.jsonl", "--out", "no/it.yaml"], "a folder that does not exist"),
        (["--model", "tiny", "--data", "own.jsonl", "optim.lr=1"], "init takes no settings"),
        (["--model", "tiny", "--data", "own.jsonl", "--grader", "exakt"], "choose exact, number"),
    ],
)
def test_what_is_wrong_is_one_sentence_and_writes_nothing(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
):
    Path("there.yaml").write_text("mine\n")
    Path("link.yaml").symlink_to("nowhere")
    before = sorted(path.name for path in Path().iterdir())
    assert main(["init", *words]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert sorted(path.name for path in Path().iterdir()) == before
    assert Path("there.yaml").read_text() == "mine\n"


def test_a_terminal_is_asked_for_what_is_missing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    answers = iter(["tiny", "own.jsonl", "", "sft"])
    asked: list[str] = []
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda question: asked.append(question) or next(answers))
    assert main(["init"]) == 0
    assert [question.split()[0] for question in asked] == ["model", "data", "out", "method"]
    assert "[own.yaml]" in asked[2]
    assert "[d_opsd]" in asked[3]
    assert load_config("own.yaml").method.name == "sft"
    monkeypatch.setattr("builtins.input", lambda question: "")
    assert main(["init"]) == 2
    assert "--model is missing" in capsys.readouterr().err


@pytest.mark.parametrize("model", ["tiny", pytest.param("tiny_ar", marks=pytest.mark.slow)])
def test_every_method_is_written_as_a_valid_config_or_refused(model: str):
    rows = [Row(f"line {n}", n, {"question": f"{n}", "answer": f"{n}"}) for n in range(50)]
    blueprint, columns, written = read_blueprint(Model(path=model)), find_columns(rows, NONE), []
    refused: dict[str, str] = {}
    weights = sum(parameter.numel() for parameter in empty_network(blueprint).parameters())
    for method in METHODS:
        made = Starter("a b.yaml", "a b", blueprint.model, "own.jsonl", rows, columns, blueprint, weights, method)
        try:
            init.check_trainable(made.text())
            written.append(method)
        except InputError as error:
            refused[method] = str(error)
    assert {"sft", "rft"} < set(written)
    assert ("d_opsd" in written) == (model == "tiny")
    assert [method for method, said in refused.items() if len(said.splitlines()) != 1 or ";" not in said] == []


def test_an_autoregressive_model_is_made_a_masked_diffusion_model():
    words = ["init", "--model", "tiny_ar", "--as", "diffusion", "--data", "own.jsonl", "--method", "sft"]
    assert main(words) == 0
    config = load_config("own.yaml")
    assert config.model.as_ == "diffusion"
    assert check_model(config).mask_id is not None
    assert "block_length" in Path("own.yaml").read_text()
