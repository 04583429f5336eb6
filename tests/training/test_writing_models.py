"""Models that write for hints: whose words they are, and what is not written twice."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import save_file

from dllm_sd.decoding.settings import Decoding
from dllm_sd.errors import InputError
from dllm_sd.experience.text_generator import TextGenerator
from dllm_sd.export.exporting import export_policy
from dllm_sd.policies.loading import AnyPolicy, build_policy
from dllm_sd.policies.weights import (
    BaseWeights,
    CheckpointWeights,
    EmaWeights,
    LiveWeights,
    PeerWeights,
    SnapshotWeights,
    TeacherModel,
    trained,
)
from dllm_sd.pretrained.model import Lora, Model
from dllm_sd.randomness import make_key
from dllm_sd.teachers.writing import Writing
from dllm_sd.training.checkpoint import State, save_best
from dllm_sd.writers import Cache, Request, Sampling
from tests.tiers import crossed, later
from tests.training.several import Processes, gathering, move

DECODE = Decoding(length=8, block_length=4, tokens_per_step=1)
SAMPLING = Sampling(length=8, temperature=1.0)
REQUESTS = [Request(({"role": "user", "content": text},), i) for i, text in enumerate(("1+2=", "3*4", "1+2="))]
LORA = {"lora": Lora(rank=2, alpha=8)}
FULL: dict[str, Any] = {}
FULL_FIRST = pytest.mark.parametrize("kind", [FULL, *later(LORA)])
LORA_FIRST = pytest.mark.parametrize("kind", [LORA, *later(FULL)])
"""Both kinds of students; one in the first tier."""


def texts(policy: AnyPolicy) -> list[str]:
    """What a policy as it is now answers, by plain decoding."""
    settings = Decoding(length=8, block_length=4, tokens_per_step=1, temperature=1.0)
    prompts = [policy.encode(request.messages) for request in REQUESTS]
    done = policy.decode(prompts, settings, [make_key("writer", request.key) for request in REQUESTS])
    return [policy.text(row[:end].tolist()) for row, end in zip(done.tokens, done.length.tolist(), strict=True)]


def scribe(models: dict[Any, TeacherModel], folder: Path, longest: int = 100) -> TextGenerator:
    return TextGenerator([], DECODE, Accelerator(), models, Cache(folder), longest)


@LORA_FIRST
def test_live_weights_write_anew_and_initial_ones_from_the_disk(make_policy, kind, tmp_path, monkeypatch):
    policy = make_policy(**kind)
    before = texts(policy)
    models: dict[Any, TeacherModel] = {
        BaseWeights(): TeacherModel(BaseWeights(), policy),
        LiveWeights(): TeacherModel(LiveWeights(), policy),
    }
    move(policy, 1)
    after, writer = texts(policy), scribe(models, tmp_path)
    assert after != before
    for part, expected in ((BaseWeights(), before), (LiveWeights(), after)):
        first = writer.write(Writing(part, SAMPLING), REQUESTS)
        assert [one.text for one in first] == [text if text.strip() else None for text in expected]
        assert not any(one.cached for one in first)
        again = scribe(models, tmp_path).write(Writing(part, SAMPLING), REQUESTS)
        assert [one.text for one in again] == [one.text for one in first]
        assert [one.cached for one in again] == [
            isinstance(part, BaseWeights) and one.text is not None for one in first
        ]
    assert texts(policy) == after


@FULL_FIRST
def test_a_peer_writes_with_what_another_run_trained(make_policy, kind, tmp_path):
    other, policy = make_policy(**kind), make_policy(**kind)
    move(other, 2)
    save_file({name: value.detach() for name, value in trained(other).items()}, tmp_path / "model.safetensors")
    peer, before = PeerWeights(str(tmp_path)), texts(policy)
    written = scribe({peer: TeacherModel(peer, policy)}, tmp_path / "cache").write(Writing(peer, SAMPLING), REQUESTS)
    assert [one.text for one in written] == [text if text.strip() else None for text in texts(other)]
    assert texts(policy) == before


def test_a_peers_exported_adapter_is_the_same_peer(make_policy, tmp_path):
    other, policy = make_policy(**LORA), make_policy(**LORA)
    move(other, 2)
    other.module.model.save_pretrained(tmp_path)
    found = PeerWeights(str(tmp_path)).read(policy)
    assert found.keys() == trained(policy).keys()
    assert all(torch.equal(value, trained(other)[name]) for name, value in found.items())
    begun = make_policy(lora=Lora(rank=2, alpha=8, start=str(tmp_path)))
    assert texts(begun) == texts(other)


def test_a_peer_of_another_shape_or_none_is_refused_in_one_sentence(make_policy, tmp_path):
    policy = make_policy(lora=Lora(rank=2, alpha=8, targets=("q_proj",)))
    make_policy(lora=Lora(rank=2, alpha=8, targets=("k_proj",))).module.model.save_pretrained(tmp_path)
    for folder, says in ((tmp_path / "none", "there is no usable peer"), (tmp_path, "of the student's shape")):
        with pytest.raises(InputError, match=says) as refusal:
            PeerWeights(str(folder)).read(policy)
        assert "\n" not in str(refusal.value)


def test_a_request_that_is_too_long_is_not_written(make_policy, tmp_path):
    policy = make_policy()
    models: dict[Any, TeacherModel] = {BaseWeights(): TeacherModel(BaseWeights(), policy)}
    written = scribe(models, tmp_path, longest=3).write(Writing(BaseWeights(), SAMPLING), REQUESTS)
    assert [one.failure for one in written] == ["long_request", None, "long_request"]


# Every kind of writer, on both backbones.


CAUSAL = {"as_": "autoregressive"}
WRITERS = (
    *(LiveWeights(), BaseWeights(), EmaWeights(0.5)),
    *(SnapshotWeights(2), CheckpointWeights("other"), PeerWeights("PEER")),
)


def shown(found: Sequence[str]) -> list[str | None]:
    """Texts as a writer hands them over."""
    return [text if text.strip() else None for text in found]


def cast(
    make_policy: Any, kind: dict[str, Any], part: Any, folder: Path
) -> tuple[AnyPolicy, Any, TeacherModel, list[Any]]:
    """A student that has moved, its writer, and what the writer's weights say."""
    other, policy = make_policy(**kind, seed=5), make_policy(**kind)
    move(policy, 1)
    if isinstance(part, PeerWeights):
        other = make_policy(**kind)
        move(other, 2)
        folder.mkdir()
        save_file({name: value.detach() for name, value in trained(other).items()}, folder / "model.safetensors")
        part = PeerWeights(str(folder))
    bare = make_policy(**kind) if kind.get("lora") else policy
    former = shown(texts(bare if isinstance(part, BaseWeights) else policy))
    model = TeacherModel(part, policy, other=other if isinstance(part, CheckpointWeights) else None)
    move(policy, 3)
    now = shown(texts(policy))
    says = {LiveWeights: now, CheckpointWeights: shown(texts(other)), PeerWeights: shown(texts(other))}.get(
        type(part), former
    )
    assert isinstance(part, LiveWeights) or says != now
    return policy, part, model, says


def counting(policy: Any, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many prompts each call decodes, from now on."""
    counts: list[int] = []
    decode = policy.decode

    def noting(prompts: Sequence[Sequence[int]], *arguments: Any) -> Any:
        counts.append(len(prompts))
        return decode(prompts, *arguments)

    monkeypatch.setattr(policy, "decode", noting)
    return counts


FIRST = [
    *[(FULL, FULL, part) for part in (WRITERS[0], WRITERS[4])],
    *[(CAUSAL, LORA, part) for part in (WRITERS[1], WRITERS[3])],
]
REST = [case for case in product((FULL, CAUSAL), (FULL, LORA), WRITERS) if case not in FIRST]


@pytest.mark.parametrize(("backbone", "kind", "part"), [*FIRST, *later(*REST)])
def test_a_writer_writes_with_its_own_weights_and_only_one_that_stays_reads_the_disk(
    make_policy, backbone, kind, part, tmp_path, monkeypatch
):
    policy, part, model, says = cast(make_policy, {**backbone, **kind}, part, tmp_path / "peer")
    before, counts = texts(policy), counting(model.policy, monkeypatch)
    first = scribe({part: model}, tmp_path / "cache").write(Writing(part, SAMPLING), REQUESTS)
    again = scribe({part: model}, tmp_path / "cache").write(Writing(part, SAMPLING), REQUESTS)
    assert [one.text for one in first] == [one.text for one in again] == says
    assert [one.failure for one in first] == ["no_text" if text is None else None for text in says]
    stays, blank = isinstance(part, BaseWeights | CheckpointWeights | PeerWeights), says.count(None)
    assert [one.cached for one in again] == [stays and text is not None for text in says]
    assert counts == [3] + ([blank] if stays and blank else []) + ([] if stays else [3])
    counts.clear()
    assert texts(policy) == before


class Watched(TextGenerator):
    """Notes which processes decode, if only nothing."""

    entered: ClassVar[list[int]] = []

    def _decode(self, model: Any, prompts: Any, settings: Any, keys: Any) -> list[str]:
        self.entered.append(self.accelerator.process_index)
        return super()._decode(model, prompts, settings, keys)


@pytest.mark.parametrize(
    ("kind", "world", "part"),
    [
        (LORA, 2, WRITERS[2]),
        *later(*[(LORA, 2, part) for part in WRITERS if part != WRITERS[2]], *[(FULL, 5, part) for part in WRITERS]),
    ],
)
def test_dealt_over_processes_writers_write_the_same_in_the_same_order(
    make_policy, kind, world, part, tmp_path, monkeypatch
):
    _, part, model, says = cast(make_policy, kind, part, tmp_path / "peer")
    parts = gathering(monkeypatch)
    monkeypatch.setattr(Watched, "entered", [])
    processes: list[Any] = [Processes(rank, world) for rank in range(world)]
    scribes = [Watched([], DECODE, one, {part: model}, Cache(tmp_path / "cache"), 100) for one in processes]
    found = [one.write(Writing(part, SAMPLING), REQUESTS) for one in scribes]
    assert [one.text for one in found[-1]] == says
    assert Watched.entered == [*range(world)]  # all enter, as gathering weights takes all of them
    assert [len(some) for some in parts] == [len(range(rank, 3, world)) for rank in range(world)]


# What the disk is asked for.


def test_texts_of_the_initial_weights_stay_known_whatever_adapters_have_learnt(make_policy, tmp_path):
    policy = make_policy(**LORA)
    model, part = TeacherModel(BaseWeights(), policy), BaseWeights()
    first = scribe({part: model}, tmp_path).write(Writing(part, SAMPLING), REQUESTS)
    move(policy, 1)
    TeacherModel(SnapshotWeights(2), policy)
    again = scribe({part: model}, tmp_path).write(Writing(part, SAMPLING), REQUESTS)
    assert [one.text for one in again] == [one.text for one in first]
    assert [one.cached for one in again] == [one.text is not None for one in first]
    assert any(one.cached for one in again)


@LORA_FIRST
def test_a_peer_that_has_learnt_more_in_the_same_folder_writes_anew(make_policy, kind, tmp_path):
    other, policy = make_policy(**kind), make_policy(**kind)
    part, said = PeerWeights(str(tmp_path)), []
    for learnt in (True, True, False):
        if learnt:
            move(other, 2 + len(said))
        save_file({name: value.detach() for name, value in trained(other).items()}, tmp_path / "model.safetensors")
        written = scribe({part: TeacherModel(part, policy)}, tmp_path / "cache").write(
            Writing(part, SAMPLING), REQUESTS
        )
        assert [one.text for one in written] == shown(texts(other))
        said.append([one.cached for one in written])
        move(policy, 7)  # what the student learns is nothing to its peer
    assert not any(said[0] + said[1])
    assert any(said[2])


def test_other_initial_weights_or_another_temperature_are_not_mistaken_for_these(make_policy, tmp_path):
    part, found = BaseWeights(), []
    for seed, sampling in ((0, SAMPLING), (1, SAMPLING), (0, replace(SAMPLING, temperature=0.5))):
        policy = make_policy(seed=seed)
        written = scribe({part: TeacherModel(part, policy)}, tmp_path).write(Writing(part, sampling), REQUESTS)
        assert not any(one.cached for one in written)
        found.append([one.text for one in written])
    assert found[0] != found[1]
    assert found[0] != found[2] != found[1]


def test_requests_with_one_key_are_written_once(make_policy, tmp_path, monkeypatch):
    policy = make_policy()
    model, counts = TeacherModel(BaseWeights(), policy), counting(policy, monkeypatch)
    written = scribe({BaseWeights(): model}, tmp_path).write(Writing(BaseWeights(), SAMPLING), [REQUESTS[0]] * 4)
    assert counts == [1]
    assert len({one.text for one in written}) == 1


# Peers from outside.


def test_a_peer_is_read_from_what_the_program_exports(tmp_path):
    model = Model(path="tiny", lora=Lora(rank=2, alpha=8))
    other, policy = build_policy(model), build_policy(model)
    move(other, 2)
    export_policy(other, model, "peft", tmp_path / "exported")
    peer = PeerWeights(str(tmp_path / "exported"))
    written = scribe({peer: TeacherModel(peer, policy)}, tmp_path / "cache").write(Writing(peer, SAMPLING), REQUESTS)
    assert [one.text for one in written] == shown(texts(other))
    begun = build_policy(replace(model, lora=replace(LORA["lora"], start=peer.path)))
    assert all(torch.equal(value, trained(other)[name]) for name, value in trained(begun).items())


def test_a_folder_with_other_tensors_is_refused_in_one_sentence(make_policy, tmp_path):
    full, adapted = make_policy(), make_policy(**LORA)
    tensors = {name: value.detach().clone() for name, value in trained(full).items()}
    save_file(tensors, tmp_path / "model.safetensors")
    cases = [(adapted, "has no tensor .*lora_A.* of the student's shape")]
    extra = tmp_path / "extra"
    extra.mkdir()
    save_file({**tensors, "more": torch.zeros(2)}, extra / "model.safetensors")
    cases.append((full, "holds other tensors than the student trains"))
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    (damaged / "adapter_model.safetensors").write_bytes(b"nothing")
    cases.append((adapted, "there is no usable peer at"))
    for folder, (policy, says) in zip((tmp_path, extra, damaged), cases, strict=True):
        with pytest.raises(InputError, match=says) as refusal:
            TeacherModel(PeerWeights(str(folder)), policy)
        assert "\n" not in str(refusal.value)
    with pytest.raises(InputError, match="has no tensor"):
        make_policy(lora=Lora(rank=2, alpha=8, start=str(tmp_path)))


OTHERWISE: dict[str, tuple[dict[str, Any], str]] = {
    "alpha": ({"rank": 2, "alpha": 16}, "was made with alpha 16, but model.lora.alpha is 8; set it to 16"),
    "rank": ({"rank": 3, "alpha": 8}, "was made with rank 3, but model.lora.rank is 2; set it to 3"),
}


@pytest.mark.parametrize(("form", "key"), crossed(["exported", "checkpoint"], OTHERWISE))
def test_an_adapter_that_would_count_otherwise_than_where_it_was_made_is_refused(make_policy, tmp_path, form, key):
    other, says = OTHERWISE[key]
    maker = make_policy(lora=Lora(**other))
    folder = tmp_path / "checkpoints" / "best"
    if form == "exported":
        maker.module.model.save_pretrained(folder)
    else:
        save_best(tmp_path, trained(maker), State())
        (tmp_path / "config.yaml").write_text(f"model: {{lora: {{rank: {other['rank']}, alpha: {other['alpha']}}}}}")
    for use in (
        lambda: make_policy(lora=Lora(rank=2, alpha=8, start=str(folder))),
        lambda: TeacherModel(PeerWeights(str(folder)), make_policy(**LORA)),
    ):
        with pytest.raises(InputError) as refusal:
            use()
        assert str(refusal.value) == f"the adapter at {str(folder)!r} {says}"
    begun = make_policy(lora=Lora(**other, start=str(folder)))
    assert all(torch.equal(value, trained(maker)[name]) for name, value in trained(begun).items())


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ("{", "adapter_config.json is not JSON"),
        ('{"r": 2}', "does not say an adapter's r and lora_alpha"),
        ('{"r": 2, "lora_alpha": 8, "use_rslora": true}', "sets use_rslora, under which adapters count otherwise"),
        ('{"r": 2, "lora_alpha": 8, "alpha_pattern": {"q_proj": 4}}', "sets alpha_pattern, under which adapters"),
    ],
)
def test_an_adapter_whose_settings_leave_open_how_it_counts_is_refused(make_policy, tmp_path, settings, says):
    make_policy(**LORA).module.model.save_pretrained(tmp_path)
    (tmp_path / "adapter_config.json").write_text(settings)
    with pytest.raises(InputError, match=says) as refusal:
        PeerWeights(str(tmp_path)).read(make_policy(**LORA))
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("text", ["[", "[1]", "model: {lora: null}", "else: 1"])
def test_a_file_beside_a_checkpoint_that_is_no_config_of_a_run_with_adapters_says_nothing(make_policy, tmp_path, text):
    policy = make_policy(**LORA)
    save_best(tmp_path, trained(policy), State())
    (tmp_path / "config.yaml").write_text(text)
    assert PeerWeights(str(tmp_path / "checkpoints" / "best")).read(policy).keys() == trained(policy).keys()
