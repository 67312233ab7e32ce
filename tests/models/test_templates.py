"""Chat templates come with a model: whatever one does is over in seconds, and is text or one line."""

import resource
import sys
import threading
import time

import pytest

from liger_models import _templates, draw, generate
from liger_models.cli import main
from liger_models.data import to_rows
from liger_models.text import chat_ids, marked
from tests.models.tiny import tiny, tiny_tokenizer

MESSAGES = [{"role": "user", "content": "the quick"}, {"role": "assistant", "content": "brown fox"}]
LOOP = "{% for i in range(90000) %}"
HANGS = {
    "text": ("{{ 'a' * 10**10 }}", "takes a power"),
    "product": ("{{ 'a' * 10000000000 }}", "multiplies by more than 1,048,576"),
    "power": ("{% if false %}{{ 9 ** messages|length }}{% endif %}", "takes a power"),
    "loops": (3 * LOOP + 3 * "{% endfor %}", "longer than"),
    "long": (3 * "{% for i in range(10000000) %}" + 3 * "{% endfor %}", "Range too big"),
    "macro": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
    "doubling": (
        "{% set n = namespace(x='ab') %}" + LOOP + "{% set n.x = n.x + n.x %}{% endfor %}",
        "within 536,870,912 bytes",
    ),
    "filter": ("{{ 'a'|center(5000000000) }}", "within 536,870,912 bytes"),
    "format": ("{{ '{:>5000000000}'.format(1) }}", "within 536,870,912 bytes"),
    "factors": ("{{ 'a' * 1000000 * 1000000 }}", "within 536,870,912 bytes"),
    "words": (LOOP + "{{ 'a' * 100 }}{% endfor %}", "writes at most 1,0.* characters of them, got 9,000,000"),
    "syntax": ("{% for", "unexpected .end of template"),
    "raises": ("{{ raise_exception('line one\\nline two') }}", "refuses them: line one$"),
    "zero": ("{{ 1 // 0 }}", "zero"),
    "missing": ("{{ messages[9].content }}", "no element 9"),
    "sandbox": ("{{ ''.__class__.__mro__ }}", "unsafe"),
    "deep": ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "recursion"),
    "size": ("a" * 300_000, "at most 262,144 characters"),
}


@pytest.fixture
def soon(monkeypatch):
    monkeypatch.setattr(_templates, "_SECONDS", 0.5)


@pytest.mark.parametrize(("template", "message"), HANGS.values(), ids=HANGS)
def test_a_template_is_text_or_one_line(monkeypatch, template, message):
    # On a busy machine memory may be long in running out.
    monkeypatch.setattr(_templates, "_SECONDS", 0.5 if message == "longer than" else 10.0)
    tokenizer, start = tiny_tokenizer(chat_template=template), time.perf_counter()
    limits, trace = resource.getrlimit(resource.RLIMIT_AS), sys.gettrace()
    for use in (chat_ids, lambda *given: marked(*given, None)):
        with pytest.raises(ValueError, match=rf"^messages: .*{message}") as error:
            use(tokenizer, MESSAGES)
        assert "\n" not in str(error.value)
    assert time.perf_counter() - start < 15
    assert (resource.getrlimit(resource.RLIMIT_AS), sys.gettrace()) == (limits, trace)


def test_every_use_of_a_template_is_bounded(soon, tmp_path, capsys):
    model, tokenizer = tiny(), tiny_tokenizer(chat_template=HANGS["loops"][0])
    uses = (
        lambda: generate(model, tokenizer, "the", chat=True),
        lambda: draw(model, tokenizer, 9, length=32, batch=2, chat=1.0),
        lambda: to_rows(tokenizer, [{"messages": MESSAGES}], 64),
    )
    for use in uses:
        with pytest.raises(ValueError, match=r"messages: .*it takes longer than 0.5 s"):
            use()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    capsys.readouterr()
    assert main(["generate", str(tmp_path), "the", "--chat"]) == 2
    told = capsys.readouterr().err.split("\n")
    assert (
        len([line for line in told if "liger: messages: the chat template refuses them: it takes longer" in line]) == 1
    )


def test_other_threads_have_the_memory_that_they_ask_for():
    free, over = resource.getrlimit(resource.RLIMIT_AS), threading.Event()
    with _templates._limited(1 << 29):
        assert resource.getrlimit(resource.RLIMIT_AS) != free
    thread = threading.Thread(target=over.wait)
    thread.start()
    with _templates._limited(1 << 29):
        assert resource.getrlimit(resource.RLIMIT_AS) == free
    over.set()
    thread.join()


def test_what_templates_do_goes_on():
    """Small products, loops that end, what belongs to long conversations, and markers of what the assistant says."""
    template = "{% for m in messages %}{{ '-' * loop.index }}{{ m.content }}{% generation %}!{% endgeneration %}"
    tokenizer = tiny_tokenizer(chat_template=template + "{% if loop.last %}{% break %}{% endif %}{% endfor %}")
    messages = [{"role": "user", "content": "quick"}, {"role": "assistant", "content": "fox"}]
    assert tokenizer.decode(chat_ids(tokenizer, messages)).replace(" ", "") == "-quick!--fox!"
    assert sum(marked(tokenizer, messages, None)) == 2
    long = [{"role": "user", "content": "x" * 2_000_000}] * 2
    assert len(_templates.rendered(tokenizer, long)) > 4_000_000
