"""`--help`: every group and key with what it means, in 80 columns; one group, section or key; other entries' own."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from src import ensemble, predict, preflight, sync, ui
from src.cli.main import main
from src.config import comments, groups, reference
from src.config.keys import Key, all_keys, known_keys
from src.config.options import CONF
from tests.conftest import ROOT, admitted

GROUPS = sorted(folder.name for folder in CONF.iterdir() if folder.is_dir())


Shown = Callable[..., str]


@pytest.fixture
def shown(capsys: pytest.CaptureFixture[str]) -> Shown:
    """Return a function that gives `--help` some arguments and returns what is printed."""

    def ask(*arguments: str, entry: Callable[[list[str]], int] = main, code: int = 0) -> str:
        assert entry([*arguments, "--help"]) == code
        printed = capsys.readouterr()
        lines = (printed.err if code else printed.out).splitlines()
        assert code or max(map(len, lines)) <= 80
        return "\n".join(lines) + "\n"

    return ask


def words(text: str) -> str:
    """Return a text without how it is broken into lines."""
    return " ".join(text.split())


def test_the_overview_has_every_group_with_its_options_and_every_key_with_its_meaning(shown: Shown) -> None:
    text = shown()
    for group in GROUPS:
        (listed,) = re.findall(rf"^{group}: (\w+ \(.*?\))$", text, flags=re.MULTILINE | re.DOTALL)
        public = {file.stem for file in (CONF / group).glob("[!_]*.yaml")}
        assert set(re.findall(r"\w+", listed)) == public | ({"null"} if group == "experiment" else set())
    assert not re.search(r"\b_(rows|keys|zero)\b", text)
    sections = admitted().frozen
    for name in known_keys():
        key, part = all_keys()[name], name.partition(".")[2] or name
        if key.leaf != "type" and (not key.types or key.leaf in sections[key.section]):
            assert re.search(rf"^ *{re.escape(part)}: ", text, flags=re.MULTILINE), name
            assert words(reference.meaning(key)) in words(text), name


@pytest.mark.parametrize("key", all_keys().values(), ids=lambda key: key.name)
def test_every_key_says_what_it_means_and_what_it_may_be(key: Key) -> None:
    assert len(reference.meaning(key)) > 10
    assert key.allowed


def test_a_meaning_stands_in_one_place() -> None:
    """No line of conf/ says of a key what another one of its group says already."""
    for group in GROUPS:
        said: dict[tuple[str, str], str] = {}
        for file in sorted((CONF / group).glob("*.yaml")):
            option = groups.read(group, file.stem, (CONF,))
            assert option is not None
            for name, text in option.comments.items():
                is_key = f"{group}.{name}" in all_keys()
                assert not is_key or said.setdefault((name, text), file.stem) == file.stem, (file.stem, name)


def test_values_and_meanings_follow_what_is_chosen(shown: Shown) -> None:
    text = shown("optimizer=sgd", "optimizer.lr=0.5", "experiment=without_thoughts")
    assert re.search(r"^  lr: 0.5 +peak learning rate", text, flags=re.MULTILINE)
    assert re.search(r"^  momentum: 0.0 +share of the last step", text, flags=re.MULTILINE)
    assert "\n  num_train_epochs: 6.0 " in text
    assert "\n  betas:" not in text
    assert "\ntokens: none (dialogue, hcot, tow)\n" in text
    assert "at most, later 1 / sqrt(step)" in words(shown("optimizer=adafactor"))
    assert "\n  checkpoint: (needs a value) " in shown("model=causal_lm")


def test_a_group_has_all_its_options_and_their_keys(shown: Shown) -> None:
    text = shown("optimizer")
    assert text.startswith("optimizer: adamw is chosen; choose with optimizer=OPTION\n")
    for option in ("adafactor", "adamw", "adamw_8bit", "paged_adamw_32bit", "sgd"):
        file = groups.read("optimizer", option, (CONF,))
        assert file is not None
        assert f"\n  {option}\n      {file.about[0][:40]}" in text
    for key in ("lr", "embedding_lr", "weight_decay", "betas", "eps"):
        assert f"\n  optimizer.{key}: " in text
    assert "\n  optimizer.momentum\n" in text
    assert "\n      A key of optimizer=sgd\n" in text
    assert "Default: 0.01 (adafactor), 0.002 (adamw, adamw_8bit, paged_adamw_32bit), 0.1 (sgd)" in words(text)
    assert "As adamw, and sets optimizer.type: adamw_8bit" in words(text)


def test_options_that_reach_into_other_sections_say_what_they_set(shown: Shown) -> None:
    assert "Sets data.limit: 8; training.max_train_steps: 60;" in words(shown("debug"))
    assert "Sets tokens: none; name: without_thoughts; training.num_train_epochs: 6.0" in words(shown("experiment"))
    assert "As lora, and sets quantization: nf4" in words(shown("adapter"))


def test_one_key_a_section_and_several_topics(shown: Shown) -> None:
    text = shown("data.overflow", "data.overflow=drop")
    assert text.splitlines()[0] == "  data.overflow: drop"
    assert "Allowed: one of truncate, truncate_prompt, drop, error\n" in text
    assert "Default: truncate\n" in text
    assert "Set by command line\n" in text
    assert "Set by conf/data/_rows.yaml\n" in shown("data.overflow")
    assert "\n  training.logging_steps: 20\n" in shown("training")
    both = shown("loss.reduction", "tokens.init")
    assert "  loss.reduction: mean\n" in both
    assert "\n  tokens.init.method: text\n" in both
    assert words(shown("data.mixture")).endswith("weight, count Set by conf/data/_rows.yaml")
    assert "In it, 1, 2 or 3 (deepspeed=none shards nothing): stage" in words(shown("deepspeed"))


def test_a_last_part_and_names_of_other_trainers_are_found(shown: Shown) -> None:
    assert re.findall(r"^  (\S+): ", shown("revision"), flags=re.MULTILINE) == ["model.revision", "data.revision"]
    assert shown("learning_rate").startswith(
        "learning_rate of other trainers is optimizer.lr here.\n\n  optimizer.lr: "
    )


def test_unknown_topics_are_refused_together(shown: Shown) -> None:
    text = shown("optimizerr", "training.loging_steps", "qqqq", "optimizer", code=2)
    assert text.startswith("Configuration refused: 3 problems\n")
    assert "no group, section or key; did you mean optimizer?   (--help)" in text
    assert "did you mean training.logging_steps?" in text
    assert "groups and sections are adapter, data," in text
    assert "no such option" in shown("optimizer=adamx", code=2)


def test_options_of_the_users_own_have_their_words_too(shown: Shown, tmp_path: Path) -> None:
    mine = tmp_path / "optimizer" / "mine.yaml"
    mine.parent.mkdir()
    mine.write_text("# Mine: for long runs.\ndefaults:\n  - adamw\n  - _self_\n# what I found\n# to work\nlr: 0.125\n")
    text = shown("optimizer", "--config-dir", str(tmp_path), "optimizer=mine")
    assert "\n  mine\n      Mine: for long runs.\n      As adamw, and sets optimizer.lr: 0.125\n" in text
    assert "With mine: what I found to work" in text
    assert "\n  optimizer.lr: 0.125\n" in text
    (tmp_path / "optimizer" / "deep").mkdir()
    inner = "# Deeper.\ndefaults:\n  - /optimizer/sgd@_here_\n  - _self_\nmomentum: 0.5 # more of it\n"
    (tmp_path / "optimizer" / "deep" / "one.yaml").write_text(inner)
    text = shown("optimizer", "--config-dir", str(tmp_path), "optimizer=deep/one")
    assert "\n  deep/one\n      Deeper.\n      As sgd, and sets optimizer.momentum: 0.5\n" in text
    assert "With deep/one: more of it" in text
    assert "Default: 0.5 (deep/one), 0.0 (sgd) A key of optimizer=deep/one, sgd" in words(text)
    mine.write_text("lr: [\n")
    done = shown("optimizer", "--config-dir", str(tmp_path))
    assert " mine can't be read: " in words(done)  # a long path begins a line


def test_passwords_are_not_shown(shown: Shown, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_PASSWORD", "sesame-open")
    mine = tmp_path / "tracking" / "mine.yaml"
    mine.parent.mkdir()
    mine.write_text("defaults: [mlflow]\nuri: https://me:hidden-word@example.org/\n")
    for arguments in (
        ["tracking.uri=https://me:hidden-word@example.org/"],
        ["tracking.uri", "tracking.uri=https://me:${oc.env:MY_PASSWORD}@example.org/"],
        ["tracking", "--config-dir", str(tmp_path), "tracking=mine"],
    ):
        text = shown(*arguments)
        assert "hidden-word" not in text
        assert "sesame-open" not in text


@pytest.mark.parametrize(
    ("entry", "own"),
    [
        (preflight, "  dump: null "),
        (predict, "  batch_size: null "),
        (ensemble, "  method: soup "),
        (sync, ""),
        (ui, ""),
    ],
)
def test_other_entries(shown: Shown, entry: Callable[[list[str]], int], own: str) -> None:
    text = shown(entry=entry.main)
    assert f"python -m src.{entry.__name__.removeprefix('src.')}" in words(text)
    assert own in text
    assert "\n  optimizer.lr: 0.002\n" in shown("optimizer", entry=entry.main)
    assert "no group, section or key" in shown("qqqq", entry=entry.main, code=2)
    assert "unrecognized arguments: --learning_rate" in shown("--learning_rate", entry=entry.main, code=2)


@pytest.mark.parametrize("arguments", [["--help"], ["--cfg", "job"], ["--info", "config"]])
def test_a_reader_that_leaves_early_is_no_error(arguments: list[str]) -> None:
    command = [sys.executable, "-m", "src.run", *arguments]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.close()
        assert process.stderr is not None
        assert (process.stderr.read(), process.wait()) == (b"", 0)


@pytest.mark.parametrize(
    "topic", ["..", ".", "", "/", "x" * 5000, "\udcff", "a.b.c.", "hydra", "_self_", "*", "안" * 200]
)
def test_topics_that_no_one_would_ask_for_are_refused(shown: Shown, topic: str) -> None:
    assert "no group, section or key" in shown(topic, code=2)


TEXT = """# @package _global_
# About it.
#
#   more

# not about it
a: 1 # of a
b: # of b
c: "x # y" # of c
d: [1, 2] # of d
          # and more of it
e: {x: 1} # of e
f: # of f
  g: 2 # of g
  # of h,
  # in lines above
  h: a#b
i: | # of i
  text # none
j: null
k: [
  1 # none
] # of k
"""


def test_comments_are_read_where_they_stand() -> None:
    assert comments.about(TEXT) == ["About it.", "", "more"]
    assert comments.of_keys(TEXT) == {
        **{name: f"of {name}" for name in "abceifk"},
        "d": "of d and more of it", "f.g": "of g", "f.h": "of h, in lines above",
    }  # fmt: skip
    assert comments.of_keys("") == comments.of_keys("[1]") == {}


@pytest.mark.parametrize(
    ("text", "package", "written"),
    [
        ("# @package _global_\na: 1\n", "_global_", "_global_"),
        ("\n  #@package foo\n", "foo", "foo"),
        ("# About.\n# @package _global_\n", None, "_global_"),
        ("# package _global_\na: 1\n", None, None),
        ("", None, None),
    ],
)
def test_the_package_is_read_as_hydra_does(text: str, package: str | None, written: str | None) -> None:
    assert (comments.package(text), comments.written_package(text)) == (package, written)
