"""The mistakes that new users make: each is answered in one sentence with the remedy, before anything is made."""

import json
from pathlib import Path

import pytest

from dllm_sd.cli.main import main

RUN = ["train", "quickstart", "updates=1", "run=out"]
MISTAKES: dict[str, tuple[list[str], tuple[str, ...]]] = {
    "a misspelt section": ([*RUN, "optm.lr=1"], ("'optm'", "did you mean 'optim'")),
    "a key of another trainer": ([*RUN, "lr=1e-3"], ("did you mean 'optim.lr'",)),
    "a batch size": ([*RUN, "batch_size=4"], ("'method.rollout.problems'", "'decode.batch_size'")),
    "text for a number": ([*RUN, "optim.lr=fast"], ("optim.lr must be a number, not 'fast'",)),
    "a list too short": ([*RUN, "optim.betas=[0.9]"], ("optim.betas", "give 2")),
    "a number below its range": ([*RUN, "optim.lr=-1"], ("optim.lr is -1", "above 0")),
    "no updates": ([*RUN, "updates=-1"], ("updates is -1", "at least 1")),
    "no block": ([*RUN, "decode.block_length=0"], ("decode.block_length is 0", "from 1")),
    "no problems": ([*RUN, "eval.problems=0"], ("eval.problems is 0", "from 1")),
    "a misspelt config": (["train", "quickstrat"], ("did you mean 'quickstart'",)),
    "a run that is not there": (["train", "runs/nope"], ("'runs/nope'", "no run", "correct the path")),
    "an evaluation of nothing": (["eval", "runs/nope"], ("'runs/nope'", "correct the path")),
    "a bracket left open": (["train", "open.yaml"], ("'open.yaml'", "line 2", "correct it")),
    "a key given twice": (["train", "twice.yaml"], ("'seed' is given twice", "line 2")),
    "an empty config": (["train", "empty.yaml"], ("'empty.yaml'", "model, task and method")),
    "a folder that is not there": ([*RUN, "model.path=./none"], ("'./none' is not a folder", "hub name")),
    "a web address": ([*RUN, "model.path=https://hub/Qwen/X"], ("is a web address", "name on the hub")),
    "a misspelt method": ([*RUN, "method=D-OPSD"], ("did you mean 'd_opsd'",)),
    "half a name": ([*RUN, "method.divergence=kl"], ("'forward_kl' or 'reverse_kl'",)),
    "a block that does not divide": ([*RUN, "decode.block_length=5"], ("does not divide decode.length 16", "choose")),
    "an unknown type": ([*RUN, "model.dtype=bf17"], ("'bf17'", "choose from", "bfloat16")),
    "a switch for a type": ([*RUN, "optim.autocast=true"], ("choose bfloat16 or null",)),
    "4 bits without adapters": ([*RUN, "model.quantization=4bit"], ("set model.lora",)),
    "a task without data": (["train", "nodata.yaml"], ("set task.data",)),
    "a broken line": (["train", "nodata.yaml", "task.data=broken.jsonl"], ("broken.jsonl, line 2", "one JSON object")),
    "no such data": (["train", "nodata.yaml", "task.data=none.jsonl"], ("none.jsonl cannot be read", "give the path")),
    "data on the web": (["train", "nodata.yaml", "task.data=https://x/y.jsonl"], ("is a web address", "download")),
    "a field without quotes": ([*RUN, "task.prompt={quesion}"], ("put it in quotes",)),
    "a misspelt field": ([*RUN, "task.prompt='{quesion}'"], ("task.prompt asks for {quesion}", "there are: {puzzle}")),
    "no space after a colon": ([*RUN, "model.lora={rank:8}"], ("put a space after the colon",)),
    "a list without an index": ([*RUN, "method.contexts.ratio=0.5"], ("is a list", "method.contexts.0")),
    "an index too large": ([*RUN, "method.contexts.5.ratio=0.5"], ("does not exist", "number them from 0")),
    "no contexts": ([*RUN, "method.contexts=[]"], ("method.contexts is empty", "list a context")),
    "no arguments": (["train"], ("required: CONFIG", "--help")),
    "an option for a key": ([*RUN, "--lr", "1e-4"], ("there is no option '--lr'", "optim.lr=1e-4")),
    "a setting of a list": (["list", "methods", "lr=1"], ("takes no settings", "leave out 'lr=1'")),
    "a negative seed": ([*RUN, "seed=-1"], ("seed is -1", "at least 0")),
    "a key of another part": ([*RUN, "method.teacher.decay=0.9"], ("method.teacher is a list", "method.teacher.0")),
    "adapters on no layer": ([*RUN, "model.lora={targets: [nope]}"], ("'nope'", "linear layers of this model")),
    "a teacher without a model": ([*RUN, "method=opd"], ("method.teacher.0.path is missing", "name the checkpoint")),
    "an export of no run": (["export", "none", "--to", "peft", "out"], ("'none' does not exist", "give the folder")),
    "rubrics that are not there": ([*RUN, "method=d_rcsd"], ("needs a rubric", "set method.contexts.0.prompt.field")),
    "no attempts": (["eval", "tiny", "--task", "sudoku", "--attempts", "0"], ("--attempts", "from 1")),
    "no processes": (["show", "quickstart", "--processes", "0"], ("--processes", "from 1")),
    "half precision": ([*RUN, "model.dtype=float16"], ("model.dtype float16", "set model.dtype to float32")),
    "a token that is not there": ([*RUN, "model.end_tokens=[foo]"], ("no token 'foo'", "model.end_tokens")),
    "a typo in an evaluation": (["eval", "tiny", "--task", "sudoku", "evl.problems=3"], ("did you mean 'eval'",)),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_of_a_newcomer_is_answered_in_one_sentence_with_the_remedy(
    mistake: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    files = {
        "open.yaml": "task: {name: sudoku\nmodel: [",
        "twice.yaml": "seed: 1\nseed: 2\ntask: sudoku\n",
        "empty.yaml": "",
        "nodata.yaml": "task: {name: jsonl}\nmodel: {path: tiny}\n",
        "broken.jsonl": json.dumps({"question": "1", "answer": "2"}) + '\n{"question": "1\n',
    }
    for name, text in files.items():
        Path(name).write_text(text)
    words, expected = MISTAKES[mistake]
    try:
        status = main(words)
    except SystemExit as end:
        status = end.code
    out, err = capsys.readouterr()
    assert status == 2
    assert err.count("\n") == 1
    assert err.startswith("dllm-sd: ")
    assert len(err) < 500
    assert all(part in err for part in expected), err
    assert out == "" or words[0] == "show"
    assert {path.name for path in tmp_path.iterdir()} == {*files}
