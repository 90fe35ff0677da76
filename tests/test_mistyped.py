"""What can't be read on a command line is told with what to type, and that can be pasted into a shell."""

from __future__ import annotations

import re
import shlex
import subprocess

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from src.config.command_line import read_override
from src.config.gate import admit
from src.config.keys import all_keys
from src.config.problems import Problem
from src.config.quoting import shell_override
from src.errors import ConfigError
from tests.test_gate import refusal

SEVERAL = "several values are a sweep: add -m"
BROKEN = r"an interpolation that can't be read: ${NAME} is one, and \${ is text"
QUOTES = "can't be read; a value with '=', ',', quotes, brackets or spaces needs quotes of its own"
SYSTEM = "data.system_prompt"
TEXT = st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=12) | st.sampled_from(
    ["${x}", "a\\${", "\\"]
)


def pasted(command: str) -> list[str]:
    """Return the arguments that a shell makes of what is pasted into it."""
    done = subprocess.run(["bash", "-c", f"printf '%s\\0' {command}"], capture_output=True, text=True, check=True)
    return done.stdout.removesuffix("\0").split("\0")


def told(*arguments: str) -> str:
    """Return the reason of the one problem that a command line has."""
    (line,) = [line for line in refusal("tracking=none", *arguments).splitlines() if "   (command line)" in line]
    return re.split(r" {3,}", line.strip())[1]


@pytest.mark.parametrize(
    ("argument", "reason", "typed"),
    [
        # several values: a list or one text, where the key takes that
        ("seed=1,2", SEVERAL, None),
        ("optimizer.lr=1e-4,1e-3", SEVERAL, None),
        ("seed=range(1,5)", SEVERAL, None),
        ("optimizer=adamw,sgd", SEVERAL, None),
        ("learning_rate=1,2", SEVERAL, None),
        ("optimizer.betas=0.8,0.9", f"{SEVERAL}; or, of one list, write it in brackets: ",
         ["optimizer.betas=[0.8,0.9]"]),
        ("name=a,b", f"{SEVERAL}; or, of one value, quote it: ", ['name="a,b"']),
        (f"{SYSTEM}=Add, please.", f"{SEVERAL}; or, of one value, quote it: ", [f'{SYSTEM}="Add, please."']),
        (f"{SYSTEM}=a, ${{name}}", f"{SEVERAL}; or, of one value, quote it: ", [f'{SYSTEM}="a, ${{name}}"']),
        # quotes, for a key that takes a text
        ("data.prompt_template={prompt}=", f"{QUOTES}: ", ['data.prompt_template="{prompt}="']),
        (f"{SYSTEM}=it's", f"{QUOTES}: ", [f'{SYSTEM}="it\'s"']),
        (f"+{SYSTEM}=it's", f"{QUOTES}: ", [f'+{SYSTEM}="it\'s"']),
        ("hydra.run.dir=outputs/a=b", f"{QUOTES}: ", ['hydra.run.dir="outputs/a=b"']),
        ("nothing.there=a=b", QUOTES, None),
        ("optimizer.lr=a=b", "can't be read; it is a number above 0 and at most 3.4e38, the largest in 32 bits", None),
        ("optimizer.lr==3", "did you mean ", ["optimizer.lr=3"]),
        # keys
        ("optimizer..lr=3", "not a key; did you mean ", ["optimizer.lr=3"]),
        ("optimizer.lr =3", "not a key; did you mean ", ["optimizer.lr=3"]),
        ("++optimizer.lr.=3", "not a key; did you mean ", ["++optimizer.lr=3"]),
        ("/optimizer=sgd", "not a key; did you mean ", ["optimizer=sgd"]),
        ("data.columns[prompt]=prompt", "not a key; did you mean ", ["data.columns.prompt=prompt"]),
        ("optimizer..lr=fast", "not a key; names with one dot between them, as optimizer.lr", None),
        (".lr=3", "not a key; names with one dot between them, as optimizer.lr", None),
        ("optimizer.betas[0]=0.9", "items of a list can't be set by themselves: give the whole list", None),
        ("optimizer.lr", "not KEY=VALUE in one word", None),
        ("=3", "not KEY=VALUE in one word", None),
        # what only looks like an interpolation
        (f"{SYSTEM}=${{", f"{BROKEN}: ", [f'{SYSTEM}="\\${{"']),
        (f'{SYSTEM}="Pay ${{"', f"{BROKEN}: ", [f'{SYSTEM}="Pay \\${{"']),
        (f"{SYSTEM}=a, ${{", f"{BROKEN}: ", [f'{SYSTEM}="a, \\${{"']),
        ('optimizer.lr="${"', BROKEN, None),
        # what OmegaConf takes for no value at all
        (f"{SYSTEM}=???", "??? stands for a value that is missing, and can't be given as a text", None),
        (f'{SYSTEM}="???"', "??? stands for a value that is missing, and can't be given as a text", None),
        ("data.metrics=[???]", "??? stands for a value that is missing, and can't be given as a text", None),
    ],
)  # fmt: skip
def test_what_is_shown_can_be_pasted(argument: str, reason: str, typed: list[str] | None) -> None:
    message = told(argument)
    assert message == reason if typed is None else message.startswith(reason)
    if typed is not None:
        arguments = pasted(message.removeprefix(reason).removesuffix("?"))
        assert arguments == typed
        assert admit(["tracking=none", *arguments])


def test_items_of_a_list_are_told_with_the_list() -> None:
    for value in ("[data/tow_addition]", "data/tow_addition"):
        message = told(f"data.train_files[0]={value}")
        assert message.endswith("give the whole list: 'data.train_files=[data/tow_addition]'")


def test_a_broken_interpolation_blames_nothing_else() -> None:
    message = refusal(f'{SYSTEM}="Pay ${{"', "tracking=none", "seed=-1")
    assert [line.split(" = ")[0].strip() for line in message.splitlines()[1:-1]] == [SYSTEM, "seed"]
    assert BROKEN in refusal("-m", f'{SYSTEM}="${{",b', "seed=1,2")


@settings(max_examples=60, deadline=None)
@given(TEXT)
def test_any_text_is_accepted_or_told_as_it_has_to_be_typed(text: str) -> None:
    read = read_override(f"{SYSTEM}={text}")
    if isinstance(read, Problem):
        _, _, shown = read.reason.partition(": ")
        while shown and not shown.startswith(("'", SYSTEM)):  # a colon of the sentence's own
            _, _, shown = shown.partition(": ")
        again = read_override(*shlex.split(shown))
        assert not isinstance(again, Problem)
        assert again.key_or_group == SYSTEM


@settings(max_examples=12, deadline=None)
@given(TEXT)
def test_any_text_arrives_as_a_shell_is_given_it(text: str) -> None:
    if text == "???":
        return
    request = admit(["tracking=none", *shlex.split(shell_override(SYSTEM, text))])
    assert request.run is not None
    assert request.run.frozen["data"]["system_prompt"] == text


def test_a_key_takes_any_text_as_it_is() -> None:
    assert all_keys()[SYSTEM].accepts("${")
    assert not all_keys()["optimizer.lr"].accepts("${")
    with pytest.raises(ConfigError, match="not a number"):
        admit(["optimizer.lr='\\${'"])
