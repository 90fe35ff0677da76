"""Secrets are resolved in memory, and found in nothing that is written or printed."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import yaml

from src import predict, secrets
from src.config.gate import admit, admit_finished, parse_stored
from src.errors import ConfigError, show_libraries_visibly
from src.model.card import _as_yaml, shaping
from src.tracking.lock import LOCK
from src.tracking.provenance import git_state
from src.tracking.secrets_in_code import clean_code
from tests.conftest import ROOT, towline

PLANTED = "pl4nted-s3cret"
NOBODY = "127.0.0.1:1"
SMALL = (
    *("data.limit=16", "training.max_train_steps=2", "training.per_device_train_batch_size=4", "data.cache_dir=null"),
    *("evaluation.max_samples=4", "evaluation.sample_prompts=1", "generation.max_new_tokens=2"),
)


@pytest.fixture(autouse=True)
def _nothing_known(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(secrets, "_known", {})
    monkeypatch.setattr(secrets, "_came_by", {})
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in (secrets.HANDED_DOWN, *(name for names in secrets.MLFLOW_LOGINS for name in names)):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("https://me:pw@host/x", "https://***@host/x"),
        ("https://token@host", "https://***@host"),
        ("postgresql+psycopg2://u:p%40x@h:5432/d", "postgresql+psycopg2://***@h:5432/d"),
        ("postgresql://u:p@q@h/d", "postgresql://***@h/d"),
        ("mysql://u:a/b@h/d", "mysql://***@h/d"),
        ("mysql://h/d?user=me&password=abc#x", "mysql://h/d?user=me&password=***#x"),
        ("https://h/d?access_token=abc", "https://h/d?access_token=***"),
        ("see https://me:pw@a, or https://b:80/c@d", "see https://***@a, or https://b:80/c@d"),
        ("sqlite:////home/me@work/a.db", "sqlite:////home/me@work/a.db"),
        ("http://u:it's-pw@h/x", "http://***@h/x"),
        ("{'a':'http://h','b':'c@d'}", "{'a':'http://h','b':'c@d'}"),
        ("{'a':'http://u:p@h'}", "{'a':'http://***@h'}"),
        ("mssql+pyodbc:///?odbc_connect=DRIVER%3DX%3BPWD%3Dsecret", "mssql+pyodbc:///?odbc_connect=***"),
        ("http://h?pass=abc&x=1", "http://h?pass=***&x=1"),
        ("http://h?auth=it's&bypass=1", "http://h?auth=***&bypass=1"),
        ("http://h/#access_token=abc", "http://h/#access_token=***"),
        ("http://h?api%5Fkey=abc", "http://h?api%5Fkey=***"),
        ("{uri: http://h?api_key=abc, other: 1}", "{uri: http://h?api_key=***, other: 1}"),
        ("http://me:${oc.env:PW}@h?key=${oc.env:PW}", "http://me:${oc.env:PW}@h?key=${oc.env:PW}"),
        ("at http://h?auth=abc: no answer", "at http://h?auth=***: no answer"),
        ("git@github.com:a/b.git", "git@github.com:a/b.git"),
        ("1 + 1 = 2 @ home", "1 + 1 = 2 @ home"),
    ],
)
def test_credentials_of_urls_are_masked(text: str, masked: str) -> None:
    assert secrets.without_credentials(text) == masked
    assert secrets.without_credentials(masked) == masked


def test_what_is_known_is_masked_wherever_it_stands() -> None:
    secrets.without_credentials(f"https://me:{PLANTED}%21@host")
    assert secrets.clean(f"no answer for {PLANTED}! and {PLANTED}%21") == "no answer for *** and ***"
    secrets.know("abc")  # too short: it stands in too many words
    assert secrets.clean("abcdef") == "abcdef"


def test_a_name_alone_is_masked_only_where_it_stands_as_one() -> None:
    assert secrets.clean("http://alicehome@h/ in /tmp/alicehome/q1") == "http://***@h/ in /tmp/alicehome/q1"
    assert secrets.clean("http://ghp0123456789abcdefgh@h/") == "http://***@h/"
    assert secrets.clean("it is ghp0123456789abcdefgh") == "it is ***"
    secrets.without_credentials("http://me:post@h/")
    assert secrets.clean("post: poster, postgres") == "***: poster, postgres"


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("http://127.0.0.1:5000", "http://127.0.0.1:5000"),
        ("https://host/mlflow/api/2.0", "https://host/mlflow/api/2.0"),
        ("sqlite:////home/x1/mlflow2.db", "sqlite:////home/x1/mlflow2.db"),
        ("myproject", "myproject"),
        ("exp-2026-run-17-of-thoughts", "exp-2026-run-17-of-thoughts"),
        (f"http://me:{PLANTED}@h:1/x?y=1", "http://***@h:1/x?y=***"),
        ("http://h/cap06PLANT?auth=auth06PLANT#frag06", "http://h/***?auth=***#***"),
        ("postgresql://h/runs?sslkey=file06key&mode=require", "postgresql://h/runs?sslkey=***&mode=***"),
        ("PLANT0123456789abcdef", "***"),
    ],
)
def test_of_an_address_of_the_environment_is_shown_what_gives_no_access(
    value: str, shown: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STORE", value)
    admitted = admit(["tracking=mlflow", "tracking.tags={store: '${oc.env:STORE}'}"]).run
    assert admitted is not None
    assert secrets.clean(f"at {value} it is") == f"at {shown} it is"
    assert secrets.as_stored(value) == "${oc.env:STORE}"
    path = secrets.clean("url: /cap06PLANT/api?auth=auth06PLANT")
    assert ("cap06" in path) == ("cap06" not in value)


def test_a_problem_with_what_the_environment_gave_names_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STORE", "PLANT21http://a")
    with pytest.raises(ConfigError, match=r"tracking\.uri = \$\{oc\.env:STORE\} +not an address") as refused:
        admit(["tracking=mlflow", "tracking.uri=${oc.env:STORE}"])
    assert "PLANT21" not in str(refused.value)


def test_an_address_with_a_secret_in_its_query_alone_becomes_a_variable() -> None:
    (text,) = secrets.as_variables(["tracking.uri=http://h/x?api_key=abcdefgh"])
    assert text.startswith("tracking.uri=${oc.env:TOWLINE_URL_")
    assert secrets.as_variables(["a=http://h/x?y=1"]) == ["a=http://h/x?y=1"]


def test_a_login_beside_an_interpolation_becomes_a_variable_alone() -> None:
    (text,) = secrets.as_variables([f"tracking.uri=http://me:{PLANTED}@${{oc.env:HOST}}/x"])
    assert text.endswith("}@${oc.env:HOST}/x")
    assert PLANTED not in text


@pytest.mark.parametrize("flags", [("--info", "config"), ("--info", "all"), ("--help",)])
def test_what_hydra_prints_of_option_files_has_no_credentials(flags: tuple[str, ...], tmp_path: Path) -> None:
    own = tmp_path / "experiment"
    own.mkdir()
    (own / "mine.yaml").write_text(
        f"# @package _global_\ntracking:\n  uri: http://me:{PLANTED}@{NOBODY}/\n  tags: {{a: 'https://u:{PLANTED}@h/'}}\n"
    )
    done = towline(f"--config-dir={tmp_path}", "experiment=mine", *flags)
    assert done.returncode == 0, done.stderr
    assert "mlflow" in done.stdout
    assert PLANTED not in done.stdout + done.stderr


@pytest.mark.parametrize("launcher", ["basic", "submitit_local"])
def test_what_another_sweeper_writes_and_pickles_has_no_credentials(launcher: str, tmp_path: Path) -> None:
    own = tmp_path / "conf" / "tracking"
    own.mkdir(parents=True)
    (own / "mine.yaml").write_text(
        f"defaults: [mlflow]\nuri: http://me:{PLANTED}@{NOBODY}/?key={PLANTED}\ntags: {{a: 'https://u:{PLANTED}@h/'}}\n"
    )
    done = towline(
        *(
            "-m",
            f"--config-dir={own.parent}",
            "tracking=mine",
            "hydra/sweeper=basic",
            f"hydra/launcher={launcher}",
            *SMALL,
            "seed=1",
        ),
        f"hydra.sweep.dir={tmp_path}/out",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert PLANTED not in done.stdout + done.stderr
    assert (tmp_path / "out" / "multirun.yaml").exists()
    assert len(list(tmp_path.glob("out/.submitit/*/*_result.pkl"))) == (launcher == "submitit_local")
    assert not found_in(tmp_path / "out")


def test_the_store_gets_no_credentials_that_it_needs_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow import MlflowClient

    monkeypatch.setenv("FOO_KEY", PLANTED)
    store = f"sqlite:///{tmp_path}/store.db"
    done = towline(
        *(
            *SMALL,
            f"tracking.uri={store}",
            f"hydra.run.dir={tmp_path}/run",
            "tracking.experiment_name=a-${oc.env:FOO_KEY}",
        ),
        f"tracking.run_name='https://h/?token={PLANTED}'",
        f"tracking.tags={{login: 'https://u:{PLANTED}@h/', key: '${{oc.env:FOO_KEY}}'}}",
    )
    assert done.returncode == 0, done.stderr
    client = MlflowClient(store)
    (run,) = client.search_runs([client.get_experiment_by_name("a-***").experiment_id])
    assert run.info.run_name == "https://h/?token=***"
    assert (run.data.tags["login"], run.data.tags["key"]) == ("https://***@h/", "***")
    assert not found_in(tmp_path)


def test_what_a_library_logs_is_written_out(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    before = logging.getLogRecordFactory()
    handler = logging.StreamHandler(sys.stderr)
    logger = logging.getLogger("some.library")
    logger.addHandler(handler)
    try:
        show_libraries_visibly()
        logger.warning("a model of type %s", f"\x1b[31mRED http://u:{PLANTED}@h/")
        assert warnings.formatwarning("\x1b]0;x\x07", UserWarning, "f.py", 1) == "f.py:1: UserWarning: \\x1b]0;x\\x07\n"
    finally:
        logger.removeHandler(handler)
        logging.setLogRecordFactory(before)
    assert "a model of type \\x1b[31mRED http://***@h/" in capsys.readouterr().err


def test_a_folder_that_is_named_like_an_escape_is_written_out_by_sync(tmp_path: Path) -> None:
    folder = tmp_path / "s\x1b[31mZZ\x1b]0;PWN\x07"
    (folder / ".lock").mkdir(parents=True)
    (folder / "status.json").write_text("{}")
    (folder / "config.yaml").write_text(yaml.safe_dump({"tracking": {"type": "mlflow", "uri": "sqlite:///a.db"}}))
    for lock in ("lock", ".lock", LOCK):
        (folder / lock).mkdir(exist_ok=True)
    done = subprocess.run(
        [sys.executable, "-m", "src.sync", f"run={folder}", f"tracking.uri=sqlite:///{tmp_path}/a.db"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert "\x1b" not in done.stdout + done.stderr
    assert "ZZ" in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("node", "card"),
    [
        ({"a": {"nvme_path": "/tmp/x/nvme"}}, {"a": {"nvme_path": "nvme"}}),
        ({"a": ["/tmp/x y/b.json", "~/models/base"]}, {"a": ["b.json", "base"]}),
        ({"prompt_template": "/no_think {prompt}", "b": "/a/b/ {prompt}"},) * 2,
        ({"b": "a/b", "lr": 1.0, "name": "org/model"},) * 2,
    ],
)
def test_the_card_has_names_for_paths_under_any_key(node: Any, card: Any) -> None:
    assert shaping({"deepspeed": node}) == {"deepspeed": card}


def test_marks_of_direction_are_written_out_in_the_card() -> None:
    dumped = _as_yaml({"a": "한\u202eb"})
    assert "\u202e" not in dumped
    assert yaml.safe_load(dumped) == {"a": "한\u202eb"}
    assert "한" in _as_yaml({"a": "한"})


def test_code_keeps_its_words_and_loses_its_secrets() -> None:
    code = f'+HF_TOKEN = "{PLANTED}"\n+export OPENAI_API_KEY={PLANTED}\n+tokens = tokenizer(x)\n+key = value\n'
    assert clean_code(code) == "+HF_TOKEN = ***\n+export OPENAI_API_KEY=***\n+tokens = tokenizer(x)\n+key = value\n"


@pytest.mark.parametrize(
    "code",
    [
        'os.environ["HF_TOKEN"] = "{}"',
        "os.environ.setdefault('HF_TOKEN', '{}')",
        'HF_TOKEN: str = "{}"',
        'token: str | None = "{}"',
        "export DB_PASSWORD={}",
        "docker run -e DB_PASSWORD={} image",
        "api_key: {}",
        "  apiKey: '{}'",
        '{{"client_secret": "{}"}}',
        'login(token="{}")',
        'login("hf_{}0123")',
        "MY_SECRET='''{}'''",
        'MY_SECRET = """first\n+{}\n+last"""',
        'password = (\n+    "first"\n+    "{}"\n+)',
        "secret: |\n+  first\n+  {}",
        "-----BEGIN RSA PRIVATE KEY-----\n+{}\n+-----END RSA PRIVATE KEY-----",
        'headers = {{"Authorization": "Bearer {}"}}',
        "curl -H 'X: Bearer {}012345'",
    ],
)
def test_what_code_assigns_to_the_name_of_a_secret_is_masked(code: str) -> None:
    for planted in ("pl4nt", "PLANTED", "PLANT40abcdef0123456789"):
        masked = clean_code(f"+{code.format(planted)}\n kept = 1\n")
        assert planted not in masked
        assert masked.endswith("kept = 1\n"), masked


@pytest.mark.parametrize(
    "code",
    [
        "+tokens = tokenizer(text)",
        '+pad_token = "<pad>"',
        "+def login(token: str, key: str = None) -> None:",
        "+password = getpass()",
        '+token = os.environ["HF_TOKEN"]',
        "+for key, value in items: key = value",
        '+sorted(rows, key="length")',
        "+uri: ${oc.env:HF_TOKEN}",
        "+api_key: ${oc.env:API_KEY}",
    ],
)
def test_code_without_secrets_stays_as_it_is(code: str) -> None:
    assert clean_code(code) == code


def test_a_secret_in_a_difference_that_is_not_committed_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOME_PASSWORD", PLANTED)
    for command in (["init", "-q"], ["add", "."], ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "a"]):
        (tmp_path / "a.yaml").write_text("uri: none\n")
        subprocess.run(["git", *command], cwd=tmp_path, check=True, capture_output=True)
    (tmp_path / "a.yaml").write_text(f"uri: https://me:{PLANTED}x@host\nother: {PLANTED}\nkept: 1\n")
    diff = git_state(tmp_path)["diff"]
    assert PLANTED not in diff
    assert "+kept: 1" in diff


def test_the_environment_is_stored_as_what_it_comes_by(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_STORE", "http://somewhere/x")
    monkeypatch.setenv("HUB_TOKEN", PLANTED)
    monkeypatch.setenv("WORDS", "Answer briefly.")
    given = (
        "tracking=mlflow",
        "tracking.uri=${oc.env:MY_STORE}",
        "tracking.tags={team: '${oc.env:HUB_TOKEN}'}",
        "data.system_prompt=${oc.env:WORDS}",
        "tracking.experiment_name='${tracking.uri}-${oc.env:WORDS}'",
    )
    run = admit(given).run
    assert run is not None
    tracking: Any = run.config.tracking
    assert tracking.uri == "http://somewhere/x"
    assert tracking.tags == {"team": PLANTED}
    assert tracking.experiment_name == "http://somewhere/x-Answer briefly."
    assert run.frozen["tracking"]["uri"] == "${oc.env:MY_STORE}"
    assert run.frozen["tracking"]["tags"] == {"team": "${oc.env:HUB_TOKEN}"}
    assert run.frozen["tracking"]["experiment_name"] == "${oc.env:MY_STORE}-${oc.env:WORDS}"
    assert run.frozen["data"]["system_prompt"] == "Answer briefly."
    assert secrets.clean(f"a {PLANTED}") == "a ***"
    assert parse_stored(run.frozen) == run.config


def refers(monkeypatch: pytest.MonkeyPatch, variable: str, value: str) -> Any:
    monkeypatch.setenv(variable, value)
    given = f"tracking.experiment_name=${{oc.env:{variable}}}"
    run = admit(["tracking=mlflow", given, 'data.prompt_template="${tracking.experiment_name}: {prompt}"']).run
    assert run is not None
    assert run.config.data.prompt_template == f"{value}: {{prompt}}"
    assert run.frozen["tracking"]["experiment_name"] == f"${{oc.env:{variable}}}"
    return run


@pytest.mark.parametrize(
    ("variable", "value", "stored"),
    [
        ("WORDS", "Sum", "Sum: {prompt}"),
        ("SUM_KEY", PLANTED, "${oc.env:SUM_KEY}: {prompt}"),
        ("STORE", f"http://me:{PLANTED}@h/x", "http://***@h/x: {prompt}"),
    ],
)
def test_a_key_that_refers_to_the_tracker_means_the_same_in_every_process(
    variable: str, value: str, stored: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = refers(monkeypatch, variable, value)
    assert run.frozen["data"]["prompt_template"] == stored
    assert parse_stored(run.frozen) == run.config
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(run.frozen))
    again = admit([f"rerun={tmp_path}"]).run
    assert again is not None
    assert again.config.data.prompt_template == run.config.data.prompt_template


@pytest.mark.parametrize(("variable", "value"), [("SUM_KEY", PLANTED), ("STORE", f"http://me:{PLANTED}@h/x")])
def test_no_row_is_made_of_the_words_that_stand_for_a_secret(
    variable: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = refers(monkeypatch, variable, value)
    monkeypatch.delenv(variable)
    monkeypatch.delenv(secrets.HANDED_DOWN, raising=False)
    with pytest.raises(ConfigError, match=r"data\.prompt_template .*not stored"):
        parse_stored(run.frozen)


def test_a_url_on_the_command_line_comes_back_in_processes_that_this_one_starts() -> None:
    run = admit(["tracking=mlflow", f"tracking.uri=http://me:{PLANTED}@host/x"]).run
    assert run is not None
    assert PLANTED not in json.dumps(run.frozen)
    assert parse_stored(run.frozen) == run.config


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a run's folder that was begun with a URL with credentials."""
    run = admit(["tracking=mlflow", f"tracking.uri=http://me:{PLANTED}@host:5000/x"]).run
    assert run is not None
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(run.frozen))
    return tmp_path / "run"


def test_a_secret_that_is_missing_is_refused_by_name(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(secrets.HANDED_DOWN)
    with pytest.raises(ConfigError, match=r"tracking\.uri .*credentials were not stored.*MLFLOW_TRACKING_USERNAME"):
        admit([f"rerun={folder}"])
    again = f"http://me:{PLANTED}@host:5000/x"
    assert uri_of(f"rerun={folder}", f"tracking.uri={again}") == again


@pytest.mark.parametrize("way", ["variables", "netrc"])
def test_credentials_that_the_tracker_finds_by_itself_are_left_to_it(
    folder: Path, way: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv(secrets.HANDED_DOWN)
    if way == "variables":
        monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "me")
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", PLANTED)
    else:
        (tmp_path / ".netrc").write_text(f"machine host login me password {PLANTED}\n")
        (tmp_path / ".netrc").chmod(0o600)
    assert uri_of(f"rerun={folder}") == "http://host:5000/x"


def uri_of(*arguments: str) -> str:
    run = admit(list(arguments)).run
    assert run is not None
    tracking: Any = run.config.tracking
    return str(tracking.uri)


def test_a_variable_that_is_missing_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_STORE", "http://somewhere/x")
    run = admit(["tracking=mlflow", "tracking.uri=${oc.env:MY_STORE}"]).run
    assert run is not None
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(run.frozen))
    assert uri_of(f"rerun={tmp_path}") == "http://somewhere/x"
    monkeypatch.delenv("MY_STORE")
    with pytest.raises(ConfigError, match=r"tracking\.uri .*variable MY_STORE is not set") as refused:
        admit([f"rerun={tmp_path}"])
    assert str(refused.value).count("tracking") == 1
    with pytest.raises(ConfigError, match="MY_STORE") as refused:
        admit(["tracking=mlflow", "tracking.uri=${oc.env:MY_STORE}"])
    assert "1 problem\n" in str(refused.value)


@pytest.mark.parametrize("text", ["${seed}", r"\${seed}", r"\\${oc.env:HOME}", "${", "a${b}c$d", "\\", r"a\$b\\"])
def test_a_text_of_a_frozen_configuration_stands_for_itself(tmp_path: Path, text: str) -> None:
    run = admit(["tracking=none"]).run
    assert run is not None
    run.frozen["data"]["system_prompt"] = text
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(run.frozen))
    again = admit([f"rerun={tmp_path}"]).run
    assert again is not None
    assert again.config.data.system_prompt == text
    assert again.frozen["data"]["system_prompt"] == text


def test_refusals_show_no_secret() -> None:
    for arguments in (
        [f"tracking.uri=http://me:{PLANTED}@h/x", "tracking.tags=3", "optimizer.lr=x"],
        [f"tracking.url=http://me:{PLANTED}@h/x"],
        [f"tracking.uri=[http://me:{PLANTED}@h/x]"],
        [f"+tracking.uri=http://me:{PLANTED}@h/x=y"],
    ):
        done = towline(*arguments)
        assert done.returncode == 2
        assert PLANTED not in done.stdout + done.stderr
    with pytest.raises(ConfigError) as refused:
        admit_finished([f"run=http://me:{PLANTED}@h"], "predict")
    assert PLANTED not in secrets.clean(str(refused.value))


def found_in(folder: Path) -> list[str]:
    return [str(file) for file in folder.rglob("*") if file.is_file() and PLANTED.encode() in file.read_bytes()]


def test_the_planted_secret_is_found_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plant it in every way in, then look at all that a run, a repeat, predictions and sweeps write and print."""
    own = tmp_path / "own" / "experiment"
    own.mkdir(parents=True)
    (own / "mine.yaml").write_text(
        f"# @package _global_\ntracking:\n  uri: http://me:{PLANTED}@{NOBODY}/x\n"
        "  tags:\n    login: ${oc.env:SERVICE_TOKEN}\n    store: ${oc.env:MY_STORE}\n"
    )
    monkeypatch.setenv("SERVICE_TOKEN", PLANTED)
    monkeypatch.setenv("MY_STORE", f"postgresql://me:{PLANTED}@{NOBODY}/x")
    mine = (f"--config-dir={own.parent}", "experiment=mine")
    run = tmp_path / "out" / "run"
    commands = [
        (*mine, *SMALL, f"hydra.run.dir={run}"),
        (*mine, *SMALL, f"hydra.run.dir={run}", "training.max_train_steps=3"),
        (f"rerun={run}", f"hydra.run.dir={tmp_path}/out/again", f"tracking.uri=http://me:{PLANTED}@{NOBODY}/y"),
        (f"rerun={run}", f"hydra.run.dir={tmp_path}/out/third"),
        (*SMALL, "tracking.uri='${oc.env:MY_STORE}'", f"hydra.run.dir={tmp_path}/out/database"),
        ("-m", *mine, *SMALL, "seed=1,2", f"hydra.sweep.dir={tmp_path}/out/sweep"),
        ("-m", *mine, *SMALL, "sweep=asha", "optimizer.lr=1e-3,2e-3", f"hydra.sweep.dir={tmp_path}/out/asha",
         "sweep.storage=${oc.env:MY_STORE}"),
        ("--cfg", "job", *mine),
        ("--cfg", "job", "--resolve", *mine),
    ]  # fmt: skip
    codes = []
    for command in commands:
        done = towline(*command)
        codes.append(done.returncode)
        assert PLANTED not in done.stdout + done.stderr, command
        assert "Traceback" not in done.stderr, done.stderr
    predicted = towline(f"run={run}", "generation.max_new_tokens=2", "data.limit=2", main=predict.main)
    assert predicted.returncode == 0, predicted.stderr
    assert PLANTED not in predicted.stdout + predicted.stderr
    assert codes == [0, 0, 0, 2, 0, 0, 0, 0, 0], codes
    assert not found_in(tmp_path / "out")
    card = (run / "model" / "README.md").read_text()
    assert not [word for word in ("tracking", str(ROOT), str(tmp_path), "cache_dir") if word in card]
