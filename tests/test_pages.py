"""Pages of docs/ that are made: they are what would be made now, and say of every key what there is to say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from src.config import reference
from src.config.keys import all_keys
from src.config.options import CONF, options
from src.config.pages import PAGES, main
from src.config.peers import all_peers
from tests.conftest import ROOT


@pytest.mark.parametrize("place", PAGES)
def test_a_page_is_what_would_be_made_now(place: str) -> None:
    assert Path(ROOT, place).read_text(encoding="utf-8") == PAGES[place](), "make docs writes it anew"


def test_making_the_pages_again_changes_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert main() == 0
    assert capsys.readouterr().out == ""


def test_every_key_and_option_has_a_line() -> None:
    page = PAGES["docs/configuration.md"]()
    rows = re.findall(r"^\| `([^`]+)` \| (.+?) \| (.+?) \| (.+) \|$", page, flags=re.MULTILINE)
    assert [row[0] for row in rows if row[0] in all_keys()] == list(all_keys())
    for name, means, may_be, default in rows:
        if name in all_keys():
            assert len(means) > 10, name
            assert may_be, name
            assert default.startswith(("`", "<code>")), name
    for group in sorted(folder.name for folder in CONF.iterdir() if folder.is_dir()):
        section = page.partition(f"\n## {group}\n")[2].partition("\n## ")[0]
        assert all(f"\n| `{option}`" in section for option in options(group, [CONF])), group
    assert not re.search(r"`_\w+`", page)


def test_defaults_are_those_of_the_files() -> None:
    page = PAGES["docs/configuration.md"]()
    for line in (
        "| `training.logging_steps` | a line of metrics.jsonl every N steps, and at the last one | "
        "a whole number of at least 1 | `20` |",
        "`0.01`: adafactor<br>`0.002`: adamw, adamw_8bit, paged_adamw_32bit<br>`0.1`: sgd |\n",
        "only with `optimizer=sgd`",
        "| `smoke` | Does it run at all?",
        "| `preflight.rows` |",
    ):
        assert line in page
    assert reference.default_choices()["optimizer"] == "adamw"
    assert "| `adamw` (default) |" in page


def test_every_name_of_another_trainer_is_on_the_page() -> None:
    page = PAGES["docs/coming_from.md"]()
    for peer in all_peers():
        section = page.partition(f"\n## {peer.title}\n")[2].partition("\n## ")[0]
        assert all(f"`{name}`" in section for name in peer.table), peer.title
    assert "| `fp16` | `true`: `training.mixed_precision=fp16`<br>`false`: `training.mixed_precision=no` |\n" in page
    assert "- `tf32`: PyTorch's own setting is left as it is.\n" in page


def test_pages_link_to_what_is_there() -> None:
    for place, make in PAGES.items():
        for link in re.findall(r"\]\(([^)#]+)\)", make()):
            assert (ROOT / place).with_name(link).exists()
