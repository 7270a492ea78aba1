"""Texts that every machine which can train a head holds: documentation, source code, and what the
target has written itself.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
import re
import warnings
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from head_data import Chat, texts

from vllm_ouroboros.cli.loops import loops

MODULES = """
    argparse ast asyncio.queues asyncio.tasks base64 bisect calendar cmd code codecs collections
    configparser contextlib copy csv dataclasses datetime decimal difflib email.message enum
    filecmp fileinput fractions ftplib functools getopt gettext glob gzip heapq hmac html.parser
    http.client http.cookies http.server imaplib inspect ipaddress json.decoder json.encoder
    linecache locale logging logging.handlers mailbox mimetypes netrc numbers optparse os
    pathlib pickle pkgutil platform plistlib poplib pprint profile queue quopri random reprlib
    sched secrets selectors shelve shlex shutil smtplib socket socketserver sqlite3 statistics
    string subprocess tarfile tempfile textwrap threading timeit tokenize trace traceback types
    typing unittest.case unittest.mock urllib.parse urllib.request urllib.robotparser uuid
    wave weakref webbrowser xml.dom.minidom xml.etree.ElementTree zipfile
    numpy.lib._arraysetops_impl numpy.lib._function_base_impl numpy.lib._index_tricks_impl
    numpy.lib._npyio_impl numpy.linalg._linalg numpy.ma.core numpy.polynomial.polynomial
    numpy.testing._private.utils torch.distributions.distribution torch.distributions.kl
    torch.functional torch.fx.graph torch.fx.node torch.nn.functional torch.nn.init
    torch.nn.modules.container torch.nn.modules.conv torch.nn.modules.module
    torch.optim.lr_scheduler torch.optim.optimizer torch.testing._comparison
    torch.utils.data.dataloader
    transformers.configuration_utils transformers.generation.utils transformers.image_transforms
    transformers.modeling_utils transformers.tokenization_utils_base
"""


def documentation() -> Iterator[str]:
    """Paragraphs of docstrings, the language reference and the descriptions of packages."""
    from pydoc_data.topics import topics

    texts = [*topics.values()]
    texts += [inspect.getdoc(member) or "" for member in _members()]
    for package in importlib.metadata.distributions():
        texts.append(str(package.metadata.get_payload() or package.metadata["Description"] or ""))
    for text in texts:
        yield from paragraphs(text)


def paragraphs(text: str) -> Iterator[str]:
    """Those of 30 to 150 words that are prose."""
    for paragraph in re.split(r"\n\s*\n", text):
        words = paragraph.split()
        letters = sum(c.isalpha() or c.isspace() for c in paragraph)
        if 30 <= len(words) <= 150 and letters > 0.9 * len(paragraph):
            yield " ".join(words)


def sources() -> Iterator[str]:
    """Functions of 5 to 25 lines."""
    for member in _members():
        if inspect.isfunction(member):
            with suppress(OSError, TypeError):
                code = inspect.cleandoc("\n" + inspect.getsource(member)) + "\n"
                if 5 <= code.count("\n") <= 25:
                    yield code


def purposes() -> Iterator[str]:
    """What functions are for, in a line."""
    for member in _members():
        first = (inspect.getdoc(member) or "").partition("\n")[0].rstrip(".")
        if inspect.isfunction(member) and 5 <= len(first.split()) <= 20:
            yield first


def _members() -> Iterator[object]:
    for name in MODULES.split():
        with suppress(ImportError), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            module = importlib.import_module(name)
            for _, member in inspect.getmembers(module):
                if getattr(member, "__module__", None) == name:
                    yield member
                    if inspect.isclass(member):
                        yield from vars(member).values()


def answered(conversations: Path, tokenizer: Any) -> Iterator[tuple[str, str]]:
    """First user turns and the target's answers to them, those that loop left out.

    Args:
        conversations: file of `train_head.py data`.
        tokenizer: the target's.
    """
    chat, special = Chat(tokenizer), set(tokenizer.all_special_ids)
    for prompt, answer in texts(conversations):
        turn = prompt[len(chat.opening) : -len(chat.reply)]
        if special.isdisjoint(turn) and not loops(answer):
            said = tokenizer.decode(answer, skip_special_tokens=True).strip()
            if said:
                yield tokenizer.decode(turn).strip(), said
