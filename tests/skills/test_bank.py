"""Banks are read from the published form and ours, written back exactly, and refused in one sentence."""

import json
import os
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from dllm_sd.errors import InputError
from dllm_sd.skills import Bank, Mistake, Skill, build_bank, distinct, is_dynamic, numbered, read_bank, write_bank

EXCERPTS = sorted((Path(__file__).parents[1] / "fixtures" / "skills").glob("*.json"))
WHOLE = sorted(Path(os.environ["DLLM_SD_SKILLS"]).glob("*.json")) if "DLLM_SD_SKILLS" in os.environ else []
SIZES = {"1b_claude": (28, 98), "4b_claude": (24, 15), "4b_raw": (150, 41), "8b_claude": (46, 8)}
"""Skills and mistakes of the whole files."""


def skill(id: str = "gen_001", title: str = "t", principle: str = "p", when_to_apply: str = "w") -> Skill:
    return Skill(id, title, principle, when_to_apply)


def published(**changes: Any) -> dict[str, Any]:
    tree = {
        "general_skills": [{"skill_id": "gen_001", "title": "t", "principle": "p", "when_to_apply": "w"}],
        "task_specific_skills": {},
        "common_mistakes": [
            {"mistake_id": "err_001", "description": "d", "why_it_happens": "y", "how_to_avoid": "h"},
            {"mistake_id": "err_002", "description": "d2", "why_it_happens": "y2", "how_to_avoid": "h2"},
        ],
        "metadata": {},
    }
    return tree | changes


@pytest.fixture
def save(tmp_path: Path) -> Callable[[Any], Path]:
    def save(content: Any) -> Path:
        path = tmp_path / "bank.json"
        path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
        return path

    return save


def test_there_are_excerpts_of_the_four_published_files():
    assert len(EXCERPTS) == 4


@pytest.mark.parametrize("path", [*EXCERPTS, *WHOLE], ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_a_published_bank_is_read_as_it_stands_and_survives_ours(path: Path, tmp_path: Path):
    tree = json.loads(path.read_text(encoding="utf-8"))
    bank = read_bank(path)
    assert [(one.id, one.title, one.principle, one.when_to_apply) for one in bank.skills] == [
        (row["skill_id"], row["title"], row["principle"], row["when_to_apply"]) for row in tree["general_skills"]
    ]
    assert [(one.id, one.description, one.why_it_happens, one.how_to_avoid) for one in bank.mistakes] == [
        (row["mistake_id"], row["description"], row["why_it_happens"], row["how_to_avoid"])
        for row in tree["common_mistakes"]
    ]
    assert bank.metadata == tree["metadata"]
    write_bank(bank, tmp_path / "deeper" / "copy.json")
    assert read_bank(tmp_path / "deeper" / "copy.json") == bank
    assert distinct(bank.skills) == bank.skills
    assert distinct(bank.mistakes) == bank.mistakes


@pytest.mark.skipif(not WHOLE, reason="DLLM_SD_SKILLS names no folder with the whole published banks")
def test_the_whole_published_banks_have_the_sizes_of_the_paper():
    sizes = {path.stem: (len(read_bank(path).skills), len(read_bank(path).mistakes)) for path in WHOLE}
    for name, size in SIZES.items():
        assert [found for stem, found in sizes.items() if name in stem] == [size]


def test_writing_and_reading_is_exact_for_any_text_and_leaves_nothing_beside_the_file(tmp_path: Path):
    odd = 'a "quoted" \\frac{1}{2}\n\ttab \u2028 \u00e9 \U0001f600 {brace}'
    bank = Bank((skill(title=odd),), (Mistake("err_001", odd, "y ", " h"),), {"source": odd, "n": [1, 2.5, None, True]})
    write_bank(bank, tmp_path / "bank.json")
    write_bank(bank, tmp_path / "bank.json")
    assert read_bank(tmp_path / "bank.json") == bank
    assert build_bank(json.loads(json.dumps(bank.tree())), "it") == bank
    assert [path.name for path in tmp_path.iterdir()] == ["bank.json"]
    text = (tmp_path / "bank.json").read_text(encoding="utf-8")
    assert "\u00e9" in text
    assert text.count("\n") > 10


def test_a_bank_that_cannot_be_written_leaves_the_old_file_alone(tmp_path: Path):
    write_bank(Bank((skill(),)), tmp_path / "bank.json")
    before = (tmp_path / "bank.json").read_bytes()
    with pytest.raises(ValueError, match="JSON"):
        write_bank(Bank((skill(),), (), {"loss": float("nan")}), tmp_path / "bank.json")
    assert (tmp_path / "bank.json").read_bytes() == before
    with pytest.raises(InputError, match=r"bank\.json.more cannot be written .*; give another path"):
        write_bank(Bank(), tmp_path / "bank.json" / "more")


def test_entries_are_the_same_if_their_texts_are_but_for_case_and_white_space():
    first = skill("gen_004", "Split  cases", "Do\nit.", "Now")
    same = skill("gen_009", " split cases ", "do it.", "NOW")
    moved = skill("gen_010", "split", "cases do it.", "now")  # the same words, other fields
    accent = skill("gen_011", "Split c\u00e1ses", "Do it.", "Now")
    assert distinct([first, moved, same, accent, moved]) == (first, moved, accent)
    assert distinct(list[Skill]()) == ()


def test_ids_are_given_anew_in_order():
    assert [one.id for one in numbered([skill("x"), skill("y", "u")])] == ["gen_001", "gen_002"]
    assert [one.id for one in numbered([Mistake("x", "d", "y", "h")])] == ["err_001"]
    dynamic = numbered([skill("x")] * 12, "dyn")
    assert dynamic[11].id == "dyn_012"
    assert all(map(is_dynamic, dynamic))
    assert not is_dynamic(skill("dynamo_1"))
    assert numbered(dynamic)[0] == skill()


def test_a_bank_can_be_the_key_of_a_cache():
    one, other = Bank((skill(),), (), {"a": [1]}), Bank((skill(),), (), {"a": [1]})
    assert {one: 1}[other] == 1
    assert one != Bank((skill("gen_002"),))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"is not valid JSON \(Expecting value.*\); correct it"),
        (b'{"general_skills": [', r"is not valid JSON"),
        (b"[" * 100_000, r"is not valid JSON"),
        (b'{"skills": ' + b"9" * 10_000 + b"}", r"is not valid JSON"),
        (b'{"metadata": NaN}', r"is not valid JSON \(NaN is no JSON number\)"),
        (b'{"a": "\xff"}', r"is not UTF-8 text; save the file as UTF-8"),
        (b'{"a": "\\ud800"}', r"is not UTF-8 text"),
        ([1], r"is not a JSON object; give one with the lists"),
        ({}, r"has no 'skills' \(it has nothing\); add the list"),
        ({"general_skill": []}, r"has no 'skills' \(it has general_skill\)"),
        ({"general_skills": [{}]}, r"general_skills, entry 1 has no 'skill_id'; add it or take the entry out"),
        ({"common_mistakes": [], "metadata": {}}, r"has no 'general_skills' \(it has common_mistakes, metadata\)"),
        (published(general_skills={}), r"'general_skills' must be a list, not {}"),
        (published(general_skills=[]), r"'general_skills' is empty, and a hint needs a skill and a mistake; add"),
        (published(common_mistakes=[]), r"'common_mistakes' is empty, and"),
        (published(common_mistakes=["x"]), r"common_mistakes, entry 1 is not an object; give it mistake_id, descrip"),
        (published(metadata=[]), r"'metadata' must be an object; correct it"),
        (published(task_specific_skills={"a": [1]}), r"has task_specific_skills, which are not supported; move"),
    ],
    ids=count(),
)
def test_a_corrupt_or_empty_bank_is_refused_with_its_place_and_a_remedy(save, content: Any, message: str):
    path = save(content)
    with pytest.raises(InputError, match=message) as caught:
        read_bank(path)
    assert str(caught.value).startswith(f"Skill bank {path}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"how_to_avoid": None}, r"'how_to_avoid' must be text, not None; correct it or take the entry out"),
        ({"how_to_avoid": 3}, r"'how_to_avoid' must be text, not 3"),
        ({"why_it_happens": " \n"}, r"'why_it_happens' is empty; fill it in or take the entry out"),
        ({"mistake_id": ""}, r"'mistake_id' is empty"),
        ({"mistake_id": "err_001"}, r"has the mistake_id 'err_001' of an earlier entry; give it one of its own"),
        ({"description": ...}, r"has no 'description'; add it"),
    ],
    ids=count(),
)
def test_a_bad_entry_is_named(save, change: dict[str, Any], message: str):
    tree = published()
    tree["common_mistakes"][1] |= change
    if ... in change.values():
        del tree["common_mistakes"][1]["description"]
    with pytest.raises(InputError, match=r"bank\.json, common_mistakes, entry 2:? " + message):
        read_bank(save(tree))


def test_our_own_form_names_its_own_keys():
    with pytest.raises(InputError, match=r"^it, skills, entry 1 has no 'id'"):
        build_bank({"skills": [{"title": "t"}], "mistakes": []}, "it")


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path):
    with pytest.raises(InputError, match=r"none\.json cannot be read \(No such file or directory\); give the path"):
        read_bank(tmp_path / "none.json")
    with pytest.raises(InputError, match="cannot be read"):
        read_bank(str(tmp_path))
