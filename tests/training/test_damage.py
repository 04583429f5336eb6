"""Whatever happens to a file or a value of a checkpoint, resuming refuses it in one sentence that names the file."""

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dllm_sd.errors import InputError
from dllm_sd.policies.masked_diffusion import MaskedDiffusion
from dllm_sd.policies.weights import EmaWeights, PeerWeights, SnapshotWeights, TeacherModel
from dllm_sd.rollouts.rollout import Batch
from dllm_sd.training.checkpoint import (
    ADDED,
    State,
    best_checkpoint,
    latest_checkpoint,
    load_weights,
    restore_ahead,
    restore_run,
    run_tensors,
    save_best,
    save_run,
    write_checkpoint,
)
from tests.tiers import later, spread
from tests.training.test_checkpoint import roll_out, start, steps

Build = Callable[..., MaskedDiffusion]
FILES = ("model", "optimizer", "teacher0", "teacher1", "rollouts", "ahead")
NAMES = [*(f"{name}.safetensors" for name in FILES), "state.json"]
BANK = {"skills": [{"id": "gen_001", "title": "a"}], "mistakes": [], "metadata": {"huge": 1}}
BEFORE = {"trained": {"accuracy": 0.5, "ci95": [0.0, 1.0]}}


class Saved:
    """A run that has everything: AdamW, an average, a snapshot, a bank, rollouts between two passes."""

    def __init__(self, run: Path, make_policy: Build) -> None:
        run.mkdir()
        self.run = run
        self.policy, self.optimizer = start(make_policy)
        self.teachers = [TeacherModel(weights, self.policy) for weights in (EmaWeights(0.5), SnapshotWeights(1))]
        for update in (1, 2, 3):
            rollouts = roll_out(self.policy)
            steps(self.policy, self.optimizer, 1, seed=update)
            for teacher in self.teachers:
                teacher.after_update(update)
            tensors = run_tensors(self.policy, self.optimizer, self.teachers)
            state = State(update, 0, 40, 2, 1, 0.25, 1, None, BEFORE, 1.5, BANK)
            attempts = tuple((rollout,) for rollout in rollouts.kept)
            ahead = Batch(update + 1, update, attempts, 50, 1, {"engine/logp_gap": 0.5})
            save_run(run, tensors, state, rollouts, keep=2, ahead=ahead)
        save_best(run, tensors["model.safetensors"], state)

    @property
    def last(self) -> Path:
        return self.run / "checkpoints" / "000003"

    def restore(self) -> None:
        folder = latest_checkpoint(self.run)
        assert folder is not None
        restore_run(folder, self.policy, self.optimizer, self.teachers)
        restore_ahead(folder, self.policy)

    def refusal(self, name: str) -> str:
        """The one sentence with which resuming refuses, which names the file and changes nothing."""
        before = content_of(self.run)
        with pytest.raises(InputError) as caught:
            self.restore()
        said = str(caught.value)
        assert said.startswith(f"checkpoint {self.last / name} is missing or damaged (")
        assert said.endswith(f"); remove {self.last} to go on from update 2 (checkpoints/000002)")
        assert "\n" not in said
        assert len(said) < 300 + 2 * len(str(self.last))
        assert content_of(self.run) == before
        return said


def content_of(run: Path) -> dict[str, str]:
    kinds = {path: "link" if path.is_symlink() else "folder" for path in run.rglob("*")}
    states = {path: path.lstat() for path in kinds}
    return {str(path): f"{kinds[path]} {one.st_size} {one.st_mtime_ns}" for path, one in states.items()}


@pytest.fixture(scope="module")
def whole(make_policy: Build, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """The run as it was saved."""
    return Saved(tmp_path_factory.mktemp("damage") / "run", make_policy)


@pytest.fixture
def saved(whole: Saved, tmp_path: Path) -> Iterator[Saved]:
    """The run, to be damaged; it is whole again afterwards."""
    kept = tmp_path / "kept"
    shutil.copytree(whole.last, kept)
    yield whole
    shutil.rmtree(whole.last)
    kept.rename(whole.last)


def edit(folder: Path, change: Callable[[dict[str, Any]], Any], checksums: bool) -> None:
    """Change the state; without checksums it is that of a run from before there were any."""
    tree = json.loads((folder / "state.json").read_text())
    if not checksums:
        del tree["files"], tree["format"]
    tree = change(tree) or tree
    (folder / "state.json").write_text(json.dumps(tree, indent=1))


def test_what_is_not_damaged_is_restored_with_and_without_checksums(saved: Saved):
    saved.restore()
    edit(saved.last, lambda tree: None, checksums=False)
    saved.restore()
    assert {path.name for path in saved.last.iterdir()} == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_file_with_any_byte_changed_or_cut_off_is_refused(saved: Saved, name: str):
    file = saved.last / name
    content = file.read_bytes()
    places = {0, 1, 7, 8, 9, 40, len(content) // 3, len(content) // 2, len(content) - 2, len(content) - 1}
    for place in places:
        for bit in (1, 128):
            changed = bytearray(content)
            changed[place] ^= bit
            file.write_bytes(changed)
            saved.refusal(name)
    for size in places:
        file.write_bytes(content[:size])
        saved.refusal(name)
    for longer in (content + b"\0", content + b" ", content * 2):
        file.write_bytes(longer)
        saved.refusal(name)


def replaced(file: Path, kind: str) -> None:
    """Put something else in the place of a file of a checkpoint."""
    content = file.read_bytes()
    file.unlink()
    other = file.parent.with_name("000002") / file.name
    if kind == "directory":
        file.mkdir()
    elif kind == "link to another":
        file.symlink_to(other)
    elif kind == "link to itself elsewhere":
        elsewhere = file.parents[3] / f"elsewhere-{file.name}"
        elsewhere.write_bytes(content)
        file.symlink_to(elsewhere)
    elif kind == "link to nothing":
        file.symlink_to(file.with_name("nothing"))
    elif kind == "pipe":
        os.mkfifo(file)
    elif kind == "another's":
        shutil.copyfile(other, file)
    elif kind == "another kind's":
        others = (file.with_name(name) for name in NAMES if name != file.name)
        file.write_bytes(next(one for some in others if (one := some.read_bytes()) != content))
    elif kind != "nothing":
        file.write_bytes(kind.encode("latin1"))


KINDS = ["nothing", "", "directory", "link to another", "link to itself elsewhere", "link to nothing", "pipe"]
KINDS += ["another's", "another kind's", "[]", "{}", "null", "3", '"text"', "[" * 9999, "\xff\xfe", "\x80\x04N."]


@pytest.mark.parametrize("kind", spread(KINDS, 3), ids=[f"{kind!a:.20}" for kind in KINDS])
def test_something_else_in_the_place_of_a_file_is_refused(saved: Saved, tmp_path: Path, kind: str):
    for name in NAMES:
        keep = tmp_path / "file"
        shutil.copyfile(saved.last / name, keep)
        replaced(saved.last / name, kind)
        saved.refusal(name)
        file = saved.last / name
        shutil.rmtree(file) if file.is_dir() and not file.is_symlink() else file.unlink(missing_ok=True)
        shutil.copyfile(keep, file)


WRONG = [
    None,
    -1,
    2**64,
    -(2**64),
    0.5,
    math.nan,
    math.inf,
    "text",
    "",
    [],
    [1],
    {},
    {"a": math.nan},
    True,
    ["a"] * 9999,
]


def fits(key: str, value: Any) -> bool:
    """Whether it is, without checksums, what the state of some run may hold there."""
    fitting = {"stopped": [None, "text", ""], "bank": [None, {}], "before": [{}], "seconds": [0.5]}
    fitting["best_accuracy"] = [0.5, -1]
    fitting |= {name: [None, 0.5, -1] for name in ("best_loss", "loss_sum")}
    return any(type(one) is type(value) and one == value for one in fitting.get(key, []))


@pytest.mark.parametrize(("checksums", "every"), [(False, 5), *later((False, 1), (True, 1))])
def test_a_state_with_any_key_missing_or_wrong_is_refused(saved: Saved, checksums: bool, every: int):
    """Each key gets each of the values, or the pairs take turns, the fifth one after the other."""
    original = (saved.last / "state.json").read_text()
    keys = [key for key in json.loads(original) if checksums or key not in ("files", "format")]
    assert {*vars(State()), "rollouts", "ahead"} <= set(keys)
    for key, value in [*product(keys, ("delete", *WRONG))][::every]:
        if value is None and json.loads(original)[key] is None:
            continue  # it is
        if key in ADDED and value == "delete" and not checksums:
            continue  # as an earlier version wrote it
        if value != "delete" and not checksums and fits(key, value):
            continue
        if key in ("rollouts", "ahead") and value == "delete" and not checksums:
            continue  # as at the end of the passes, and without a lag

        def change(tree: dict[str, Any], key: str = key, value: Any = value) -> None:
            tree[key] = value
            if value == "delete":
                del tree[key]

        edit(saved.last, change, checksums)
        assert saved.refusal("state.json"), f"{key}: {value}"
        (saved.last / "state.json").write_text(original)


def entries(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The places of all values in a tree; of lists the first alone."""
    if path:
        yield path
    for key in tree if isinstance(tree, Mapping) else range(min(1, len(tree))) if isinstance(tree, list) else ():
        yield from entries(tree[key], (*path, key))


@pytest.mark.parametrize(("kept", "every"), [("rollouts", 4), *later(("rollouts", 1), ("ahead", 1))])
def test_rollouts_with_a_wrong_value_anywhere_are_refused_even_without_checksums(saved: Saved, kept: str, every: int):
    """Each place gets each of the three values, or the places take turns, the fourth one after the other."""
    original = (saved.last / "state.json").read_text()
    rollouts = json.loads(original)[kept]
    places = [path for path in entries(rollouts) if "fields" not in path[:-1]]
    assert len(places) > 40
    for path, value in [*product(places, ({"odd": 1}, [[{}]], 2**70))][::every]:

        def change(tree: dict[str, Any], path: tuple[Any, ...] = path, value: Any = value) -> None:
            at = tree[kept]
            for key in path[:-1]:
                at = at[key]
            at[path[-1]] = value

        if path[-1] in ("fields", "metrics") and isinstance(value, dict):
            continue  # whatever they are
        edit(saved.last, change, checksums=False)
        saved.refusal("state.json")
        (saved.last / "state.json").write_text(original)


@pytest.mark.parametrize("name", NAMES[:-1])
def test_other_tensors_are_refused_by_name_even_without_checksums(saved: Saved, name: str):
    edit(saved.last, lambda tree: None, checksums=False)
    file = saved.last / name
    tensors = load_file(file)
    first = next(
        key for key, value in tensors.items() if value.dim() and value.numel() > 1 and value.dtype != torch.bool
    )
    value = tensors[first]
    others = {
        "lacking": {key: value for key, value in tensors.items() if key != first},
        "more": {**tensors, "more": torch.zeros(2)},
        "shape": {**tensors, first: value.reshape(-1, 1).contiguous()},
        "type": {**tensors, first: value.to(torch.int32)},
        "none": {},
    }
    if value.is_floating_point():
        broken = value.clone()
        broken.view(-1)[-1] = math.nan
        others |= {"nan": {**tensors, first: broken}, "infinite": {**tensors, first: broken.nan_to_num(math.inf)}}
    for kind, changed in others.items():
        save_file(changed, file)
        with pytest.raises(InputError) as caught:
            saved.restore()
        said = str(caught.value)
        assert str(saved.last) in said, kind
        assert "\n" not in said


def test_a_state_that_is_odd_json_is_refused_even_without_checksums(saved: Saved):
    edit(saved.last, lambda tree: None, checksums=False)
    text = (saved.last / "state.json").read_text()
    for changed, words in (
        (text.replace('"update": 3', '"update": 3, "update": 3'), "'update' occurs twice"),
        (text.replace('"update": 3', f'"update": {"3" * 5000}'), "a number has 5000 digits"),
        (text.replace('"update": 3', f'"update": {"[" * 9999}'), "nested more than 200 levels deep"),
        (text.replace('"seconds": 1.5', '"seconds": NaN'), "seconds must be a finite number"),
        (text.replace('"update": 3', '"update": 2'), "update must be 3, as the folder says, not 2"),
        (text.replace('"skipped": 0', '"skipped": 4'), "cannot be above the 3 updates"),
        (text.replace('"update": 3', '"odd": 1, "update": 3'), "'odd', which is unknown"),
    ):
        (saved.last / "state.json").write_text(changed)
        assert words in saved.refusal("state.json")


def test_a_state_cannot_name_files_elsewhere(saved: Saved):
    for name in ("/etc/passwd", "../000002/state.json", "a/b", ".", "..", ""):
        sums = {name: hashlib.sha256(b"").hexdigest()}
        shutil.rmtree(saved.last)
        tensors = run_tensors(saved.policy, saved.optimizer, saved.teachers)
        write_checkpoint(saved.last, tensors, {**vars(State(3, best_update=2)), "rollouts": {}})
        text = (saved.last / "state.json").read_text()
        tree = json.loads(text)
        tree["files"] |= sums
        blank = json.dumps({**tree, "files": {**tree["files"], "state.json": "0" * 64}}, indent=1)
        own = hashlib.sha256(blank.encode()).hexdigest()
        (saved.last / "state.json").write_text(blank.replace("0" * 64, own, 1))
        assert "is not the name of a file in the folder" in saved.refusal("state.json")


def test_the_first_checkpoint_cannot_be_gone_back_from(saved: Saved, tmp_path: Path):
    folder = tmp_path / "run" / "checkpoints" / "000003"
    shutil.copytree(saved.last, folder)
    (folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(InputError, match=r"\); use resume=fresh to begin again$"):
        restore_run(folder, saved.policy, saved.optimizer, saved.teachers)


def test_the_best_weights_and_a_peers_are_verified_too(saved: Saved, tmp_path: Path):
    best = best_checkpoint(saved.run)
    assert best is not None
    load_weights(saved.policy, best)
    assert PeerWeights(str(best)).read(saved.policy)
    copy = tmp_path / "run" / "checkpoints" / "best"
    for change in ("flip", "no state"):
        shutil.copytree(best, copy)
        content = bytearray((copy / "model.safetensors").read_bytes())
        content[-1] ^= 1
        if change == "flip":
            (copy / "model.safetensors").write_bytes(content)
        else:
            (copy / "state.json").unlink()
        for read in (lambda: load_weights(saved.policy, copy), lambda: PeerWeights(str(copy)).read(saved.policy)):
            with pytest.raises(
                InputError, match=r"best/(model.safetensors|state.json) is missing or damaged"
            ) as caught:
                read()
            assert "\n" not in str(caught.value)
        shutil.rmtree(copy)


def test_links_are_neither_followed_nor_written_through(saved: Saved, tmp_path: Path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_text("mine")
    run, tensors = tmp_path / "run", run_tensors(saved.policy, saved.optimizer, saved.teachers)
    folder = run / "checkpoints"
    folder.mkdir(parents=True)
    for name in (".000003.partial", ".000003.old", ".000001.partial", ".best.partial", ".best.old"):
        (folder / name).symlink_to(outside)
    save_run(run, tensors, State(3), None, keep=1)
    save_best(run, tensors["model.safetensors"], State(3))
    assert {path.name for path in folder.iterdir()} == {"000003", "best"}
    assert [path.name for path in outside.iterdir()] == ["precious"]
    (folder / ".000004.partial").mkdir()
    (folder / ".000004.partial" / "model.safetensors").symlink_to(outside / "precious")
    save_run(run, tensors, State(4), None, keep=1)
    assert (outside / "precious").read_text() == "mine"
    (folder / "000005").symlink_to(folder / "000004")
    with pytest.raises(InputError, match=r"000005 is a symbolic link, which is not followed; remove .*000005 to go on"):
        latest_checkpoint(run)


def test_weights_that_overflow_in_another_type_are_refused(whole: Saved, make_policy: Build, tmp_path: Path):
    tensors = dict(run_tensors(whole.policy, whole.optimizer, [])["model.safetensors"])
    name = next(iter(tensors))
    tensors[name] = torch.full_like(tensors[name], 1e5)  # float16 ends at 65504
    folder = tmp_path / "checkpoints" / "best"
    write_checkpoint(folder, {"model.safetensors": tensors}, vars(State()))
    load_weights(make_policy(), folder)
    with pytest.raises(InputError, match=r"best overflows in another type \(.*\); load it with its own model.dtype"):
        load_weights(make_policy(dtype="float16"), folder)
