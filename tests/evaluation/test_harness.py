import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable, Sequence
from importlib.metadata import EntryPoint
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dllm_sd import load_policy
from dllm_sd.decoding.settings import Decoding
from dllm_sd.errors import InputError
from dllm_sd.evaluation.harness import HarnessModel, cut_at_stop, main, register
from dllm_sd.evaluation.likelihood import log_likelihoods, written_greedily
from dllm_sd.network.view import View
from dllm_sd.policies.masked_diffusion import MaskedDiffusion
from dllm_sd.pretrained.model import Lora
from dllm_sd.randomness import make_key
from tests.test_docs import ROOT, section

PROMPTS = ["1+2=", "(3,4):", "7", "1203004000000000", "9*9-8="]
ADVICE = (
    "{% for m in messages %}{{ m['role'] }}:{{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}>{% endif %}"
)


def request(*args: Any) -> Any:
    """What the harness asks."""
    return SimpleNamespace(args=args)


def requests(texts: Sequence[str], **wanted: Any) -> list[Any]:
    return [request(text, wanted) for text in texts]


@pytest.fixture
def make_model(policy: MaskedDiffusion) -> Callable[..., HarnessModel]:
    """Wraps the random policy."""
    settings: dict[str, Any] = {"length": 12, "block_length": 4, "tokens_per_step": 1, "batch_size": 3}
    return lambda **options: HarnessModel(policy=policy, **(settings | options))


def tokens(policy: MaskedDiffusion, text: str) -> list[int]:
    return policy.encode_completion(text)[:-1]


def test_texts_are_those_of_the_sampler(policy, make_model):
    settings = Decoding(length=12, block_length=4, tokens_per_step=1)
    done = policy.decode([tokens(policy, text) for text in PROMPTS], settings, [0] * len(PROMPTS))
    wanted = [policy.text(row[:n].tolist()) for row, n in zip(done.tokens, done.length.tolist(), strict=True)]
    assert make_model().generate_until(requests(PROMPTS), disable_tqdm=True) == wanted
    assert len(set(wanted)) > 1


def test_settings_of_decode_reach_the_sampler(policy, make_model):
    options: dict[str, Any] = {"length": 8, "block_length": 8, "temperature": 0.7, "order": "random", "guidance": 0.5}
    options |= {"steps": 4, "early_end": False}
    key = make_key(3, "harness", PROMPTS[0], 0)
    done = policy.decode([tokens(policy, PROMPTS[0])], Decoding(**options), [key])
    text = policy.text(done.tokens[0, : int(done.length)].tolist())
    assert make_model(**options, seed=3).generate_until(requests(PROMPTS[:1])) == [text]


def test_neither_batch_nor_company_changes_a_sampled_text(make_model):
    whole = make_model(temperature=1.0, batch_size=5).generate_until(requests(PROMPTS))
    alone = make_model(temperature=1.0, batch_size=1)
    assert [alone.generate_until([one])[0] for one in requests(PROMPTS)] == whole
    assert make_model(temperature=1.0, batch_size=2).generate_until(requests(PROMPTS[::-1])) == whole[::-1]
    assert make_model(temperature=1.0, seed=1).generate_until(requests(PROMPTS)) != whole


def test_repeats_of_a_prompt_are_samples_of_their_own(make_model):
    texts = make_model(temperature=1.0).generate_until(requests(PROMPTS[:1] * 4))
    assert len(set(texts)) > 1


def test_what_nobody_sets_the_task_decides(make_model):
    def settings(wanted: dict[str, Any], **options: Any) -> Decoding:
        return make_model(**options)._settings(wanted)

    assert settings({"max_gen_toks": 6}, length=None).length == 8
    assert settings({}, length=None).length == 256
    assert settings({"max_gen_toks": 6}).length == 12
    assert settings({"temperature": 0.6}).temperature == 0.6
    assert settings({"temperature": 0.6, "do_sample": False}).temperature == 0.0
    assert settings({"do_sample": True}).temperature == 1.0
    assert settings({"do_sample": True}, temperature=0.2).temperature == 0.2


@pytest.mark.parametrize(
    ("text", "until", "left"),
    [
        ("12\n34", ["\n"], "12"),
        ("12\n34", ["4", "\n", "3"], "12"),
        ("12", ["", "5"], "12"),
        ("12", ["12"], ""),
        ("1234", [], "1234"),
    ],
)
def test_a_text_ends_before_its_first_stop(text, until, left):
    assert cut_at_stop(text, until) == left


def test_stops_cut_what_the_sampler_wrote(make_model):
    model = make_model()
    texts = model.generate_until(requests(PROMPTS))
    assert sum(map(bool, texts)) > 2
    for i, text in [(i, text) for i, text in enumerate(texts) if text]:
        stop = text[len(text) // 2]
        assert model.generate_until(requests([PROMPTS[i]], until=[stop])) == [text[: text.index(stop)]]
        assert model.generate_until(requests([PROMPTS[i]], until=stop)) == [text[: text.index(stop)]]


def test_a_special_token_is_a_stop_as_well(make_model):
    assert make_model()._text([5, 6, 3, 7], ["<|unk|>", "x"]) == "12"
    assert make_model()._text([5, 6, 3, 7], ["x"]) == "123"


def test_likelihoods_are_those_of_the_estimator(policy, make_model):
    pairs = [("1+2=", "3"), ("1+2=", "4,5"), ("", "77"), ("1+2= ", "3"), ("1+2=", "")]
    model = make_model(mc_samples=2, seed=5)
    found = model.loglikelihood([request(*pair) for pair in pairs], disable_tqdm=True)
    keys = [make_key(5, "likelihood", *pair) for pair in pairs]
    read = [pairs[0], pairs[1], pairs[2], ("1+2=", " 3"), pairs[4]]
    ours = [(tokens(policy, prompt), tokens(policy, answer)) for prompt, answer in read]
    assert [value for value, _ in found] == pytest.approx(log_likelihoods(policy, ours, keys, samples=2), abs=1e-9)
    assert [greedy for _, greedy in found] == written_greedily(policy, ours)
    unchecked = make_model(mc_samples=2, seed=5, check_greedy=False).loglikelihood([request(*pair) for pair in pairs])
    assert not any(greedy for _, greedy in unchecked)


def test_a_greedy_answer_is_recognised(make_model):
    model = make_model(length=4)
    text = model.generate_until(requests(PROMPTS))[0]
    if len(text) == 4:
        assert model.loglikelihood([request(PROMPTS[0], text)])[0][1]
    assert model.loglikelihood([request(PROMPTS[0], "<|mask|>")])[0][1] is False


def test_conversations_are_written_by_the_renderer_of_the_policy(make_policy):
    model = HarnessModel(policy=make_policy(chat_template=ADVICE))
    history = [{"role": "user", "content": "1+1"}]
    assert model.apply_chat_template(history) == model._chat.render(history) == "user:1+1\n>"
    begun = [*history, {"role": "assistant", "content": "2"}]
    assert model.apply_chat_template(begun, add_generation_prompt=False) == "user:1+1\nassistant:2"
    assert model.chat_template(True) == ADVICE
    other = HarnessModel(policy=make_policy())
    assert model.tokenizer_name != other.tokenizer_name
    with pytest.raises(InputError, match="chat_template"):
        model.chat_template("rag")


def test_a_prompt_that_is_too_long_loses_its_beginning(make_model, logged):
    model = make_model()
    most = model.policy.module.model.config.max_position_embeddings
    assert model._prompt("1" + "2" * most, 12) == [6] * (most - 12)
    assert "loses its beginning" in logged.getvalue()


def test_a_block_causal_model_is_read_in_its_own_blocks(make_policy):
    model = HarnessModel(policy=make_policy(block_length=4), batch_size=2)
    assert model.decode["block_length"] == 4
    assert model._settings({"max_gen_toks": 10}).length == 12
    with pytest.raises(InputError, match="block-causal"):
        HarnessModel(policy=make_policy(block_length=4), block_length=8)


def test_model_args_reach_the_loader_and_go_before_options_of_the_command_line():
    args = {"pretrained": "tiny", "dtype": "float64", "batch_size": 7, "model_block_length": None}
    model = HarnessModel.create_from_arg_obj(args, {"batch_size": "2", "device": "cpu", "max_batch_size": None})
    assert model.batch_size == 7
    assert model.device == torch.device("cpu")
    assert next(model.policy.module.parameters()).dtype == torch.float64
    assert model.get_model_info()["decode"]["block_length"] == 32


def test_an_adapter_is_put_on(tmp_path: Path):
    trained = load_policy("tiny", lora=Lora(rank=4, alpha=8))
    with torch.no_grad():
        for name, weight in trained.module.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.3)
    model: Any = trained.module.model
    model.save_pretrained(str(tmp_path))
    ids = torch.tensor([[5, 6, 0, 0]])
    view = View(ids, ids >= 0, ids == 0)
    folded = HarnessModel("tiny", adapter=str(tmp_path)).policy
    with torch.no_grad():
        assert torch.allclose(folded.site_logits(view), trained.site_logits(view), atol=1e-4)
        assert not torch.allclose(folded.site_logits(view), load_policy("tiny").site_logits(view), atol=1e-2)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({}, "pretrained"),
        ({"pretrained": "tiny", "nonsense": 1}, "nonsense"),
        ({"pretrained": "tiny", "batch_size": "auto"}, "batch_size"),
        ({"pretrained": "tiny", "mc_samples": 0}, "mc_samples"),
        ({"pretrained": "tiny", "dtype": "auto"}, "dtype"),
        ({"pretrained": "tiny", "length": 10}, "block_length"),
        ({"pretrained": "tiny", "adapter": "/nowhere/at/all"}, "adapter"),
    ],
)
def test_what_cannot_work_is_refused_in_a_sentence(options, word):
    with pytest.raises(InputError, match=word):
        HarnessModel(**options)


def test_perplexity_is_refused(make_model):
    with pytest.raises(InputError, match="rolling"):
        make_model().loglikelihood_rolling([request("12")])


def test_the_entry_point_leads_to_the_model():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    ((name, value),) = project["entry-points"]["lm_eval.models"].items()
    assert name == "dllm-sd"
    assert EntryPoint(name, value, "lm_eval.models").load() is HarnessModel


def test_without_the_harness_one_sentence_says_so(monkeypatch, capsys):
    monkeypatch.setattr("dllm_sd.evaluation.harness._LM", object)
    assert main() == 2
    assert "pip install 'dllm-sd[lm-eval]'" in capsys.readouterr().err


def write_tasks(folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The tasks and the data of the document, with fewer puzzles."""
    text = section(ROOT / "docs" / "evaluation.md", "lm-eval")
    fences = re.findall(r"^```(\w+)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    (source,) = [code for name, code in fences if name == "python"]
    monkeypatch.chdir(folder)
    exec(compile(source.replace("range(200)", "range(24)"), "evaluation.md", "exec"), {})
    tasks = [code for name, code in fences if name == "yaml"]
    assert len(tasks) == 2
    for code in tasks:
        name = code.splitlines()[0].removeprefix("task: ")
        code = code.replace("dataset_kwargs: {", "dataset_kwargs: {cache_dir: cache, ")
        (folder / f"{name}.yaml").write_text(code, encoding="utf-8")
    return [json.loads(line) for line in (folder / "sudoku.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.mark.filterwarnings("ignore")  # those of the harness and of what it imports
def test_the_harness_evaluates_a_policy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("lm_eval")
    from lm_eval import simple_evaluate  # pyright: ignore[reportMissingImports]
    from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]

    documents = write_tasks(tmp_path, monkeypatch)
    register()
    results = simple_evaluate(
        model="dllm-sd",
        model_args="pretrained=tiny,length=16,block_length=4,tokens_per_step=1,mc_samples=8",
        tasks=["sudoku4", "sudoku4_choice"],
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        batch_size=16,
        device="cpu",
        bootstrap_iters=0,
    )
    policy = load_policy("tiny")
    assert isinstance(policy, MaskedDiffusion)
    prompts = [tokens(policy, document["puzzle"]) for document in documents]
    done = policy.decode(prompts, Decoding(length=16, block_length=4, tokens_per_step=1), [0] * len(prompts))
    texts = [policy.text(row[:n].tolist()) for row, n in zip(done.tokens, done.length.tolist(), strict=True)]
    right = sum(text == document["solution"] for text, document in zip(texts, documents, strict=True))
    assert results["results"]["sudoku4"]["exact_match,none"] == pytest.approx(right / len(documents))
    assert 0 < right < len(documents)
    answered = [sample["resps"] for sample in results["samples"]["sudoku4"]]
    assert answered == [[[text]] for text in texts]
    pairs = [(tokens(policy, d["puzzle"]), tokens(policy, choice)) for d in documents for choice in d["choices"]]
    keys = [make_key(0, "likelihood", d["puzzle"], choice) for d in documents for choice in d["choices"]]
    values = torch.tensor(log_likelihoods(policy, pairs, keys, samples=8)).view(-1, 4)
    hits = values.argmax(1) == torch.tensor([document["answer"] for document in documents])
    assert results["results"]["sudoku4_choice"]["acc,none"] == pytest.approx(float(hits.float().mean()))
    assert float(hits.float().mean()) > 0.25


@pytest.mark.filterwarnings("ignore")
def test_the_command_line_of_the_harness_knows_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("lm_eval")
    write_tasks(tmp_path, monkeypatch)

    def harness(model_args: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "dllm_sd.evaluation.harness", "--model", "dllm-sd", "--model_args", model_args]
        command += ["--tasks", "sudoku4", "--include_path", ".", "--batch_size", "4", "--limit", "8"]
        return subprocess.run(command, capture_output=True, text=True, timeout=300)

    done = harness("pretrained=tiny,length=16,block_length=4")
    assert done.returncode == 0, done.stderr
    assert "exact_match" in done.stdout
    done = harness("pretrained=tiny,nonsense=1")
    assert done.returncode == 2
    assert "dllm-sd: unknown model option 'nonsense'" in done.stderr
    assert "Traceback" not in done.stderr
