"""Chat templates are programs of somebody else's: rendered within limits of time and memory.

transformers renders them in a sandbox that keeps them from files and Python's internals, not from endless loops or
texts without limit. Here each template is compiled to count what it does: every turn of a loop and call of a macro,
every text that is written, and every value that an operator, filter or function makes. What grows by multiplication is
measured before it is made (docs/decisions/0035).
"""

import functools
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from jinja2 import nodes, pass_context
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from src.errors import LimitError
from src.templates import budget as limits
from src.templates.budget import ENTRY, LARGE, Budget, OutOfTime, Watchdog, check_size, length_of, size_of, spend

MAX_PRODUCT = 2**28  # the largest product that may be made: length times repetitions
MAX_NUMBER = 10**6  # the largest number that may be passed to a filter or function, such as a width
MAX_BITS = 10**6  # of a whole number
MAX_LABORIOUS = 2**20  # the most characters of a text that is passed to one of LABORIOUS
MAX_TIME_FORMAT = 1000  # the most characters of a format of dates

GROWING = {
    "center", "expandtabs", "format", "format_map", "indent", "join", "ljust", "replace", "rjust", "tojson",
    "translate", "urlize", "wordwrap", "xmlattr", "zfill",
}  # fmt: skip
"""Filters and methods whose result may be a multiple of their input."""
LISTED = {"groupby", "max", "min", "sort", "sum", "unique"}
"""Filters that compare or add up their input in one go: it is measured before, an iterator too."""
SHALLOW = {
    "attr", "batch", "count", "d", "default", "first", "items", "last", "length", "list", "map", "random", "reject",
    "rejectattr", "reverse", "select", "selectattr", "slice",
}  # fmt: skip
"""Filters that do not write out their input."""
LABORIOUS = {"pprint", "striptags", "title", "urlize", "wordcount", "wordwrap", "xmlattr"}
"""Filters that split a text at many times its size, or in a time that grows with its square."""
BY_CHARACTER = {"batch", "groupby", "join", "list", "slice", "sort", "unique"}
"""Filters that make a list of a text's characters."""
LINE_ENDS = "\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029"

_watchdog = Watchdog()


def render(tokenizer: Any, template: str, messages: list[dict[str, str]], *, add_generation_prompt: bool) -> str:
    """Return a chat as a template writes it, or raise what it raises; LimitError where it takes too long or much."""
    _count_in_transformers()
    size = sum(len(text) for message in messages for text in message.values())
    budget = Budget(limits.SECONDS + limits.SECONDS_PER_MIB * size / 2**20, limits.MAX_MADE)
    try:
        try:
            limits.rendering.budget = budget
            _watchdog.begin(budget)
            return tokenizer.apply_chat_template(
                messages, chat_template=template, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        finally:
            _watchdog.end(budget)
    except (LimitError, MemoryError, OutOfTime) as error:
        _watchdog.end(budget)
        name, line = getattr(tokenizer, "name_or_path", "") or "the tokenizer", _line_of(error)
        reasons = {MemoryError: "needs more memory than there is", OutOfTime: budget.timeout}
        reason = reasons.get(type(error), str(error))
        raise LimitError(f"the chat template of {name}{f', line {line},' if line else ''} {reason}") from None
    finally:
        limits.rendering.budget = limits.UNLIMITED  # for others who render in this thread


def _line_of(error: BaseException) -> int | None:
    """Return the line of the template in which an error was raised."""
    found, frame = None, error.__traceback__
    while frame is not None:
        if (template := frame.tb_frame.f_globals.get("__jinja_template__")) is not None:  # its code in Python
            line = frame.tb_lineno or frame.tb_frame.f_lineno or 1  # an instruction may be of no line
            found = template.get_corresponding_lineno(line)
        elif frame.tb_frame.f_code.co_filename == "<template>":
            found = frame.tb_lineno
        frame = frame.tb_next
    return found


@functools.cache
def _count_in_transformers() -> None:
    """Replace the compiler of transformers' chat templates by one that counts, set up as theirs."""
    from transformers.utils import chat_template_utils

    plain = chat_template_utils._compile_jinja_template("").environment
    counting = _CountingEnvironment(
        trim_blocks=plain.trim_blocks,
        lstrip_blocks=plain.lstrip_blocks,
        extensions=[type(extension) for extension in plain.extensions.values()],
    )
    counting.globals.update({name: value for name, value in plain.globals.items() if name != "lipsum"})
    counting.filters.update({name: _counted_filter(name, function) for name, function in plain.filters.items()})
    counting.tests.update(plain.tests)
    chat_template_utils._compile_jinja_template = functools.lru_cache(counting.from_string)


class _CountingEnvironment(ImmutableSandboxedEnvironment):
    """A sandbox whose templates count."""

    intercepted_binops = frozenset({"*", "**", "%"})

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        del self.globals["lipsum"]  # makes texts of any length
        self.filters |= {"_turn": _count_turn, "_made": _count_value, "_concat": _concat, "_sum": _sum}

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        return _AddCounting().visit(super()._parse(source, name, filename))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Compute left * right and the like, measured before and counted after."""
        _check_operation(operator, left, right)
        return spend(super().call_binop(context, operator, left, right))

    def call(__self, __context: Context, __function: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        """Call a function, method or macro, measured before and counted after."""
        name = getattr(__function, "__name__", "")
        if name in GROWING:
            args = tuple(map(_as_list, args))
        _check_call(name, _text_of(__function), args, kwargs)
        return spend(super().call(__context, __function, *args, **kwargs))

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """Keep the text whose `format` is called: the sandbox's own version of the method has none."""
        wrapped = super().wrap_str_format(value)
        if wrapped is not None:
            wrapped.__dict__["_formatted"] = value.__self__
        return wrapped


def _text_of(method: Any) -> str:
    """Return the text that a method belongs to; '' for other functions."""
    text = getattr(method, "_formatted", None) or getattr(method, "__self__", None)
    return text if isinstance(text, str) else ""


COUNTED_NODES = (nodes.TemplateData, nodes.Const, nodes.Filter, nodes.Call, nodes.Mul)
"""Nodes that are counted when they are computed, or that are no larger than the template."""


class _AddCounting(NodeTransformer):
    """Adds counting to a template."""

    def visit_For(self, node: Any) -> nodes.Node:  # noqa: N802
        """Count each turn of a body, with all of the template's own text in it."""
        size = sum(len(part.data) for part in node.find_all(nodes.TemplateData))
        self.generic_visit(node)
        turn = nodes.ExprStmt(nodes.Filter(nodes.Const(size), "_turn", [], [], None, None))
        node.body.insert(0, turn.set_lineno(node.lineno).set_environment(node.environment))
        return node

    visit_Macro = visit_CallBlock = visit_For  # noqa: N815

    def visit_Output(self, node: nodes.Output) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        node.nodes = [one if isinstance(one, COUNTED_NODES) else _counted(one) for one in node.nodes]
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return _counted(_tuple(node.nodes), "_concat")

    def visit_Add(self, node: nodes.Add) -> nodes.Node:  # noqa: N802
        terms, first = [node.right], node.left
        while isinstance(first, nodes.Add):  # a + b + c is (a + b) + c
            terms.append(first.right)
            first = first.left
        return _counted(_tuple([self.visit(term) for term in (first, *reversed(terms))]), "_sum")

    def visit_List(self, node: Any) -> nodes.Expr:  # noqa: N802
        self.generic_visit(node)
        is_target = isinstance(node, nodes.Tuple) and node.ctx == "store"
        return node if is_target or all(isinstance(item, nodes.Const) for item in node.items) else _counted(node)

    visit_Tuple = visit_List  # noqa: N815

    def visit_Dict(self, node: nodes.Dict) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return _counted(node)


def _tuple(items: list[nodes.Expr]) -> nodes.Tuple:
    return nodes.Tuple(items, "load", lineno=items[0].lineno)


def _counted(node: nodes.Expr, how: str = "_made") -> nodes.Expr:
    """Return a node whose value is counted, by one of the filters below."""
    return nodes.Filter(node, how, [], [], None, None, lineno=node.lineno, environment=node.environment)


# jinja2 computes other filters than those of the context when it compiles a template


@pass_context
def _count_turn(_: Context, size: int) -> None:
    limits.rendering.budget.spend(size)


@pass_context
def _count_value(_: Context, value: Any) -> Any:
    return spend(value)


@pass_context
def _concat(_: Context, values: tuple[Any, ...]) -> str:
    spend(values)
    return "".join(map(str, values))


@pass_context
def _sum(_: Context, terms: tuple[Any, ...]) -> Any:
    if all(type(term) is str for term in terms):
        limits.rendering.budget.spend(sum(map(len, terms)))
        return "".join(terms)
    total, *more = terms
    for term in more:
        check_size(length_of(total) + length_of(term), limits.MAX_SIZE)
        total = spend(total + term)
    return total


def _as_list(value: Any) -> Any:
    """Return an iterator's items, which were counted when they were made, as a list that can be measured."""
    return list(value) if isinstance(value, Iterator) else value


def _counted_filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a filter whose input is measured before, and whose result is counted after."""
    num_hidden = 1 if hasattr(function, "jinja_pass_arg") else 0
    is_listed = name in GROWING or name in LISTED

    @functools.wraps(function)
    def counted(*args: Any, **kwargs: Any) -> Any:
        given = tuple(map(_as_list, args[num_hidden:])) if is_listed else args[num_hidden:]
        if given:
            if name not in SHALLOW and type(given[0]) is not str:
                spend(given[0])
            _check_call(name, given[0], given[1:], kwargs)
        return spend(function(*args[:num_hidden], *given, **kwargs))

    return counted


def _check_operation(operator: str, left: Any, right: Any) -> None:
    """Raise LimitError where an operation would make something too large."""
    are_numbers = isinstance(left, int) and isinstance(right, int)
    if operator == "%" and isinstance(left, str):
        _check_call("format", left, right if isinstance(right, tuple) else (right,), {})
    elif operator == "*" and are_numbers:
        check_size(left.bit_length() + right.bit_length(), MAX_BITS)
    elif operator == "*":
        times, value = (left, right) if isinstance(left, int) else (right, left)
        check_size(length_of(value) * times if isinstance(times, int) else 0, limits.MAX_SIZE)
    elif operator == "**" and are_numbers:
        check_size(left.bit_length() * abs(right), MAX_BITS)


def _check_call(name: str, value: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Raise LimitError where a filter or method of a value would make something too large, or too many parts."""
    _check_split(name, value, args, kwargs)
    given = [*args, *kwargs.values()]
    for one in given:
        if isinstance(one, int) and abs(one) > MAX_NUMBER:
            raise LimitError(f"passes {name or 'a function'} a number of more than {MAX_NUMBER:,}")
        if isinstance(one, Namespace):
            spend(one)
    if name not in GROWING or not given:
        return
    numbers = [abs(one) for one in given if isinstance(one, int)]
    texts = [one for one in (given[1:] if name == "replace" else given) if not isinstance(one, int)]
    times = [*numbers, *map(size_of, texts)]
    if name in ("format", "format_map") and isinstance(value, str):  # the widths in it
        times += [min(int(number), MAX_PRODUCT) for number in re.findall(r"\d{1,15}", value)]
    check_size((size_of(value) + 1) * max(times, default=1), MAX_PRODUCT)


def _check_split(name: str, text: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Raise LimitError where a filter or method would split a text, if it is one, into too many parts."""
    if name == "strftime_now" and any(len(one) > MAX_TIME_FORMAT for one in args if isinstance(one, str)):
        raise LimitError(f"passes {name} a format of more than {MAX_TIME_FORMAT:,} characters")
    if not isinstance(text, str) or len(text) * ENTRY <= LARGE:
        return
    if name in LABORIOUS and len(text) > MAX_LABORIOUS:
        raise LimitError(f"passes {name} a text of more than {MAX_LABORIOUS:,} characters")
    num_parts = 0
    if name in BY_CHARACTER:
        num_parts = len(text)
    elif name in ("split", "rsplit"):
        separator = args[0] if args else kwargs.get("sep")
        num_parts = text.count(separator) if isinstance(separator, str) and separator else len(text) // 2
    elif name == "splitlines":
        num_parts = sum(map(text.count, LINE_ENDS))
    check_size(ENTRY * num_parts, limits.MAX_SIZE)
