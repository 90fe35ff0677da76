"""Chat templates as programs of somebody else's: rendered within limits of time and memory.

transformers renders them in a sandbox that keeps them from files and Python's insides, not from loops without end or
texts without limit. So each template is compiled to count what it does: every turn of a loop and call of a macro, every
text that is written, and every value that an operator, a filter or a function makes. What grows by multiplication is
measured before it is made. Whatever is not counted is interrupted from another thread once the time is over
(docs/decisions/0035).
"""

from __future__ import annotations

import ctypes
import functools
import math
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, MappingView
from queue import SimpleQueue
from typing import Any

from jinja2 import nodes, pass_context
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from src.errors import LimitError

SECONDS, SECONDS_PER_MIB = 1.0, 4.0
"""Processor time for a chat: so much, and so much more for each MiB of its texts. Most take less than a millisecond."""
MAX_SIZE = 2**25
"""Characters of one text; an entry of a list counts 16, of a dict 128, and what is in it."""
MAX_PRODUCT = 2**28
"""What is made by multiplication, by the most that it could be: length times repetitions."""
MAX_MADE = 2**29
"""Characters of everything that is made for one chat."""
MAX_NUMBER = 10**6
"""Of a number given to a filter or function, such as a width."""
MAX_BITS = 10**6
"""Of a whole number."""
MAX_LABORIOUS = 2**20
"""Characters of a text that is given to one of LABORIOUS."""
MAX_TIME_FORMAT = 1000
"""Characters of a format of dates."""
ENTRY, NAMED_ENTRY = 16, 128

GROWING = {
    "center", "expandtabs", "format", "format_map", "indent", "join", "ljust", "replace", "rjust", "tojson",
    "translate", "urlize", "wordwrap", "xmlattr", "zfill",
}  # fmt: skip
"""Filters and methods whose result may be a multiple of what they are given."""
SHALLOW = {
    "attr", "batch", "count", "d", "default", "first", "groupby", "items", "last", "length", "list", "map", "max",
    "min", "random", "reject", "rejectattr", "reverse", "select", "selectattr", "slice", "sort", "sum", "unique",
}  # fmt: skip
"""Filters that do not write out what they are given."""
LISTED = {"groupby", "max", "min", "sort", "sum", "unique"}
"""Filters that compare or add up what they are given, in one go: it is measured before, an iterator too."""
LABORIOUS = {"pprint", "striptags", "title", "urlize", "wordcount", "wordwrap", "xmlattr"}
"""Filters that take a text apart, at many times its size or in a time that grows with its square."""
BY_CHARACTER = {"batch", "groupby", "join", "list", "slice", "sort", "unique"}
"""Filters that make a list of a text's characters."""
LINE_ENDS = "\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029"


class _Budget:
    """What one chat may still take."""

    __slots__ = ("begun", "count", "is_fired", "is_over", "left", "lock", "seconds", "thread", "until")

    def __init__(self, seconds: float) -> None:
        self.thread, self.begun = threading.get_ident(), time.monotonic()
        self.lock, self.is_over, self.is_fired = threading.Lock(), False, False
        self.seconds, self.until = seconds, time.thread_time() + seconds
        self.left: float = MAX_MADE
        self.count = 0

    def spend(self, size: int) -> None:
        """Count something that was made.

        Raises:
            LimitError: where it is too much, or too late.
        """
        self.left -= size
        self.count += 1
        if size > MAX_SIZE:
            raise LimitError(f"makes a text or list of more than {MAX_SIZE:,} characters")
        if self.left < 0:
            raise LimitError(f"makes more than {MAX_MADE:,} characters")
        if (size > LARGE or not self.count & LOOKS_EVERY) and time.thread_time() > self.until:
            raise LimitError(self.late)

    @property
    def is_late_elsewhere(self) -> bool:
        """Whether the time is over, asked in another thread while this one renders."""
        if not hasattr(time, "pthread_getcpuclockid"):  # macOS
            return time.monotonic() - self.begun > WALL_TIMES * self.seconds
        return time.clock_gettime(time.pthread_getcpuclockid(self.thread)) > self.until

    @property
    def late(self) -> str:
        return f"does not come to an end within {self.seconds:.3g} s"


LARGE, LOOKS_EVERY = 2**16, 63
"""The clock is looked at after something so large, and now and then; LOOKS_EVERY is a power of two less one."""


class _OutOfTime(BaseException):
    """Raised in a thread whose rendering takes too long; no Exception, so that no template's code catches it."""


class _Watch:
    """A thread that interrupts renderings whose time is over: of what is not counted, only Python code can be."""

    def __init__(self) -> None:
        self._begun: SimpleQueue[_Budget] = SimpleQueue()
        self._starting = threading.Lock()
        self._thread: threading.Thread | None = None

    def begin(self, budget: _Budget) -> None:
        if self._thread is None or not self._thread.is_alive():  # not yet started, or before a fork
            with self._starting:
                if self._thread is None or not self._thread.is_alive():
                    self._thread = threading.Thread(target=self._watch, name="templates", daemon=True)
                    self._thread.start()
        self._begun.put(budget)

    def end(self, budget: _Budget) -> None:
        """Interrupt this rendering no more. May be called again: an interruption may come in the midst of this."""
        with budget.lock:
            budget.is_over = True
            if budget.is_fired:
                _raise_in(budget.thread, None)

    def _watch(self) -> None:
        running: list[_Budget] = []
        while True:
            if not running:
                running.append(self._begun.get())
            time.sleep(WATCH_SECONDS)
            while not self._begun.empty():
                running.append(self._begun.get())
            for budget in running:
                with budget.lock:
                    if not budget.is_over and budget.is_late_elsewhere:
                        budget.is_fired = True
                        _raise_in(budget.thread, _OutOfTime)
            running = [budget for budget in running if not budget.is_over]


WATCH_SECONDS = 0.05
WALL_TIMES = 10
"""Time on the clock for each second of processor time, where another thread's processor time can't be asked for."""
_watch = _Watch()


def _raise_in(thread: int, error: type[BaseException] | None) -> None:
    """Have a thread raise an error as soon as it runs Python code; None: no more."""
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), error and ctypes.py_object(error))


UNBOUNDED = _Budget(math.inf)
UNBOUNDED.left = math.inf


class _Rendering(threading.local):
    """The budget of the chat that a thread renders."""

    budget = UNBOUNDED


_rendering = _Rendering()


def render(tokenizer: Any, template: str, messages: list[dict[str, str]], *, add_generation_prompt: bool) -> str:
    """Return a chat as a template writes it.

    Raises:
        LimitError: where that takes too much time or memory.
        Exception: whatever the template raises.
    """
    _count_in_transformers()
    size = sum(len(text) for message in messages for text in message.values())
    budget = _Budget(SECONDS + SECONDS_PER_MIB * size / 2**20)
    try:
        try:
            _rendering.budget = budget
            _watch.begin(budget)
            return tokenizer.apply_chat_template(
                messages, chat_template=template, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        finally:
            _watch.end(budget)
    except (LimitError, MemoryError, _OutOfTime) as error:
        _watch.end(budget)
        name, line = getattr(tokenizer, "name_or_path", "") or "the tokenizer", _line(error)
        reasons = {MemoryError: "needs more memory than there is", _OutOfTime: budget.late}
        reason = reasons.get(type(error), str(error))
        raise LimitError(f"the chat template of {name}{f', line {line},' if line else ''} {reason}") from None
    finally:
        _rendering.budget = UNBOUNDED  # whoever else renders in this thread has no part in it


def _line(error: BaseException) -> int | None:
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
    """Have transformers compile chat templates so that they count, with all else as it sets its sandbox up."""
    from transformers.utils import chat_template_utils

    plain = chat_template_utils._compile_jinja_template("").environment
    counting = _Counting(
        trim_blocks=plain.trim_blocks,
        lstrip_blocks=plain.lstrip_blocks,
        extensions=[type(extension) for extension in plain.extensions.values()],
    )
    counting.globals.update({name: value for name, value in plain.globals.items() if name != "lipsum"})
    counting.filters.update({name: _counted(name, function) for name, function in plain.filters.items()})
    counting.tests.update(plain.tests)
    chat_template_utils._compile_jinja_template = functools.lru_cache(counting.from_string)


class _Counting(ImmutableSandboxedEnvironment):
    """A sandbox whose templates count."""

    intercepted_binops = frozenset({"*", "**", "%"})

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        del self.globals["lipsum"]  # makes texts of any length
        self.filters |= {"_turn": _turn, "_made": _made, "_concat": _concat, "_sum": _sum}

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        return _Counter().visit(super()._parse(source, name, filename))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Compute left * right and the like, measured before and counted after."""
        _check_operation(operator, left, right)
        return _spent(super().call_binop(context, operator, left, right))

    def call(__self, __context: Context, __function: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        """Call a function, method or macro, measured before and counted after."""
        name = getattr(__function, "__name__", "")
        _check_pieces(name, _text_of(__function), args, kwargs)
        if args or kwargs:
            if name in GROWING:
                args = tuple(map(_listed, args))
            _check_call(name, _text_of(__function), args, kwargs)
        return _spent(super().call(__context, __function, *args, **kwargs))

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """Remember the text whose `format` is taken: the sandbox's own version of it has none."""
        wrapped = super().wrap_str_format(value)
        if wrapped is not None:
            wrapped.__dict__["_formatted"] = value.__self__
        return wrapped


def _text_of(method: Any) -> str:
    """Return the text whose method it is; '' where it is none's."""
    text = getattr(method, "_formatted", None)
    if text is None:
        text = getattr(method, "__self__", None)
    return text if isinstance(text, str) else ""


class _Counter(NodeTransformer):
    """Puts counting into a template."""

    def visit_For(self, node: nodes.For) -> nodes.Node:  # noqa: N802
        return self._with_turns(node)

    def visit_Macro(self, node: nodes.Macro) -> nodes.Node:  # noqa: N802
        return self._with_turns(node)

    def visit_CallBlock(self, node: nodes.CallBlock) -> nodes.Node:  # noqa: N802
        return self._with_turns(node)

    def _with_turns(self, node: Any) -> nodes.Node:
        """Count each turn of a body, with all of the template's own text in it."""
        size = sum(len(part.data) for part in node.find_all(nodes.TemplateData))
        self.generic_visit(node)
        turn = nodes.ExprStmt(nodes.Filter(nodes.Const(size), "_turn", [], [], None, None))
        node.body.insert(0, turn.set_lineno(node.lineno).set_environment(node.environment))
        return node

    def visit_Output(self, node: nodes.Output) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        node.nodes = [one if isinstance(one, IS_COUNTED) else _counted_node(one) for one in node.nodes]
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return _counted_node(_tuple(node.nodes), "_concat")

    def visit_Add(self, node: nodes.Add) -> nodes.Node:  # noqa: N802
        terms, first = [node.right], node.left
        while isinstance(first, nodes.Add):  # a + b + c is (a + b) + c
            terms.append(first.right)
            first = first.left
        return _counted_node(_tuple([self.visit(term) for term in (first, *reversed(terms))]), "_sum")

    def visit_List(self, node: nodes.List) -> nodes.Expr:  # noqa: N802
        self.generic_visit(node)
        return node if all(isinstance(item, nodes.Const) for item in node.items) else _counted_node(node)

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        is_target = node.ctx == "store"
        return node if is_target or all(isinstance(item, nodes.Const) for item in node.items) else _counted_node(node)

    def visit_Dict(self, node: nodes.Dict) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return _counted_node(node)


IS_COUNTED = (nodes.TemplateData, nodes.Const, nodes.Filter, nodes.Call, nodes.Mul)
"""Nodes that are counted when they are computed, or that are no larger than the template."""


def _tuple(items: list[nodes.Expr]) -> nodes.Tuple:
    values = nodes.Tuple(items, "load")
    values.set_lineno(items[0].lineno)
    return values


def _counted_node(node: nodes.Expr, how: str = "_made") -> nodes.Expr:
    """Return a node whose value is counted, by one of the filters below."""
    counted = nodes.Filter(node, how, [], [], None, None)
    counted.environment = node.environment
    counted.set_lineno(node.lineno)
    return counted


# filters of the context are not computed when a template is compiled


@pass_context
def _turn(_: Context, size: int) -> None:
    _rendering.budget.spend(size)


@pass_context
def _made(_: Context, value: Any) -> Any:
    _rendering.budget.spend(len(value) if type(value) is str else _size(value))
    return value


@pass_context
def _concat(_: Context, values: tuple[Any, ...]) -> str:
    _rendering.budget.spend(_size(values))
    return "".join(map(str, values))


@pass_context
def _sum(_: Context, terms: tuple[Any, ...]) -> Any:
    if all(type(term) is str for term in terms):
        _rendering.budget.spend(sum(map(len, terms)))
        return "".join(terms)
    total, *more = terms
    for term in more:
        _check(_length(total) + _length(term), MAX_SIZE)
        total = _spent(total + term)
    return total


def _spent(value: Any) -> Any:
    _rendering.budget.spend(len(value) if type(value) is str else _size(value))
    return value


def _listed(value: Any) -> Any:
    """Return what an iterator gives, each counted when it was made, as a list, so that it can be measured."""
    return list(value) if isinstance(value, Iterator) else value


def _size(value: Any) -> int:
    """Return how large a value is if it is written out, or a little more than MAX_SIZE."""
    if isinstance(value, str):
        return len(value)
    total, waiting = 0, [value]
    while waiting and total <= MAX_SIZE:
        one = waiting.pop()
        if isinstance(one, str | bytes):
            total += len(one)
        elif isinstance(one, list | tuple):
            total += ENTRY * len(one)
            waiting += one
        elif isinstance(one, Namespace):
            waiting.append(object.__getattribute__(one, "_Namespace__attrs"))
        elif isinstance(one, Mapping):
            total += NAMED_ENTRY * len(one)
            waiting += [*one.keys(), *one.values()]
        elif isinstance(one, range | MappingView):
            total += ENTRY * len(one)
        elif isinstance(one, int):
            total += one.bit_length() // 3
    return total


def _check_operation(operator: str, left: Any, right: Any) -> None:
    """Refuse an operation before it makes something too large."""
    numbers = isinstance(left, int) and isinstance(right, int)
    if operator == "%" and isinstance(left, str):
        _check_call("format", left, right if isinstance(right, tuple) else (right,), {})
    elif operator == "*" and not numbers:
        times, many = (left, right) if isinstance(left, int) else (right, left)
        _check(_length(many) * times if isinstance(times, int) else 0, MAX_SIZE)
    elif operator == "*" and numbers:
        _check(left.bit_length() + right.bit_length(), MAX_BITS)
    elif operator == "**" and numbers:
        _check(left.bit_length() * abs(right), MAX_BITS)


def _length(value: Any) -> int:
    if isinstance(value, str):
        return len(value)
    return ENTRY * len(value) if isinstance(value, list | tuple) else 0


def _counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a filter that is measured before and counted after."""
    skipped = 1 if hasattr(function, "jinja_pass_arg") else 0
    is_listed = name in GROWING or name in LISTED
    is_shallow = name in SHALLOW and name not in LISTED

    @functools.wraps(function)
    def counted(*args: Any, **kwargs: Any) -> Any:
        given = args[skipped:]
        if is_listed:
            given = tuple(map(_listed, given))
        if given:
            if not is_shallow and type(given[0]) is not str:
                _spent(given[0])
            _check_pieces(name, given[0], given[1:], kwargs)
        if kwargs or len(given) > 1:
            _check_call(name, given[0], given[1:], kwargs)
        return _spent(function(*args[:skipped], *given, **kwargs))

    return counted


def _check_call(name: str, value: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Refuse a filter or method before it makes something too large.

    Args:
        value: what the filter is applied to, or whose method it is.
    """
    given = [*args, *kwargs.values()]
    for one in given:
        if isinstance(one, int) and abs(one) > MAX_NUMBER:
            raise LimitError(f"gives {name or 'a function'} a number of more than {MAX_NUMBER:,}")
        if isinstance(one, Namespace):
            _spent(one)
    if name not in GROWING or not given:
        return
    numbers = [abs(one) for one in given if isinstance(one, int)]
    times = [*numbers, *(_size(one) for one in (given[1:] if name == "replace" else given) if not isinstance(one, int))]
    size = _size(value)
    if name in ("format", "format_map") and isinstance(value, str):  # the widths in it
        times += [min(int(number), MAX_PRODUCT) for number in re.findall(r"\d{1,15}", value)]
    _check((size + 1) * max(times, default=1), MAX_PRODUCT)


def _check_pieces(name: str, text: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Refuse a filter or method before it takes a text into too many pieces.

    Args:
        text: what it is applied to, or whose method it is.
    """
    if name == "strftime_now" and any(len(one) > MAX_TIME_FORMAT for one in args if isinstance(one, str)):
        raise LimitError(f"gives {name} a format of more than {MAX_TIME_FORMAT:,} characters")
    if not isinstance(text, str) or len(text) * ENTRY <= LARGE:
        return
    if name in LABORIOUS and len(text) > MAX_LABORIOUS:
        raise LimitError(f"gives {name} a text of more than {MAX_LABORIOUS:,} characters")
    pieces = 0
    if name in BY_CHARACTER:
        pieces = len(text)
    elif name in ("split", "rsplit"):
        by = args[0] if args else kwargs.get("sep")
        pieces = text.count(by) if isinstance(by, str) and by else len(text) // 2
    elif name == "splitlines":
        pieces = sum(map(text.count, LINE_ENDS))
    _check(ENTRY * pieces, MAX_SIZE)


def _check(size: int, most: int) -> None:
    if size > most:
        raise LimitError(f"makes a text, list or number of more than {most:,} characters or bits")
