"""Clients of OpenAI's interface that others wrote, where they are installed: the `openai` package, and lm-eval."""

from pathlib import Path
from typing import Any

import pytest

from dllm_sd.decoding.settings import Decoding
from dllm_sd.policies.loading import build_policy
from dllm_sd.pretrained.model import Model
from dllm_sd.serving.scoring import score
from dllm_sd.serving.service import Limits
from tests.evaluation.test_harness import tokens, write_tasks
from tests.serving.conftest import LIMITS, service_of

served = pytest.importorskip("tests.serving.served", exc_type=ImportError)
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # those of the clients and of what they import

GREEDY = Decoding(length=16, block_length=4, tokens_per_step=1, batch_size=8)
NAMES = ["tiny", "tiny_ar"]


def service(name: str, **limits: int) -> Any:
    model = Model(path=name)
    return service_of(build_policy(model), model, name, decode=GREEDY, limits=Limits(**{**vars(LIMITS), **limits}))


@pytest.mark.parametrize("name", NAMES)
def test_the_openai_client_completes_chats_streams_and_is_told_what_is_wrong(name: str):
    openai = pytest.importorskip("openai")
    one = service(name)
    with served.serving(one, key="secret") as server:
        url = f"http://127.0.0.1:{server.port}/v1"
        client = openai.OpenAI(base_url=url, api_key="secret", max_retries=0)
        (model,) = client.models.list().data
        assert (model.id, model.max_model_len) == (name, LIMITS.prompt + LIMITS.completion)

        prompt = [5, 6, 7]
        done = client.completions.create(model=name, prompt=prompt, max_tokens=8, seed=3, logprobs=1, temperature=0)
        local = one.policy.decode([prompt], Decoding(length=8, block_length=4, tokens_per_step=1), [0])
        written = local.tokens[0, : int(local.length)].tolist()
        assert done.choices[0].text == one.policy.text(written)
        assert done.usage.completion_tokens == len(written) == len(done.choices[0].logprobs.token_logprobs)
        events = client.completions.create(model=name, prompt=prompt, max_tokens=8, stream=True, temperature=0)
        assert "".join(event.choices[0].text for event in events) == done.choices[0].text

        messages = [{"role": "user", "content": "1+2="}]
        chat = client.chat.completions.create(model=name, messages=messages, max_tokens=8, temperature=0, n=2)
        assert len(chat.choices) == 2
        assert {choice.finish_reason for choice in chat.choices} <= {"stop", "length"}
        options: Any = {"stream": True, "stream_options": {"include_usage": True}, "temperature": 0}
        events = [*client.chat.completions.create(model=name, messages=messages, max_tokens=8, **options)]
        said = "".join(event.choices[0].delta.content or "" for event in events if event.choices)
        assert said == chat.choices[0].message.content
        assert events[-1].usage.completion_tokens > 0

        with pytest.raises(openai.NotFoundError, match="no weights are loaded under the name"):
            client.completions.create(model="another", prompt=prompt)
        with pytest.raises(openai.BadRequestError, match="max_tokens is 0"):
            client.completions.create(model=name, prompt=prompt, max_tokens=0)
        with pytest.raises(openai.AuthenticationError, match="key is missing or wrong"):
            openai.OpenAI(base_url=url, api_key="other", max_retries=0).models.list()


def evaluated(server: Any, name: str, tasks: list[str], folder: Path, **options: Any) -> dict[str, Any]:
    from lm_eval import simple_evaluate  # pyright: ignore[reportMissingImports]
    from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]

    assets = Path(__file__).parents[2] / "dllm_sd" / "assets" / name
    arguments = {
        "model": name,
        "base_url": f"http://127.0.0.1:{server.port}/v1/completions",
        "tokenizer": str(assets),
        "num_concurrent": 4,
        "max_length": 560,
        "max_gen_toks": 16,
    }
    results = simple_evaluate(
        model="local-completions",
        model_args={**arguments, **options},
        tasks=tasks,
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        bootstrap_iters=0,
        log_samples=True,
    )
    assert results is not None
    return results


@pytest.mark.parametrize("name", NAMES)
def test_lm_evals_local_completions_generate_as_the_model_does_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
):
    pytest.importorskip("lm_eval")
    documents = write_tasks(tmp_path, monkeypatch)
    one = service(name)
    with served.serving(one) as server:
        results = evaluated(server, name, ["sudoku4"], tmp_path, tokenized_requests=False)
    prompts = [tokens(one.policy, document["puzzle"]) for document in documents]
    done = one.policy.decode(prompts, GREEDY, [0] * len(prompts))
    texts = [one.policy.text(row[:n].tolist()) for row, n in zip(done.tokens, done.length.tolist(), strict=True)]
    right = sum(text == document["solution"] for text, document in zip(texts, documents, strict=True))
    assert results["results"]["sudoku4"]["exact_match,none"] == pytest.approx(right / len(documents))
    said = {sample["doc"]["puzzle"]: sample["resps"][0][0] for sample in results["samples"]["sudoku4"]}
    wanted = {document["puzzle"]: text.split("\n")[0] for document, text in zip(documents, texts, strict=True)}
    assert said == wanted


def test_lm_evals_local_completions_find_choices_as_likely_as_the_model_does_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    pytest.importorskip("lm_eval")
    write_tasks(tmp_path, monkeypatch)
    one = service("tiny_ar")
    with served.serving(one) as server:
        results = evaluated(server, "tiny_ar", ["sudoku4_choice"], tmp_path, tokenized_requests=True)
    compared = 0
    for sample in results["samples"]["sudoku4_choice"]:
        for (context, answer), ((found, _),) in zip(
            [arguments[:2] for arguments in sample["arguments"]], sample["resps"], strict=True
        ):
            whole, start = (one.policy.encode_completion(text, ended=False) for text in (context + answer, context))
            (scores,) = score(one.policy, [whole], 1)
            assert found == pytest.approx(sum(scores.logp[len(start) - 1 :]), abs=1e-3)
            compared += 1
    assert compared > 10
