"""Every family's checkpoints give the logits that their original classes gave (``fixtures/checkpoints``)."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers.utils.logging import disable_progress_bar

from dllm_sd import load_policy
from dllm_sd.network.prefix_cache import block_causal
from dllm_sd.network.view import View
from dllm_sd.policies.masked_diffusion import MaskedDiffusion
from tests.oracles.fixtures import checkpoints
from tests.tiers import later

pytestmark = pytest.mark.fixture
ATTENTION = ("sdpa", "eager")


def read(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8"))


FACTS = {folder.name: read(folder / "fixture.json") for folder in checkpoints()}
FOLDERS = {folder.name: folder for folder in checkpoints()}
LAYOUTS = [(name, layout) for name, facts in FACTS.items() for layout in facts["layouts"]]
EXPECTED = [(name, layout, file) for name, layout in LAYOUTS for file in FACTS[name]["expected"]]


def block_length_of(name: str, file: str | None = None) -> int | None:
    """Positions of an attention block: the checkpoint's, or those with which an expected file was made."""
    facts = FACTS[name]
    return facts.get(f"block_length_of_{Path(file).stem}", facts["block_length"]) if file else facts["block_length"]


@cache
def load(name: str, layout: str, attention: str = "sdpa", block_length: int | None = None) -> MaskedDiffusion:
    """A checkpoint as a policy; what its files do not say is given, and nothing else."""
    disable_progress_bar()
    facts, written = FACTS[name], read(FOLDERS[name] / layout / "config.json")
    options: dict[str, Any] = {"attention": attention}
    if not facts["mask_token_id_in_config"]:
        options["mask_token"] = facts["mask_token_id"]
    if block_length != written.get("block_size"):
        options["block_length"] = block_length
    policy = load_policy(str(FOLDERS[name] / layout), **options)
    assert isinstance(policy, MaskedDiffusion)
    return policy


def logits_at(policy: MaskedDiffusion, ids: Tensor, mask: Tensor, sites: Tensor) -> Tensor:
    with torch.no_grad():
        return policy.site_logits(View(ids, mask.bool(), sites))


@pytest.mark.parametrize("attention", [ATTENTION[0], *later(ATTENTION[1])])
@pytest.mark.parametrize(("name", "layout", "file"), EXPECTED)
def test_logits_are_those_of_the_original_class(name: str, layout: str, file: str, attention: str):
    policy, stored = load(name, layout, attention, block_length_of(name, file)), load_file(FOLDERS[name] / file)
    shifted = "_shifted" if FACTS[name]["logits_shift"] else ""
    sites = stored[f"compare_mask{shifted}"]
    ours = logits_at(policy, stored["input_ids"], stored["attention_mask"], sites)
    gap = (ours - stored[f"logits{shifted}"][sites]).abs().max()
    assert gap < FACTS[name]["atol"], f"max abs diff {gap:.1e}"


@pytest.mark.parametrize(("name", "layout"), LAYOUTS)
def test_ids_blocks_and_shift_are_read_from_the_checkpoint(name: str, layout: str):
    facts, policy = FACTS[name], load(name, layout, block_length=block_length_of(name))
    written = read(FOLDERS[name] / layout / "generation_config.json") | read(FOLDERS[name] / layout / "config.json")
    assert policy.mask_id == facts["mask_token_id"]
    assert policy.end_ids == tuple(facts["stop_token_ids"])
    assert policy.pad_id == facts["pad_token_id"] or written.get("pad_token_id") is None
    assert policy.block_length == facts["block_length"]
    assert policy.module.shift == bool(facts["logits_shift"])


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("name", FACTS)
def test_a_row_has_the_same_logits_alone_and_in_a_padded_batch(name: str, attention: str):
    policy = load(name, "single", attention, block_length_of(name))
    stored = load_file(FOLDERS[name] / "expected_leftpad.safetensors")
    ids, mask = stored["input_ids"], stored["attention_mask"].bool()
    together = logits_at(policy, ids, mask, mask)
    rows = [(ids[i, mask[i]][None], mask[i, mask[i]][None]) for i in range(len(ids))]
    alone = [logits_at(policy, row, real, real) for row, real in rows]
    torch.testing.assert_close(together, torch.cat(alone), atol=FACTS[name]["atol"], rtol=0)


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize(
    ("name", "block_length"), sorted({(name, block_length_of(name, file)) for name, _, file in EXPECTED}, key=str)
)
def test_a_position_sees_all_others_or_exactly_its_own_and_earlier_blocks(
    name: str, block_length: int | None, attention: str
):
    policy = load(name, "single", attention, block_length)
    ids = load_file(FOLDERS[name] / "expected_nopad.safetensors")["input_ids"][1:2]
    everywhere = torch.ones_like(ids, dtype=torch.bool)
    before = logits_at(policy, ids, everywhere, everywhere)
    for changed in range(ids.shape[1]):
        other = ids.clone()
        other[0, changed] = (other[0, changed] + 1) % FACTS[name]["stop_token_ids"][0]
        moved = (logits_at(policy, other, everywhere, everywhere) - before).abs().amax(1) > FACTS[name]["atol"]
        sees = [block_length is None or i // block_length >= changed // block_length for i in range(ids.shape[1])]
        assert moved.tolist() == sees, changed


@pytest.mark.parametrize(
    ("name", "file"),
    [(name, file) for name, facts in FACTS.items() for file in facts["expected"] if block_length_of(name, file)],
)
def test_the_block_mask_is_that_of_the_original_class(name: str, file: str):
    stored, block_length = load_file(FOLDERS[name] / file), block_length_of(name, file)
    mask = stored["attention_mask"].bool()
    assert block_length
    ours = block_causal(mask.long().cumsum(1) - 1, mask, block_length)
    real = mask[:, None]  # what padding sees is of no consequence
    assert torch.equal(ours[real], stored["attention_mask_4d"][real])
