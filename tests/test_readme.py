"""README and docs/ are true: commands are admitted, keys, files and links exist, the refusal is the real one."""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import yaml

from src.config.gate import admit, admit_finished, admit_members
from src.config.help import help_of_run
from src.reporting.request import read_request
from src.runtime.signals import SAVE_FILE, STOP_FILE
from src.sweep.plan import plan_sweep
from src.sync import admit_sync
from src.ui import admit_ui
from tests.conftest import ROOT, admitted
from tests.test_layers import layer

MADE = ("configuration.md", "coming_from.md")
"""Pages that are generated, and tested by test_pages."""
PAGES = {
    page.relative_to(ROOT).as_posix(): page.read_text(encoding="utf-8")
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
    if page.name not in MADE
}
OWN_TEST = ("docs/extending.md",)
"""Pages whose examples are executed by a test of their own."""
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
NOT_OURS = ("source", "pip", "#!", "#SBATCH", "export", "if", "scontrol")
"""First words of lines of a shell that are no command of this project."""
FILE_TYPES = ("html", "json", "jsonl", "py", "yaml", "md", "log", "db", "safetensors")
SHELL = {"SLURM_JOB_ID": "7", "SLURM_NNODES": "2", "SLURM_NODEID": "1", "MAIN": "10.0.0.1"}
FILES = {
    "questions.jsonl": '{"prompt": "1+1="}\n',
    "rows.jsonl": '{"prompt": "1+1=", "completion": "2"}\n',
    "a.csv": "prompt\n1+1=\n",
    "b.jsonl": '{"prompt": "1+1="}\n',
    "ds_config.json": '{"zero_optimization": {"stage": 2}}',
}


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page, flags=re.DOTALL)


def lines_of_shell() -> Iterator[str]:
    """Yield the commands of all blocks, and those in the text that have arguments and no placeholders."""
    for name, page in PAGES.items():
        if name in OWN_TEST:
            continue
        for block in blocks(page, "bash"):
            yield from filter(None, block.replace("\\\n", " ").splitlines())
        prose = re.sub(r"```.*?```", "", page, flags=re.DOTALL)
        inline = re.findall(r"`((?:python -m src\.\w+|make \w+) [^`]+)`", prose)
        yield from (code for code in inline if not re.search("…|DIR|KEY|FILE", code))


def command_of(line: str) -> str:
    """Return the command of a line: without its comment, with shell variables filled in, out of `bash -c '…'`."""
    words = shlex.split(line, comments=not line.startswith("#"))
    if words and words[0] == "srun":
        words = shlex.split(re.sub(r"\$(\w+)", lambda name: SHELL[name[1]], words[-1]))
    return shlex.join(words)


COMMANDS = [
    command
    for command in dict.fromkeys(map(command_of, lines_of_shell()))
    if not command.strip("'").startswith(NOT_OURS)
]


def make_what_the_guide_makes(place: Path) -> None:
    """Write the option of docs/guide.md, and its rows, by its script."""
    (script,), (option, *_) = (blocks(PAGES["docs/guide.md"], language) for language in ("python", "yaml"))
    (place / "mine" / "experiment").mkdir(parents=True)
    (place / "mine" / "experiment" / "totals.yaml").write_text(option, encoding="utf-8")
    with contextlib.chdir(place):
        exec(script, {})


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with what the commands name that a clean clone does not have."""
    place = tmp_path_factory.mktemp("clone")
    for name in ("assets", "data"):
        (place / name).symlink_to(ROOT / name)
    for name, text in FILES.items():
        (place / name).write_text(text, encoding="utf-8")
    make_what_the_guide_makes(place)
    shutil.copytree(ROOT / "assets" / "tiny_llama", place / "models" / "gsm8k")
    (place / "models" / "gsm8k" / "model.safetensors").touch()
    shutil.copytree(place / "models" / "gsm8k", place / "models" / "mine")
    run = place / "outputs" / "mine"
    shutil.copytree(place / "models" / "gsm8k", run / "model")
    (run / "config.yaml").write_text(yaml.safe_dump(admitted("tracking=mlflow").frozen), encoding="utf-8")
    (run / "status.json").write_text('{"state": "FINISHED", "step": 400}', encoding="utf-8")
    for name in ("other", "thoughts", "plain"):
        shutil.copytree(run, run.with_name(name))
    return place


def check_run(arguments: list[str]) -> None:
    request = admit(arguments)
    if request.line.flags.help:
        assert request.shown is not None
        with contextlib.redirect_stdout(io.StringIO()) as shown:
            assert help_of_run(request.shown, request.line) == 0
        assert shown.getvalue()
    elif request.line.flags.multirun:
        assert plan_sweep(request.line).admitted
    else:
        assert request.run or request.shown


def check_make(arguments: list[str]) -> None:
    target, *given = arguments
    recipe = re.search(rf"^{target}:.*\n((?:\t.*\n)+)", MAKEFILE, flags=re.MULTILINE)
    assert recipe, f"no target {target}"
    variables = {"ARGS": "", "PORT": "5000"} | dict(one.split("=", 1) for one in given)
    for line in recipe[1].splitlines():
        command = re.sub(r"\$\$(run)|\$\((ARGS|PORT)\)", lambda name: variables[name[1] or name[2]], line.strip())
        if "$(BIN)/python -m src." in command and "pages" not in command:
            check(shlex.split(command))


def check_script(arguments: list[str]) -> None:
    """Check a script or a module that is run by hand: it exists and knows the options."""
    file = ROOT / (arguments[0] if arguments[0] != "-m" else f"{arguments[1].replace('.', '/')}.py")
    code = file.read_text(encoding="utf-8")
    for option in (word for word in arguments if word.startswith("--")):
        assert f'"{option}"' in code, f"{file} has no {option}"


ENTRIES = {
    "src.run": check_run,
    "src.preflight": lambda arguments: admit(arguments, "preflight"),
    **{
        f"src.{entry}": partial(admit_finished, entry=entry) for entry in ("predict", "evaluate", "export", "benchmark")
    },
    "src.ensemble": lambda arguments: admit_members(arguments, lambda sweep: [Path("outputs/mine")]),
    "src.report": read_request,
    "src.sync": admit_sync,
    "src.ui": admit_ui,
}


def check(words: list[str]) -> None:
    program, *arguments = words
    module = next((at for at, word in enumerate(words) if words[at - 1] == "-m" and word in ENTRIES), None)
    if module is not None:
        if words[module + 1 :] != ["--help"]:  # of an entry, tested with the entry
            ENTRIES[words[module]](words[module + 1 :])
    elif program == "make":
        check_make(arguments)
    elif program == "touch":
        assert Path(arguments[0]).name in (SAVE_FILE, STOP_FILE)
    elif program == "ray":  # its own command, which starts a node
        assert arguments[0] == "start"
    else:
        assert program == "python", f"nothing checks {shlex.join(words)}"
        check_script(arguments)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_admitted(command: str, clone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(clone)
    check(shlex.split(command))


def test_the_guides_rows_are_those_that_it_shows(clone: Path) -> None:
    (shown,) = blocks(PAGES["docs/guide.md"], "json")
    rows = {name: (clone / f"{name}.jsonl").read_text(encoding="utf-8") for name in ("train", "validation", "test")}
    assert rows["train"].startswith(shown)
    assert {name: text.count("\n") for name, text in rows.items()} == {"train": 1000, "validation": 50, "test": 150}
    assert len({row for text in rows.values() for row in text.splitlines()}) == 1200


def test_there_are_commands_of_every_kind() -> None:
    for kind in (
        "python -m src.run",
        "python -m src.preflight",
        "python -m src.predict",
        "python -m src.evaluate",
        "make",
        "torchrun",
    ):
        assert any(command.startswith(kind) for command in COMMANDS), kind


def test_the_refusal_is_the_real_one() -> None:
    (block,) = [block for block in blocks(PAGES["README.md"], "text") if block.startswith("$ ")]
    command, _, expected = block.partition("\n")
    done = subprocess.run(
        [sys.executable, *shlex.split(command)[2:]], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert (done.returncode, done.stderr) == (2, expected)


def test_every_key_exists() -> None:
    """A key or option in code of the text is one of docs/configuration.md, which is made from the schema."""
    known = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    keys = set(re.findall(r"^\| `(\w+(?:\.\w+)+)`", known, flags=re.MULTILINE))
    sections = {key.split(".")[0] for key in keys} - {"hydra"}
    wrong = []
    for name, page in PAGES.items():
        for code in re.findall(r"`([^`\n]+)`", page):
            for key in re.findall(r"(?<![\w./:-])([a-z_]+(?:\.[a-z_0-9]+)+)(?![\w/(-])", code):
                if key.rpartition(".")[2] in FILE_TYPES:
                    continue
                is_key = key.split(".")[0] in sections and not (ROOT / "src" / key.replace(".", "/")).exists()
                if is_key and not any(
                    key == one or one.startswith(f"{key}.") or key.startswith(f"{one}.") for one in keys
                ):
                    wrong.append(f"{name}: {key}")
    assert not wrong


def anchors(page: str) -> set[str]:
    """Return what GitHub calls the headings of a page."""
    titles = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", page, flags=re.DOTALL), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_every_link_leads_somewhere() -> None:
    wrong = []
    for name, page in PAGES.items():
        for link in re.findall(r"\]\(([^)\s]+)\)", page):
            file, _, anchor = link.partition("#")
            if link.startswith("http"):
                continue
            target = (ROOT / name).parent / file if file else ROOT / name
            if not target.exists() or (anchor and anchor not in anchors(target.read_text(encoding="utf-8"))):
                wrong.append(f"{name}: {link}")
    assert not wrong


def test_the_tree_exists() -> None:
    (tree,) = [block for block in blocks(PAGES["docs/architecture.md"], "text") if block.startswith("conf/ ")]
    top = ""
    for line in tree.splitlines():
        names = re.findall(r"[\w.]+/|[\w.]+\.(?:py|yaml)", re.split(r"  the groups|   ", line.lstrip())[0] + " ")
        if not line.startswith(" "):
            top = ""
        for name in names:
            assert (ROOT / top / name).exists(), f"{top}{name}"
        if not line.startswith(" ") and len(names) == 1:
            top = names[0]


def test_every_dependency_has_its_reason() -> None:
    reasons = PAGES["README.md"].partition("## Dependencies")[2]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    names = {*project["dependencies"], *(name for extra in project["optional-dependencies"].values() for name in extra)}
    assert not {name for name in names if name not in reasons and not name.startswith("types-")}


def test_every_path_exists() -> None:
    """A path of the project in code of the text leads to a file or folder."""
    code = re.compile(r"`((?:src|conf|tests|benchmarks|assets|docs|hydra_plugins)/[\w./]*)`")
    wrong = [
        f"{name}: {path}" for name, page in PAGES.items() for path in code.findall(page) if not (ROOT / path).exists()
    ]
    assert not wrong


def test_types_that_flow_exist() -> None:
    (table,) = re.findall(r"## What flows\n(.*?)\n## ", PAGES["docs/architecture.md"], flags=re.DOTALL)
    code = {room.name: "".join(file.read_text() for file in room.rglob("*.py")) for room in (ROOT / "src").iterdir()}
    for types, room in re.findall(r"^\| (`.*?`) \| (\w+) \|", table, flags=re.MULTILINE):
        for name in re.findall(r"`(\w+)`", types):
            assert re.search(rf"^class {name}\b", code[room], flags=re.MULTILINE), f"{room} has no {name}"


def test_layers_are_those_of_the_imports() -> None:
    (arrows,) = re.findall(r"^preflight, .* → .*$", PAGES["docs/architecture.md"], flags=re.MULTILINE)
    levels = [{layer(name) for name in level.split(", ")} for level in arrows.split(" → ")]
    assert all(len(level) == 1 for level in levels)
    assert levels == sorted(levels, key=min)


def test_every_page_can_be_found() -> None:
    """Every page of docs/ is linked from README or from a page that is."""
    linked = {"README.md"}
    for name in (todo := ["README.md"]):
        for link in re.findall(r"\]\(([^)\s#]+)", PAGES.get(name, "")):
            page = os.path.relpath(((ROOT / name).parent / link).resolve(), ROOT)
            if page not in linked and not link.startswith("http"):
                linked.add(page)
                todo.append(page)
    assert not set(PAGES) - linked
