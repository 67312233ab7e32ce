"""Chat templates, which come with a model and are programs, rendered within bounds of time and memory."""

from __future__ import annotations

import functools
import json
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, cast

from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tqdm import TMonitor
from transformers import PreTrainedTokenizerBase

from liger_ops.errors import fail

try:
    import resource
except ImportError:
    # There are no such limits on Windows.
    resource = None

# Characters of a template; the longest known has 30,000.
_LONGEST = 1 << 18
# Seconds that a thread may spend on one.
_SECONDS = 5.0
# Bytes that may be added to a process meanwhile.
_MEMORY = 1 << 29
# Characters that a template may add, beside eight times those of what it is given.
_ADDED = 1 << 20
# Of what a template multiplies by.
_FACTOR = 1 << 20
# As jinja2 calls the code that it makes of one.
_FILE = "<template>"
# A limit is one of the whole process.
_alone = threading.Lock()


def rendered(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], **options: Any) -> str:
    """A conversation through the tokenizer's template, as text.

    Options go to apply_chat_template. ValueError for a template that fails, or takes more time, memory or text than
    one may.
    """
    given = json.dumps([messages, options.get("tools")], default=str)
    with bounded(tokenizer, options.get("tools"), _MEMORY):
        text = cast(str, tokenizer.apply_chat_template(messages, tokenize=False, **options))
    if len(text) > (most := _ADDED + 8 * len(given)):
        fail("messages", f"a chat template that writes at most {most:,} characters of them", f"{len(text):,}")
    return text


@contextmanager
def bounded(tokenizer: PreTrainedTokenizerBase, tools: list[Any] | None, memory: int | None = None) -> Iterator[None]:
    """Within, a template that takes longer than one may, fails for any reason, or wants more memory, is a ValueError.

    Time is looked at between the template's lines: one operation of Python may take longer.
    """
    try:
        _check(tokenizer.get_chat_template(tools=tools))
        with _alone, _limited(memory), _timed():
            yield
    except MemoryError as error:
        raise ValueError(f"messages: expected a chat template within {_MEMORY:,} bytes of memory, got more") from error
    # A template may raise whatever Python does.
    except Exception as error:
        lines = (str(error) or repr(error)).splitlines()
        raise ValueError(f"messages: the chat template refuses them: {lines[0]}") from error


class _Generation(Extension):
    """The tag of transformers for what the assistant says, as far as it can be read over."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser):
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@functools.lru_cache
def _check(template: object) -> None:
    """ValueError for a template whose constants alone may hold a process up: jinja2 computes them beforehand."""
    if not isinstance(template, str) or len(template) > _LONGEST:
        raise ValueError(f"expected a text of at most {_LONGEST:,} characters")
    tree = ImmutableSandboxedEnvironment(extensions=[_Generation, loopcontrols]).parse(template)
    for node in tree.find_all((nodes.Pow, nodes.Mul)):
        factors = [x.value for x in (node.left, node.right) if isinstance(x, nodes.Const)]
        if isinstance(node, nodes.Pow) or any(isinstance(x, int) and x > _FACTOR for x in factors):
            raise ValueError(f"line {node.lineno} takes a power, or multiplies by more than {_FACTOR:,}")


@contextmanager
def _timed() -> Iterator[None]:
    """TimeoutError in a line of a template that this thread comes to after too long."""
    end, before = time.thread_time() + _SECONDS, sys.gettrace()

    def look(frame: FrameType, event: str, _: object) -> Any:
        if frame.f_code.co_filename != _FILE:
            return None
        if time.thread_time() > end:
            raise TimeoutError(f"it takes longer than {_SECONDS:g} s")
        return look

    sys.settrace(look)
    try:
        yield
    finally:
        sys.settrace(before)


@contextmanager
def _limited(memory: int | None) -> Iterator[None]:
    """MemoryError for what asks for more bytes than these, on systems that can say so.

    Not beside other threads of Python, which would be refused what they ask for meanwhile.
    """
    size, here = Path("/proc/self/statm"), threading.current_thread()
    busy = any(x is not here and not isinstance(x, TMonitor) for x in threading.enumerate())
    if memory is None or busy or resource is None or not size.exists():
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    most = int(size.read_text().split()[0]) * resource.getpagesize() + memory
    held = [x for x in (soft, hard) if x != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_AS, (min([most, *held]), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
