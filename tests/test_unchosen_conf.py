"""What lies among options and is none: nothing waits for it, copies it or ends by it; one warning tells it by name."""

from __future__ import annotations

import itertools
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from src.config import options
from src.config.gate import admit
from src.config.kept import differing, keep_options, kept_roots
from src.config.options import CONF, DEEPEST, option_files
from src.config.options import options as options_of
from src.config.trust import is_signed, signature
from src.errors import ConfigError
from src.records import LARGEST_YAML_BYTES, MOST_YAML_VALUES
from src.trials.folder import SweepFolder
from tests.conftest import admitted, towline
from tests.sweeps import planned
from tests.test_gate import refusal

DEEP = {
    "lists": "[" * 50_000,
    "mappings": "a: " + "{a: " * 50_000,
    "both": "a: " + "[{a: " * 25_000,
    "lists in a line": "- " * 50_000,
    "keys": "? " * 50_000,
    "closed": "a: " + "[" * 20_000 + "]" * 20_000,
    "indented": "".join(f"{' ' * depth}a:\n" for depth in range(2_000)),
}
"""Values that are nested so deep that what parses them in C overflows its stack."""
ALIASES = "a0: &a0 [x, x]\n" + "".join(f"a{i + 1}: &a{i + 1} [*a{i}, *a{i}, *a{i}]\n" for i in range(30))
MERGED = "a0: &a0 {x: 1}\n" + "".join(f"a{i + 1}: &a{i + 1}\n  <<: [*a{i}, *a{i}]\n" for i in range(20))
BROKEN = {
    "aliases that multiply": (ALIASES, "values"),
    "keys that multiply": (MERGED, "line"),
    "an alias of itself": ("a: &a [*a]\n", "line 1"),
    "too many values": ("a: [" + "a," * (MOST_YAML_VALUES + 1) + "]", "values"),
    "too large": ("#" * (LARGEST_YAML_BYTES + 1), "bytes"),
    "no bool": ("a: 1\nb: !!bool abc\n", "line 2, column 4: no value of !!bool"),
    "no int": ("a: !!int ''\n", "no value of !!int"),
    "no time": ("a: !!timestamp x\n", "no value of !!timestamp"),
    "too long a number": ("a: " + "9" * 5_000, "too many digits"),
    "no pairs": ("a: !!omap [1]\n", "line 1, column 4: no value of !!omap"),
}


@pytest.fixture
def own(tmp_path: Path) -> Path:
    folder = tmp_path / "own"
    (folder / "data").mkdir(parents=True)
    return folder


def pipe(place: Path) -> None:
    os.mkfifo(place)


def dangling(place: Path) -> None:
    place.symlink_to("user@host.1234:5678")  # as an editor leaves it beside a file that is open


def circle(place: Path) -> None:
    place.symlink_to(place)


def device(place: Path) -> None:
    place.symlink_to("/dev/zero")


ODD: tuple[Callable[[Path], None], ...] = (pipe, dangling, circle, device)


@pytest.mark.parametrize("text", DEEP.values(), ids=DEEP)
def test_nesting_is_counted_before_it_is_parsed(own: Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    (own / "data" / "odd.yaml").write_text("# a comment\n" + text)
    started = time.thread_time()
    assert admitted("--config-dir", str(own))
    assert time.thread_time() - started < 5
    said = capsys.readouterr().err
    place = 2 + (DEEPEST if text == DEEP["indented"] else 0)
    assert said.count(f"{own}/data/odd.yaml, line {place}") == 1
    assert f"nested more than {DEEPEST} deep" in said
    assert f"odd.yaml, line {place}" in refusal("--config-dir", str(own), "data=odd")


@pytest.mark.parametrize(("text", "words"), BROKEN.values(), ids=BROKEN)
def test_what_is_broken_is_told_by_name_and_costs_a_warning_where_nobody_chose_it(
    own: Path, text: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (own / "data" / "odd.yaml").write_text(text)
    started = time.thread_time()
    assert admitted("--config-dir", str(own))
    assert time.thread_time() - started < 8
    said = capsys.readouterr().err
    assert (said.count("odd.yaml"), words in said) == (1, True), said
    refused = refusal("--config-dir", str(own), "data=odd")
    assert ("odd.yaml" in refused, words in refused) == (True, True), refused


@pytest.mark.parametrize("make", ODD)
def test_what_is_no_file_is_not_waited_for(
    own: Path, make: Callable[[Path], None], capsys: pytest.CaptureFixture[str]
) -> None:
    make(own / "data" / "odd.yaml")
    make(own / "data" / ".#odd.yaml")  # hidden: not even a warning
    make(own / "note.txt")
    for flags in (["--config-dir", str(own)], [f"hydra.searchpath=[file://{own}]"]):
        assert admitted(*flags)
        assert capsys.readouterr().err.count("odd.yaml") == 1
        assert "odd.yaml" in refusal(*flags, "data=odd")
        assert "no such option" in refusal(*flags, "data='.#odd'")
        capsys.readouterr()


@pytest.mark.parametrize(
    ("name", "chosen"),
    [
        ("whole", ["-cn", "whole"]),
        ("experiment/mine/odd", ["experiment=mine/odd"]),
        ("hydra/launcher/odd", ["-m", "hydra/launcher=odd", "seed=1"]),
        ("sweep/odd", ["-m", "sweep=odd", "seed=1"]),
        ("tracking/odd", ["-m", "tracking=none,odd", "seed=1"]),
    ],
)
@pytest.mark.parametrize("make", [pipe, dangling, lambda place: place.write_text(DEEP["lists"])])
def test_however_it_is_chosen_it_is_told_by_name(
    own: Path, name: str, chosen: list[str], make: Callable[[Path], None]
) -> None:
    place = own / f"{name}.yaml"
    place.parent.mkdir(parents=True, exist_ok=True)
    make(place)
    with pytest.raises(ConfigError, match=rf"{name}\.yaml"):
        if "-m" in chosen:
            planned("--config-dir", str(own), *chosen[1:])
        else:
            admitted("--config-dir", str(own), *chosen)


@pytest.mark.parametrize("entry", [["--help"], ["--help", "data"], ["--cfg", "job"]])
def test_every_entry_answers_beside_them(own: Path, entry: list[str]) -> None:
    (own / "data" / "deep.yaml").write_text(DEEP["lists"])
    for number, make in enumerate(ODD):
        make(own / "data" / f"odd{number}.yaml")
    done = towline("--config-dir", str(own), *entry)
    assert done.returncode == 0, done.stderr
    names = ["deep.yaml", *(f"odd{number}.yaml" for number in range(len(ODD)))]
    assert [done.stderr.count(name) for name in names] == [1] * len(names)
    assert "Traceback" not in done.stderr


def test_a_sweep_keeps_what_can_be_read(own: Path, tmp_path: Path) -> None:
    (own / "data" / "mine.yaml").write_text("defaults: [tow_addition]\nlimit: 8\n")
    (own / "data" / "again").symlink_to(own)  # in a circle
    (own / "linked").symlink_to(shutil.copytree(own / "data", tmp_path / "elsewhere", symlinks=True))
    (own / "data" / "deep.yaml").write_text(DEEP["lists"])
    (own / "data" / ".#mine.yaml").symlink_to("user@host.1234:5678")
    (own / "notes.bin").write_bytes(b"\xff" * 100)
    for number, make in enumerate(ODD):
        make(own / "data" / f"odd{number}.yaml")
        make(own / f"odd{number}")
    command = ("--config-dir", str(own), "data=mine", "seed=1,2", f"hydra.sweep.dir={tmp_path / 'sweep'}")
    plan = planned(*command)
    record = SweepFolder(plan.folder)
    keep_options(record.conf, plan.line.roots)
    kept = kept_roots(record.conf)
    assert [root.name for root in kept] == ["0", "1"]
    names = ["data/deep.yaml", "data/mine.yaml", "linked/mine.yaml"]
    assert [str(file.relative_to(kept[1])) for file in option_files(kept[1])] == names
    assert all((kept[1] / name).read_bytes() == (own / name).read_bytes() for name in names)
    assert len(option_files(kept[0])) == len(option_files(CONF))
    assert differing(kept, plan.line.roots) == []
    (own / "data" / "mine.yaml").write_text("defaults: [tow_addition]\nlimit: 9\n")
    (own / "data" / "new.yaml").write_text("limit: 9\n")
    (own / "data" / "deep.yaml").unlink()
    pipe(own / "data" / "deep.yaml")
    assert differing(kept, plan.line.roots) == ["data/deep.yaml", "data/mine.yaml", "data/new.yaml"]


def test_a_fresh_sweep_runs_beside_them(swept: Callable[..., int], own: Path, folder: Path) -> None:
    (own / "data" / ".#mine.yaml").symlink_to("user@host.1234:5678")
    pipe(own / "data" / "odd.yaml")
    grid = ("--config-dir", str(own), "seed=1", "training.max_train_steps=1")
    assert swept(*grid) == 0
    assert swept(*grid) == 0
    assert [root.name for root in kept_roots(SweepFolder(folder).conf)] == ["0", "1"]


def test_kept_folders_are_in_the_order_in_which_they_were_given(tmp_path: Path) -> None:
    roots = [tmp_path / f"own{number}" for number in range(12)]
    for root in roots:
        root.mkdir()
        (root / f"{root.name}.yaml").write_text("name: x\n")
    record = SweepFolder(tmp_path / "sweep")
    keep_options(record.conf, roots)
    assert [one.name for root in kept_roots(record.conf) for one in root.iterdir()] == [
        f"{root.name}.yaml" for root in roots
    ]


def test_hidden_names_are_no_options(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hidden = own / "data" / ".old"
    hidden.mkdir()
    (hidden / "broken.yaml").write_text("a: [")
    (own / "data" / ".base.yaml").write_text("limit: 8\n")
    assert options_of("data", [own]) == []
    assert admitted("--config-dir", str(own))
    assert capsys.readouterr().err == ""
    (own / "data" / "mine.yaml").write_text("defaults: [tow_addition, .base]\n")  # a sweep would not keep it
    assert ".base: a name that begins with '.'" in refusal("--config-dir", str(own), "data=mine")


def test_a_folder_of_anything_else_is_none_of_options(
    own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(options, "MOST_ENTRIES", 20)
    for number in range(20):
        (own / str(number)).mkdir()
    pipe(tmp_path / "pipe")
    for place, words in ((own, "more than 20 files and folders"), (tmp_path / "pipe", "no such folder")):
        for flag in (f"--config-dir={place}", f"hydra.searchpath=[file://{place}]"):
            assert words in refusal(flag)


def test_links_that_multiply_end(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(options, "MOST_ENTRIES", 5_000)
    places = [own / f"level{number}" for number in range(40)]
    for place, below in itertools.pairwise(places):
        place.mkdir()
        for name in ("a", "b"):
            (place / name).symlink_to(below)
    places[-1].mkdir()
    assert "files and folders" in refusal(f"--config-dir={own}")


def test_a_key_in_the_users_home_that_is_no_file_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trusting = {"model": {"checkpoint": "x", "trust_remote_code": True}}
    for name, make in (("pipe", pipe), ("dangling", dangling), ("circle", circle), ("device", device)):
        monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / name))
        (tmp_path / name / "towline").mkdir(parents=True)
        make(tmp_path / name / "towline" / "key")
        assert signature(tmp_path / "run", trusting) is None
        assert not is_signed(tmp_path / "run", trusting, ["x"])


def test_a_deepspeed_file_that_is_none_is_not_waited_for(own: Path) -> None:
    pipe(own / "ds.json")
    with pytest.raises(ConfigError, match=r"ds\.json: not a plain file"):
        admit(["tracking=none", "deepspeed=file", f"deepspeed.config_file={own / 'ds.json'}"])
