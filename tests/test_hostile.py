"""Texts, models and files that mean harm: nothing of them reaches the terminal or a page, and all of it is bounded."""

from __future__ import annotations

import gzip
import io
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import peft
import pyarrow as pa
import pytest
import torch
from jinja2 import TemplateError
from markdown_it import MarkdownIt
from pyarrow import parquet
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import chat_template_utils

from src import patterns
from src.config.schema import Overflow
from src.data import bad_rows, cache, preparation
from src.data.chat_render import render
from src.data.dataset import build_data
from src.data.encoding import Lengths
from src.data.formats import BadRow
from src.data.preparation import EncodingConfig
from src.data.readers import json as json_reader
from src.data.readers import parquet as parquet_reader
from src.data.readers import read_file, record
from src.data.readers.record import Record, Unreadable
from src.data.tokenizer import load_tokenizer
from src.errors import ConfigError, DataError, LimitError, ModelError, report, visible
from src.inspection.drawing import Paint
from src.markdown import code, fenced, inline, table
from src.metrics import compute_metrics
from src.model.adapters import load_adapter
from src.model.build import build_model
from src.model.card import model_card
from src.patterns import Pattern
from src.templates import budget, sandbox
from src.tracking.console import Console
from src.trials import leaderboard
from src.trials.ranking import Row
from tests import chat_templates
from tests.conftest import admitted, write_lines

TERMINAL = "\x1b]0;owned\x07\x1b[2J\x9b31m\x7f\r\u202egnp.exe\u2066\ud800"
PAGES = [
    "a|b", "a\\|b", "a\\", "`", "``` \n```", "<script>alert(1)</script>", "<!--", "](http://evil.example)",
    "[x](http://evil.example)", "![x](http://evil.example)", "<http://evil.example>", "# a", "- a", "1. a", "> a",
    "a\n\n# b", "a\n---\nb", "| a |\n|---|\n| b |", "**a**", "__a__ _b_", "~~a~~", "&lt;b&gt;", "=", "\\`\\|`|`",
    "a\\\\|b", "`|\\|`", "$x$", "tab\there", "\x1b[31m",
]  # fmt: skip
CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def test_control_characters_are_written_out() -> None:
    assert visible("a\x1b[31m\n\tb\r") == "a\\x1b[31m\n\tb\\r".replace("\\r", "\\x0d")
    assert visible("a\nb\tc", is_line=True) == "a\\nb\\tc"
    assert visible("\u202e\ud800\u2028") == "\\u202e\\ud800\\u2028"
    plain = "é 한국 👨\u200d👩 naïve ﷺ عربى"
    assert visible(plain) == plain


def test_nothing_of_a_text_reaches_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    stream = io.StringIO()
    console = Console(stream)
    console.say(TERMINAL)
    console.label("rows", TERMINAL)
    console.table({TERMINAL: 1.0})
    console.evaluation(1, {f"eval/{TERMINAL}/loss": 1.0})
    console.warn(TERMINAL)
    report(ValueError(TERMINAL))
    printed = capsys.readouterr()
    assert not CONTROLS.search(stream.getvalue() + printed.err)
    assert stream.getvalue().count("\\x1b]0;owned\\x07") == 4
    assert printed.err.count("\\x1b]0;owned\\x07") == 2


def test_rows_are_painted_in_our_colours_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.delenv("NO_COLOR", raising=False)
    stream = io.StringIO()
    paint = Paint(stream)
    Console(stream).say(paint(Paint.THOUGHT, TERMINAL), is_painted=True)
    text = stream.getvalue()
    assert text.startswith("\x1b[36m")
    assert not CONTROLS.search(text.removeprefix("\x1b[36m").removesuffix("\x1b[0m\n"))


READER = MarkdownIt("commonmark").enable(["table", "strikethrough"])


def kinds(text: str) -> list[str]:
    """Return the kinds of all tokens of a text in Markdown, those in a line included."""
    return [one.type for token in READER.parse(text) for one in [token, *(token.children or [])]]


def shown(text: str) -> str:
    """Return what a reader of a text in Markdown sees."""
    return re.sub(r"<[^>]*>", "", READER.render(text)).strip()


@pytest.mark.parametrize("text", PAGES)
def test_a_text_in_markdown_stays_text(text: str) -> None:
    line = " ".join(visible(text).split())
    assert set(kinds(inline(text))) == {"paragraph_open", "inline", "text", "paragraph_close"}
    escaped = line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace('"', "&quot;")
    assert shown(inline(text)) == escaped
    rows = table(["a", "b"], [[code(text), inline(text)], [inline(text), code(text)]])
    found = kinds(rows)
    assert (found.count("tr_open"), found.count("td_open")) == (3, 4)
    assert not {"link_open", "image", "html_block", "em_open", "strong_open", "s_open", "heading_open"} & set(found)
    html = [one.content for token in READER.parse(rows) for one in token.children or [] if one.type == "html_inline"]
    assert set(html) <= {"<code>", "</code>"}
    assert READER.render(rows).count(f"<code>{escaped}</code>") == 2
    assert kinds(fenced(f"a\n{text}\nb", "yaml")) == ["fence"]


def test_a_card_and_a_leaderboard_hold_no_markup_of_names(tmp_path: Path) -> None:
    evil = "<script>|` ](http://evil.example)\n\n# owned ```\n"
    frozen: dict[str, Any] = admitted().frozen | {"name": evil}
    frozen["model"] = frozen["model"] | {"checkpoint": evil}
    data = {evil: {"rows_kept": 1000, "tokens": 2, "supervised_tokens": 3}}
    card = model_card(frozen, data, {f"eval/{evil}": 1.0}, {}, {evil: 7})
    row = Row("s", evil, evil, {(1, None): 0.5}, (1,), 1, 0, 0, 0, mean=0.5, rank=1)
    leaderboard.write([row], tmp_path, {evil: "minimize"}, evil)
    board = (tmp_path / "leaderboard.md").read_text(encoding="utf-8")
    for text in (card.split("---\n", 2)[2], board):
        found = kinds(text)
        assert not {"link_open", "html_block", "html_inline"} & set(found)
        assert "owned" in READER.render(text)
        assert not re.search(r"<h\d>owned", READER.render(text))
    assert kinds(card.split("---\n", 2)[2]).count("fence") == 3


EXPLOSIVE = r"(?:a|aa)+$|(b)"
LONG = "a" * 60 + "c"


@pytest.fixture
def short_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patterns, "SECONDS", 0.05)


def test_a_pattern_that_explodes_is_told(short_limit: None) -> None:
    pattern = Pattern("data.thought_pattern", EXPLOSIVE)
    for use in (pattern.is_in, pattern.matches):
        with pytest.raises(LimitError, match=r"data\.thought_pattern = .* 61 characters"):
            use(LONG)
    assert [match[1] for match in pattern.matches("abb")] == ["b", "b"]
    with pytest.raises(ConfigError, match=r"data\.answer_pattern"):
        Pattern("data.answer_pattern", "(")


@pytest.mark.parametrize(
    ("pattern", "text"),
    [
        (r"<<(.*?)>>", "1<<2\n>>3<<>>"), (r"\\boxed{([^}]*)}", r"so \boxed{7} is it"), (r"x{e}(a)", "x{e}a xa ya"),
        (r"(a){2}|b{,2}(c)|d{}(e)", "aabbcd{}e"), (r"[{}](a)", "{a}a"), (r"[]{e}]+(b)", "]{e}b"), (r"(?i)(É)", "é"),
        (r"(a*)", "baac"), (r"\N{DIGIT ONE}(.)", "12"), (r"^(.)|(.)$", "a\nb"), (r"[^]{]{2}(\{)", "ab{"),
        (r"#### *(-?[0-9.,]*[0-9])", "#### -1,000.5 #### 7."), (r"\{(?P<n>\w+)\}", "{a}{b_1}"),
    ],
)  # fmt: skip
def test_a_pattern_finds_what_re_finds(pattern: str, text: str) -> None:
    found = Pattern("data.answer_pattern", pattern)
    same = re.compile(pattern, re.DOTALL)
    assert [(m.span(), m[1]) for m in found.matches(text)] == [(m.span(), m[1]) for m in same.finditer(text)]
    assert found.is_in(text) == bool(same.search(text))


def test_a_row_on_which_a_pattern_explodes_is_told_by_its_place(short_limit: None, tmp_path: Path) -> None:
    file = write_lines(tmp_path / "rows.jsonl", [{"prompt": "p", "completion": c} for c in ("b", LONG, LONG)])
    for given in (
        ["data=prompt_completion", f"data.thought_pattern='{EXPLOSIVE}'", "tokens=none"],
        ["data=prompt_completion", f"data.answer_pattern='{EXPLOSIVE}'", "evaluation.metrics=[exact_match]"],
    ):
        config = admitted(*given, f"data.train_files=[{file}]", f"data.test_files=[{file}]").config
        with pytest.raises(DataError, match=rf"{re.escape(str(file))}:2: data\.\w+_pattern"):
            build_data(config, load_tokenizer(config.model, config.tokens)[0])


def test_a_generated_text_on_which_a_pattern_explodes_is_told_by_its_row(short_limit: None) -> None:
    with pytest.raises(DataError, match=r"^row 1: data.answer_pattern"):
        compute_metrics(["exact_match"], ["b", LONG], ["b", "b"], EXPLOSIVE, "row {}".format)


R = "{% for i in range(100000) %}"
NESTED = "".join(f"{{% set n{i} = namespace() %}}" for i in range(40)) + "".join(
    f"{{% set n{i + 1}.a = n{i} %}}{{% set n{i + 1}.b = n{i} %}}" for i in reversed(range(39))
)
"""A value that would take a terabyte to write out: each of 40 holds the one before it twice."""
A = "{% set x = 'a' * 1000000 %}"
BOMBS = [
    R * 3 + "{% endfor %}" * 3,
    R * 2 + "x" * 1000 + "{% endfor %}" * 2,
    "{% for i in range(10 ** 9) %}{% endfor %}",
    R + "{% for j in range(100000) if j > 100000 %}{% endfor %}{% endfor %}",
    "{% macro f(n) %}{{ f(n - 1) }}{{ f(n - 1) }}{% endmacro %}{% if 1 %}" + "{% macro g(n) %}{% if n %}{{ g(n - 1) }}"
    "{{ g(n - 1) }}{% endif %}{% endmacro %}{{ g(60) }}{% endif %}",
    "{{ 'a' * 10 ** 10 }}",
    "{{ 10 ** 10 * 'a' }}",
    "{{ ([1] * 10 ** 10)|length }}",
    "{{ 9 ** (9 ** 9) }}",
    "{% set n = namespace(x=3) %}" + R + "{% set n.x = n.x * n.x %}{% endfor %}",
    "{% set n = namespace(x='a') %}" + R + "{% set n.x = n.x ~ n.x %}{% endfor %}",
    "{% set n = namespace(x='a') %}" + R + "{% set n.x = n.x + n.x %}{% endfor %}",
    "{% set n = namespace(x=[1]) %}" + R + "{% set n.x = n.x + n.x %}{% endfor %}",
    "{% set n = namespace(x=[1]) %}" + R + "{% set n.x = [n.x, n.x] %}{% endfor %}{{ n.x }}",
    "{% set n = namespace(x=1) %}" + R + "{% set n.x = {'a': n.x, 'b': n.x} %}{% endfor %}{{ n.x }}",
    "{% set x0 = 'a' %}"
    + "".join(f"{{% set x{i + 1} %}}{{{{ x{i} }}}}{{{{ x{i} }}}}{{% endset %}}" for i in range(60)),
    "{{ 'a'|center(10 ** 10) }}",
    "{{ '%10000000000d'|format(1) }}",
    "{{ '{:>10000000000}'.format(1) }}",
    "{{ '%10000000000d' % 1 }}",
    "{{ '%*d' % (10000000000, 1) }}",
    "{{ '{:>{}}'.format(1, 10 ** 10) }}",
    "{{ '{a:>10000000000}'.format_map({'a': 1}) }}",
    "{% set f = '{:>10000000000}'|attr('format') %}{{ f(1) }}",
    "{{ 'a'.ljust(10 ** 10) }}",
    "{{ '1'.zfill(10 ** 10) }}",
    "{{ '\t'.expandtabs(10 ** 10) }}",
    A + "{{ x.replace('a', x) }}",
    A + "{{ x|replace('', x) }}",
    A + "{{ x.join(x) }}",
    A + "{{ range(100000)|join(x) }}",
    A + "{{ range(100000)|map('string')|join(x) }}",
    A + "{{ x.translate({97: x}) }}",
    A + "{{ x|wordwrap(1, wrapstring=x) }}",
    "{{ ('a\n' * 1000000)|indent(1000000) }}",
    "{{ range(100000)|map('center', 1000000)|join }}",
    "{{ messages|tojson(indent=10 ** 10) }}",
    "{{ (1).to_bytes(10 ** 10, 'big') }}",
    "{{ [1]|batch(10 ** 10, 0)|list }}",
    NESTED + "{{ n39 }}",
    NESTED + "{{ n39 ~ '' }}",
    NESTED + "{{ '%s' % n39 }}",
    NESTED + "{{ [n39]|join }}",
    NESTED + "{{ raise_exception(n39) }}",
    NESTED + "{{ n39|string }}",
    "{% generation %}" + R * 2 + "{% endfor %}" * 2 + "{% endgeneration %}",
    "{% set b = range(99999)|list %}{% for y in b %}{% for x in b if -1 in b %}{% endfor %}{% endfor %}",
    "{% set b = range(99999)|list %}{% for y in b if b == b|list and -1 in b %}{% endfor %}",
    "{% set b = range(99999)|list %}{{ b|select('in', b)|list }}",
    "{% set b = range(99999)|list %}{{ b|map('in', b)|list }}{{ b|reject('in', b)|first }}",
    A + "{{ range(99999)|map(attribute='a', default=x)|sort }}",
    A + "{{ range(99999)|map(attribute='a', default=x)|unique|list }}",
    A + "{{ range(99999)|map(attribute='a', default=x)|max }}",
    A + "{{ (x * 2)|wordwrap(1) }}",
    A + "{{ (x * 2)|title }}",
    A + "{{ x|wordwrap(1) }}",
    A + "{{ (x * 2)|striptags }}",
    A + "{{ (x * 2)|urlize }}",
    A + "{{ (x * 4)|list }}",
    A + "{{ (x * 4).split() }}",
    "{{ ('a,' * 1000000).split(',') }}",
    "{{ ('a\n' * 1000000).splitlines() }}",
    "{{ strftime_now('%c' * 100000) }}",
]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(admitted("tokens=none").config.model, admitted("tokens=none").config.tokens)[0]


@pytest.fixture
def short_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget, "SECONDS", 0.05)
    monkeypatch.setattr(budget, "MAX_SIZE", 2**22)
    monkeypatch.setattr(budget, "MAX_MADE", 2**24)
    monkeypatch.setattr(sandbox, "MAX_PRODUCT", 2**24)


CHAT = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


@pytest.mark.parametrize("template", BOMBS)
def test_a_template_without_end_is_told(template: str, tokenizer: Any, short_time: None) -> None:
    # where the time is over before or behind the template's own lines, there is none to tell
    with pytest.raises(LimitError, match=r"^the chat template of .*(, line [12], | does not terminate )"):
        render(tokenizer, template, CHAT)


@pytest.mark.parametrize(
    "name", [name for name, value in vars(chat_templates).items() if name.isupper() and "{%" in value]
)
def test_counting_changes_nothing_of_a_template(name: str, tokenizer: Any) -> None:
    template = getattr(chat_templates, name)
    render_or_none(tokenizer, template, CHAT)  # counts from here on
    for chat in (CHAT, CHAT * 3, [{"role": "system", "content": " s "}, *CHAT * 2]):
        for prompts in (False, True):
            given = dict(messages=chat, add_generation_prompt=prompts, tools=None, **tokenizer.special_tokens_map)
            plain = chat_template_utils._cached_compile_jinja_template(template)
            counted = chat_template_utils._compile_jinja_template(template)
            assert rendered(counted, given) == rendered(plain, given)


def rendered(template: Any, given: dict[str, Any]) -> str:
    try:
        return template.render(**given)
    except TemplateError as error:
        return repr(error)


def render_or_none(tokenizer: Any, template: str, chat: list[dict[str, str]]) -> str | None:
    try:
        return render(tokenizer, template, chat)
    except BadRow:
        return None


def test_values_of_a_template_are_those_of_plain_python(tokenizer: Any) -> None:
    template = """
    {{ 'a' + 'b' + 'c' }} {{ [1] + [2, 3] }} {{ 1 + 2 * 3 - 4 }} {{ 'a' ~ 1 ~ none }} {{ 2 ** 3 ** 2 }} {{ 7 % 4 }}
    {% set x, y = (1, messages[0].role) %}{{ x }}{{ y }} {{ {'k': [x, y]} }} {{ 'x'.join(['1', '2']) }} {{ undefined }}
    {% for a, b in [(1, 2), (3, 4)] %}{{ a * b }}{{ loop.last }}{% endfor %}{% for a in [] %}{% else %}none{% endfor %}
    {{ '%s-%05d'|format('a', 42) }} {{ '{}:{:>4}'.format('a', 1) }} {{ 'aXb'.replace('X', '--') }}
    {{ 'a,b'.split(',') }}
    {{ ' t '|trim }} {{ messages|length }} {{ messages|map(attribute='role')|join('+') }}
    {{ messages|tojson(indent=1) }}
    {% macro m(a, b=2) %}<{{ a }}{{ b }}{{ caller() if caller }}>{% endmacro %}{{ m(1) }}{% call m(3) %}c{% endcall %}
    {% set block %}in {{ x }}{% endset %}{{ block|upper }}{% filter lower %}ABC{{ y|upper }}{% endfilter %}
    """
    render(tokenizer, template, CHAT)
    given = dict(messages=CHAT, **tokenizer.special_tokens_map)
    plain = chat_template_utils._cached_compile_jinja_template(template)
    assert rendered(chat_template_utils._compile_jinja_template(template), given) == rendered(plain, given)


@pytest.mark.parametrize("always", [True, False])
@pytest.mark.parametrize(
    ("endless", "reason"),
    [
        ("{{ 'a' * 10**9 }}", ", line 2, makes "),
        (R * 3 + "{% endfor %}" * 3, r"(, line 2,|) does not terminate"),  # wherever the time is over
    ],
)
def test_a_template_without_end_is_told_by_row(
    endless: str, reason: str, always: bool, short_time: None, tmp_path: Path
) -> None:
    chats = [[CHAT[0] | {"content": content}, CHAT[1]] for content in ("a", "boom", "boom")]
    file = write_lines(tmp_path / "rows.jsonl", [{"messages": chat} for chat in chats])
    config = admitted("data=messages", f"data.train_files=[{file}]", "tokens=none").config
    tokenizer, _ = load_tokenizer(config.model, config.tokens)
    endless = endless if always else "{% if messages[0].content == 'boom' %}" + endless + "{% endif %}"
    tokenizer.chat_template = "{% for m in messages %}{{ m.content + eos_token }}{% endfor %}\n" + endless
    place = f"{re.escape(file)}:{1 if always else 2}"
    with pytest.raises(DataError, match=rf"^{place}: the chat template of [^,]*{reason}"):
        build_data(config, tokenizer)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small checkpoint with three layers."""
    folder = tmp_path_factory.mktemp("checkpoint")
    config = AutoConfig.from_pretrained("assets/tiny_llama")
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    for file in Path("assets/tiny_llama").glob("*token*"):
        shutil.copy(file, folder)
    return folder


Change = Callable[[dict[str, Any]], object]


def changed(checkpoint: Path, folder: Path, settings: dict[str, Any], change: Change) -> str:
    """Write a checkpoint with other settings and weights; return its place."""
    shutil.copytree(checkpoint, folder)
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


def spoil(name: str, value: float) -> Change:
    def change(weights: dict[str, Any]) -> None:
        weights[name].view(-1)[5] = value

    return change


def add(name: str) -> Change:
    return lambda weights: weights.update({name: torch.zeros(3)})


def nothing(_: object) -> None:
    pass


@pytest.mark.parametrize(
    ("settings", "change", "told"),
    [
        ({"num_hidden_layers": -1}, nothing, r"describes no model: num_hidden_layers = -1"),
        ({"num_hidden_layers": 0}, nothing, r"describes no model: num_hidden_layers = 0"),
        ({"num_hidden_layers": 10**7}, nothing, r"num_hidden_layers = 10000000 \(at most"),
        ({"vocab_size": -3}, nothing, r"describes no model: vocab_size = -3"),
        ({"num_hidden_layers": 2}, nothing, r"has 9 weights \(model\.layers\.2\.\w+.* no place"),
        ({"num_hidden_layers": 4}, nothing, r"lacks 9 weights \(model\.layers\.3\..* at random"),
        ({"intermediate_size": 32}, nothing, r"has 9 weights \(.*\[128, 384\], \[128, 32\] in config.json"),
        (
            {},
            spoil("model.layers.1.mlp.up_proj.weight", math.nan),
            r"1 weight \(model\.layers\.1\.mlp\.up_proj\.weight\)",
        ),
        ({}, spoil("model.norm.weight", -math.inf), r"1 weight \(model\.norm\.weight\) with values that are NaN"),
        ({}, lambda weights: weights.pop("model.norm.weight"), r"lacks 1 weight \(model\.norm\.weight\)"),
        (
            {},
            add("model.layers.0.self_attn.q_proj.bias"),
            r"has 1 weight \(model\.layers\.0\.self_attn\.q_proj\.bias\)",
        ),
        ({}, add("model.layers.0.mlp.\x1b[2J"), r"has 1 weight \(model\.layers\.0\.mlp\.\\x1b\[2J\)"),
    ],
)
def test_weights_that_are_not_the_models_are_its_checkpoints_fault(
    settings: dict[str, Any], change: Change, told: str, checkpoint: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    folder = changed(checkpoint, tmp_path / "model", settings, change)
    config = admitted(f"model.checkpoint={folder}", "model.weights=pretrained").config
    with pytest.raises(ModelError, match=told):
        build_model(config, torch.device("cpu"))
    assert "\x1b" not in capsys.readouterr().err


def test_parts_of_another_kind_of_model_are_left_out_with_a_warning(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def change(weights: dict[str, Any]) -> None:
        weights |= {name: torch.zeros(3) for name in ("v_head.weight", "model.vision.weight")}
        weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(16)  # older transformers wrote it

    folder = changed(checkpoint, tmp_path / "model", {}, change)
    config = admitted(f"model.checkpoint={folder}", "model.weights=pretrained").config
    build_model(config, torch.device("cpu"))
    told = capsys.readouterr().err
    assert re.search(r"warning: .* has 2 weights \(model\.vision\.weight, v_head\.weight\) of parts .* left out", told)


@pytest.mark.parametrize("quantization", ["int8", "nf4"])
def test_weights_that_are_not_finite_are_told_of_quantised_ones_too(
    quantization: str, checkpoint: Path, tmp_path: Path
) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    folder = changed(checkpoint, tmp_path / "model", {}, spoil(name, math.nan))
    given = [f"model.checkpoint={folder}", "model.weights=pretrained", f"quantization={quantization}", "adapter=lora"]
    with pytest.raises(ModelError, match=rf"1 weight \({re.escape(name)}\)"):
        build_model(admitted(*given).config, torch.device("cpu"))


def test_an_adapter_whose_weights_are_not_its_own_is_told(tmp_path: Path) -> None:
    def base() -> Any:
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained("assets/tiny_llama"))

    peft.get_peft_model(base(), peft.LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)
    load_adapter(base(), tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    whole = load_file(file)
    name = next(iter(whole))
    cases = {
        r"values that are NaN": whole | {name: whole[name] * math.nan},
        r"lacks 1 weight": {key: tensor for key, tensor in whole.items() if key != name},
        r"no place for": whole | {"base_model.model.lm_head.lora_A.weight": torch.zeros(2)},
    }
    for told, weights in cases.items():
        save_file(weights, file, metadata={"format": "pt"})
        with pytest.raises(ModelError, match=told):
            load_adapter(base(), tmp_path)
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(ModelError, match=r"^the adapter in .* can't be read"):
        load_adapter(base(), tmp_path)
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(
        ModelError, match=r"^the adapter in .* can't be read: adapter_model.safetensors is no plain file"
    ):
        load_adapter(base(), tmp_path)


def test_json_is_read_alike_in_pieces_of_any_size(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    texts = [
        '[{"a": "x\\n\\u00e9 한", "b": [1, 2.5e1, true, null]},\n {"a": 1},{}]\n', "[]", " [ ] ", "[1, 22, -3.5]",
        '[{"a": 1}',
        '[{"a": 1} {"a": 2}]', '[{"a": 1},]', '[{"a": tru}]', '[{"a": "x}]', '[{"a": 1}]]', '[{"a": 1},\n{"a" 2}]', "{",
        '[{"a": NaN}, {"a": -Infinity}]', '[{"a": 1, "a": 2}, {"b": "\\ud800"}]', "[[[1]], {}]", '["x", true]', "x", "",
        '[{"a": "' + "é" * 50 + '"}, 3', "[" * 3000,
    ]  # fmt: skip
    contents = [text.encode() for text in texts]
    contents += [
        b'[{"a": "\xc3"}]',
        b'[{"a": 1},\n {"a": "\xff"}]',
        b'[{"a": 1}, \0]',
        b'\xef\xbb\xbf[{"a": 1}]',
        b"[\xc3",
    ]
    for number, content in enumerate(contents):
        file = tmp_path / f"{number}.json"
        file.write_bytes(content)
        whole = list(read_file(str(file)))
        numbered = [row for row in whole if row.number is not None]
        for size in (1, 2, 3, 7, 64):
            monkeypatch.setattr(json_reader, "CHUNK_BYTES", size)
            pieces = list(read_file(str(file)))
            assert pieces[-1:] == whole[-1:]
            assert [row for row in pieces if row.number is not None][: len(numbered)] == numbered
        monkeypatch.undo()


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("zeros.jsonl", b"\0", ":1 longer than 64 MiB"),
        ("letters.txt", b"a", ":1 longer than 64 MiB"),
        ("newlines.jsonl", b"\n", r":\d+ more than 4 MiB without a row"),
        ("newlines.csv", b"\n", r":\d+ more than 4 MiB without a row"),
        ("spaces.json", b" ", "more than 4 MiB without a row"),
        ("string.json", b'[{"a": "a', ":1 longer than 64 MiB"),
        ("lists.json", b"[", ":1 nested too deep"),
    ],
)
def test_a_small_file_that_unpacks_to_gigabytes_is_refused_by_its_line(
    name: str, content: bytes, told: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(record, "MAX_ROW_BYTES", 2**12)
    monkeypatch.setattr(record, "MAX_LINE_BYTES", 2**16)
    monkeypatch.setattr(record, "MAX_BLANK_BYTES", 2**16)
    file = tmp_path / f"{name}.gz"
    begin = content[:-1] if name == "string.json" else b""
    with gzip.open(file, "wb", compresslevel=1) as out:
        out.write(begin + content[-1:] * 2**18)
    (row,) = read_file(str(file))
    assert isinstance(row, Unreadable)
    assert re.match(f"{re.escape(str(file))}{told}", f"{row.place}{'' if row.number is None else ' '}{row.reason}")


def test_a_table_of_one_gigantic_value_is_not_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = str(tmp_path / "rows.parquet")
    parquet.write_table(pa.table({"prompt": ["a", "b" * 2**20]}), file, row_group_size=1, use_dictionary=False)
    monkeypatch.setattr(record, "MAX_LINE_BYTES", 2**16)
    good, bad = read_file(file)
    assert isinstance(good, Record)
    assert (bad.place, str(bad.reason).split(",")[0]) == (f"{file}:2", "longer than 64 MiB")  # type: ignore[union-attr]


def numbers(file: str) -> list[int]:
    """Return the field n of all rows of a file, which must be readable."""
    rows = list(read_file(file))
    assert all(isinstance(row, Record) and row.number == i for i, row in enumerate(rows, start=1))
    return [row.fields["n"] for row in rows if isinstance(row, Record)]


def test_rows_that_repeat_a_large_value_are_read_a_few_at_a_time(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = str(tmp_path / "rows.parquet")
    parquet.write_table(pa.table({"prompt": ["b" * 1000] * 100, "n": range(100)}), file, compression="zstd")
    metadata = parquet.ParquetFile(file).metadata
    columns = parquet_reader._columns(file, metadata, 0)
    assert (columns[0].largest, columns[1].largest) == (1004, 16)  # a text, and its length in 4 bytes
    assert parquet_reader._rows_per_batch(columns, 1) == parquet_reader.BATCH_ROWS
    monkeypatch.setattr(parquet_reader, "BATCH_BYTES", 10_000)
    assert parquet_reader._rows_per_batch(columns, 1) == 9
    assert numbers(file) == list(range(100))


def repeated(count: int, size: int) -> pa.Array:
    """Return a column that has one text very often, and stores it once."""
    return pa.DictionaryArray.from_arrays(pa.array([0] * count, pa.int32()), pa.array(["b" * size]))


@pytest.mark.parametrize("store_schema", [True, False])
def test_a_small_table_that_unpacks_to_gigabytes_takes_little_memory(store_schema: bool, tmp_path: Path) -> None:
    file = tmp_path / "rows.parquet"
    table = pa.table({"prompt": repeated(20_000, 2**20), "n": range(20_000)})
    parquet.write_table(table, file, compression="zstd", store_schema=store_schema)
    assert file.stat().st_size < 200_000
    before, most = pa.total_allocated_bytes(), 0
    for row in read_file(str(file)):
        most = max(most, pa.total_allocated_bytes() - before)
        if isinstance(row, Unreadable):
            break
        assert row.fields == {"prompt": "b" * 2**20, "n": row.number - 1}
    assert most < 2.5 * parquet_reader.BATCH_BYTES
    assert "unpacks to more than 1.0 GiB and 500 times its size" in row.reason
    assert 1000 < (row.number or 0) < 1100


def test_one_row_that_repeats_a_large_value_is_refused_before_it_is_made(tmp_path: Path) -> None:
    file = str(tmp_path / "rows.parquet")
    texts = pa.StructArray.from_arrays([repeated(1000, 2**20), pa.array(["user"] * 1000)], ["content", "role"])
    lists = pa.ListArray.from_arrays(pa.array([0, 1, 999, 1000], pa.int32()), texts)
    parquet.write_table(pa.table({"messages": lists}), file, compression="zstd", store_schema=False)
    first, bad, last = read_file(file)
    assert isinstance(first, Record)
    assert isinstance(last, Record)
    assert first.fields == last.fields == {"messages": [{"content": "b" * 2**20, "role": "user"}]}
    assert bad == Unreadable(file, 2, "longer than 4 MiB; is this really one row?")


def test_tables_are_read_alike_in_pieces_of_any_size(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = str(tmp_path / "rows.parquet")
    messages = [[{"role": "user", "content": "é" * 99}, {"role": None, "content": None}], None, [], [None]]
    table = pa.table(
        {
            "messages": messages * 5,
            "text": ["a" * 500, None, "", "한"] * 5,
            "bytes": [b"x", None, b"", b"y"] * 5,
            "map": pa.array([[("k", "v" * 70)], None, [], [("k", None)]] * 5, pa.map_(pa.string(), pa.string())),
            "pair": pa.array([["a", "b"], ["", "é"], ["c", None], ["", ""]] * 5, pa.list_(pa.string(), 2)),
            "kind": pa.array(["a", "b", None, "a"] * 5).dictionary_encode(),
            "number": [1.5, 2.0, None, 3.0] * 5,
        }
    )
    parquet.write_table(table, file, row_group_size=7)
    whole = list(read_file(file))
    assert [row.fields for row in whole if isinstance(row, Record)] == table.to_pylist()
    for batch, piece in ((1, 1), (100_000, 1), (100_000, 300), (2000, 2000)):
        monkeypatch.setattr(parquet_reader, "BATCH_BYTES", batch)
        monkeypatch.setattr(parquet_reader, "SLICE_BYTES", piece)
        monkeypatch.setattr(record, "MAX_ROW_BYTES", 1000)
        assert list(read_file(file)) == whole


def test_a_packed_file_of_many_times_its_size_is_not_read_to_its_end(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(record, "MAX_UNPACKED_BYTES", 2**20)
    for name, content in (("a.jsonl.gz", b'{"a": 1}\n' * 2**17), ("a.json.gz", b"[" + b'{"a": 1},' * 2**17)):
        file = tmp_path / name
        file.write_bytes(gzip.compress(content))
        monkeypatch.setattr(record, "MAX_UNPACKED_RATIO", 100)
        *good, bad = read_file(str(file))
        assert isinstance(bad, Unreadable)
        assert re.search(r"unpacks to more than 1.0 MiB and 100 times its size", bad.reason)
        assert 10**5 < len(good) < 2**17
        monkeypatch.setattr(record, "MAX_UNPACKED_RATIO", 1000)
        assert sum(isinstance(row, Record) for row in read_file(str(file))) == 2**17


def test_rows_on_their_way_are_bounded_in_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    config = admitted(
        "data=prompt_completion", "data.train_files=[data/tow_addition/train.jsonl]", "tokens=none"
    ).config
    recipe = EncodingConfig(
        config.data,
        config.tokens,
        load_tokenizer(config.model, config.tokens)[0],
        Lengths(64, None, Overflow.truncate),
        is_chat=False,
    )
    texts = ["a" * size for size in [10] * 600 + [3000] * 300 + [20_000] * 3 + [10] * 40 + [3000] * 10]
    taken = 0

    def records() -> Iterator[Record]:
        nonlocal taken
        for number, text in enumerate(texts, start=1):
            taken += len(text)
            yield Record({"prompt": "p", "completion": text}, "file", number)

    whole = [row for chunk in preparation.encode_chunks(records(), recipe) for row in chunk.rows.to_pylist()]
    monkeypatch.setattr(preparation, "CHUNK_BYTES", 10_000)
    monkeypatch.setattr(preparation, "BYTES_AHEAD", 30_000)
    taken = done = most = 0
    rows: list[Any] = []
    for chunk in preparation.encode_chunks(records(), recipe):
        most = max(most, taken - done)
        rows += chunk.rows.to_pylist()
        done = sum(map(len, texts[: len(rows)]))
    assert rows == whole
    assert most < 30_000 + 2 * 20_000  # what is prepared, the chunk that waits, and the row that ended it
    sizes = [len(chunk) for chunk, _ in preparation._chunks(enumerate(records()), 250)]
    assert sizes[:4] == [71, 71, 71, 37]  # of 11 bytes and two entries each; a chunk ends with the 250th row


def test_prepared_rows_leave_room_on_the_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = write_lines(tmp_path / "rows.jsonl", [{"prompt": "p", "completion": "c" * 100}] * 2000)
    given = [
        "data=prompt_completion",
        f"data.train_files=[{file}]",
        "tokens=none",
        f"data.cache_dir={tmp_path / 'rows'}",
    ]
    config = admitted(*given).config
    tokenizer, _ = load_tokenizer(config.model, config.tokens)
    monkeypatch.setattr(cache, "UNCHECKED_BYTES", 2**17)
    free = shutil.disk_usage(tmp_path)._replace(total=2**40, free=2**28)
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda _: free)
    with pytest.raises(DataError, match=r"no space left for prepared rows .* data\.limit"):
        build_data(config, tokenizer)
    assert not list((tmp_path / "rows").glob("*.tmp"))
    few = admitted(*given, "data.limit=100").config
    assert len(build_data(few, tokenizer).train) == 100


def test_names_of_keys_stay_one_line(tmp_path: Path) -> None:
    rows = [{"prompt": "p", "completion": "c", "a\r\n\x1b[2J b": 1}]
    config = admitted("data=prompt_completion", f"data.train_files=[{write_lines(tmp_path / 'r.jsonl', rows)}]").config
    data = build_data(config, load_tokenizer(config.model, config.tokens)[0])
    assert data.reports["train"].unread_keys == {"a\\x0d\\n\\x1b[2J b": 1}


def test_a_row_on_which_the_tokenizer_fails_is_told_by_its_place(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree("assets/tiny_llama", tmp_path / "model")
    file = tmp_path / "model" / "tokenizer.json"
    spec = json.loads(file.read_text(encoding="utf-8"))
    split = {"type": "Split", "pattern": {"Regex": "(([0-9]+)+)+!"}, "behavior": "Isolated", "invert": False}
    spec["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, spec["pre_tokenizer"]]}
    file.write_text(json.dumps(spec), encoding="utf-8")
    rows = [{"prompt": prompt, "completion": "b"} for prompt in ("a", "12!", "1" * 60, "1" * 60)]
    data = write_lines(tmp_path / "rows.jsonl", rows)
    config = admitted("data=prompt_completion", f"data.train_files=[{data}]", "tokens=none",
                      f"model.checkpoint={tmp_path / 'model'}").config  # fmt: skip
    tokenizer, _ = load_tokenizer(config.model, config.tokens)
    with pytest.raises(DataError, match=rf"^{re.escape(data)}:3: the tokenizer fails: .* does not terminate"):
        build_data(config, tokenizer)
    assert "panicked" not in capfd.readouterr().err


def test_what_interrupts_a_template_harms_nothing_else(tokenizer: Any, short_time: None) -> None:
    endless = "{% set b = range(99999)|list %}{% for y in b %}{% for x in b if -1 in b %}{% endfor %}{% endfor %}"
    for _ in range(3):
        with pytest.raises(LimitError, match=r"(, line 1, | )does not terminate within 0.05\d* s"):
            render(tokenizer, endless, CHAT)
        assert sum(i for i in range(10**6)) == 499999500000  # no interruption comes after
        assert render(tokenizer, "{{ messages[0].content }}", CHAT) == "a"
    with ThreadPoolExecutor(4) as pool:  # nor in threads that render at the same time
        templates_given = [endless, "{% for m in messages %}{{ m.content }}{% endfor %}"] * 8
        found = list(pool.map(lambda template: told(tokenizer, template), templates_given))
    assert found == ["limit", "ab"] * 8


def told(tokenizer: Any, template: str) -> str:
    try:
        return render(tokenizer, template, CHAT)
    except LimitError:
        return "limit"


def test_filters_of_ordinary_templates_take_long_texts(tokenizer: Any) -> None:
    chat = [{"role": "user", "content": "word, " * 600_000}]
    for text in ("content.split('</think>')[-1]", "content.split(',')|length ~ ''", "content|trim|upper|lower|trim",
                 "content.splitlines()|first", "content|replace('z', 'y')"):  # fmt: skip
        assert len(render(tokenizer, "{% set content = messages[0].content %}{{ " + text + " }}", chat)) > 1


@pytest.mark.parametrize(("group", "bad"), [(False, b"x\n"), (True, b"x\n"), (True, b'{"prompt": 1}\n')])
def test_a_file_of_rubbish_is_not_read_to_its_end(
    group: bool, bad: bytes, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(bad_rows, "MAX_BAD", 500)
    good = b'{"prompt": "p", "completion": "c", "g": 1}\n{"prompt": "p", "completion": "c", "g": 2}\n'
    folds = ["data.num_folds=2", "data.fold=0", "data.group_column=g"] if group else []

    def refused(content: bytes) -> str:
        file = tmp_path / "rows.jsonl.gz"
        file.write_bytes(gzip.compress(content))
        config = admitted("data=prompt_completion", f"data.train_files=[{file}]", "tokens=none", *folds).config
        with pytest.raises(DataError) as error:
            build_data(config, load_tokenizer(config.model, config.tokens)[0])
        return str(error.value).replace(str(file), "FILE")

    message = refused(bad * 100_000)
    assert message.startswith("500 rows can't be used:\n  FILE:1  ")
    assert message.endswith("stopped at FILE:500, after 500 rows that can't be used and fewer that can")
    half = refused((good + bad + bad) * 300)  # not more of them than of the good ones, so all are counted
    assert half.startswith("600 rows can't be used:")
    assert half.endswith("… and 590 more")
