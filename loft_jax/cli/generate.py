"""loft-jax generate."""

import contextlib
import logging
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from loft_jax.cli.source import Source
from loft_jax.data.templates import Message
from loft_jax.errors import InputError, shown
from loft_jax.files import read_text
from loft_jax.generation import Sampling, check_prompts, generate_text, stream_text
from loft_jax.models import Quantization
from loft_jax.models.family import LanguageModel

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_log = logging.getLogger(__name__)

_PROMPT = "> "
_HELP = "/clear forgets the conversation, Ctrl-C stops an answer, Ctrl-D ends the session"


@dataclass(frozen=True)
class Generate:
    """Answer prompts, or continue them: from flags, a file, standard input, or a session.

    Without `--prompt` and `--prompts`, the prompt is what standard input holds; if that is a
    terminal, a session begins. The text of one prompt appears token by token.
    """

    source: Annotated[Source, tyro.conf.arg(name="")]
    prompt: tuple[str, ...] = ()
    """Prompts; `\\n` stands for a line break."""
    prompts: str = ""
    """File with a prompt on each line, in which `\\n` stands for a line break; - for standard
    input."""
    chat: bool = True
    """Take a prompt as the user's message in a conversation, by the chat template of the adapter's
    tokenizer, or of the model's if the adapter has none; without a template, and with --no-chat, it
    is a text to continue."""
    system: str = ""
    """System prompt of the conversations; `\\n` stands for a line break."""
    max_new_tokens: int = 256
    """Largest number of new tokens for each prompt."""
    sampling: Annotated[Sampling, tyro.conf.arg(name="")] = field(default_factory=Sampling)
    quantization: Quantization = "none"
    """Storage of the base model's kernels; use the same as in the training of the adapter."""

    def __call__(self) -> int:
        """Runs the command."""
        prompts = self._prompts()
        model, tokenizer = self.source.load(quantization=self.quantization)
        chat = self.chat and bool(tokenizer.chat_template)
        if self.system and not chat:
            raise InputError(
                f"system is {shown(self.system)}, but "
                + ("the tokenizer has no chat template" if self.chat else "--no-chat is given")
                + "; expected a conversation to put it in"
            )
        if self.chat and not chat:
            whose = self.source.adapter or self.source.base
            _log.info("%s: has no chat template, so prompts are texts to continue", whose)
        session = _Session(self, model, tokenizer, chat=chat)
        if prompts is None:
            session.run()
        elif len(prompts) == 1:
            session.answer(prompts[0])
        else:
            session.answer_all(prompts)
        return 0

    def _prompts(self) -> list[str] | None:
        """Gives the prompts; None for a session."""
        if self.prompt and self.prompts:
            raise InputError(
                f"prompt is {shown(list(self.prompt))} and prompts is {shown(self.prompts)}; "
                "expected one of them"
            )
        if self.prompt:
            return [_with_breaks(prompt) for prompt in self.prompt]
        if not self.prompts and sys.stdin.isatty():
            return None
        if self.prompts and self.prompts != "-":
            where, text = self.prompts, read_text(Path(self.prompts), "a text with prompts")
        else:
            where, text = "standard input", sys.stdin.read()
        lines = (
            text.replace("\r\n", "\n").split("\n") if self.prompts else [text.removesuffix("\n")]
        )
        prompts = [_with_breaks(line) if self.prompts else line for line in lines if line.strip()]
        if not prompts:
            raise InputError(f"{where}: holds no prompt; expected some text")
        return prompts


def _with_breaks(text: str) -> str:
    return text.replace("\\n", "\n")


class _Session:
    """A conversation with a model, or texts that it continues."""

    def __init__(
        self,
        command: Generate,
        model: LanguageModel,
        tokenizer: "PreTrainedTokenizerBase",
        *,
        chat: bool,
    ) -> None:
        self._model, self._tokenizer, self._chat = model, tokenizer, chat
        self._options: dict[str, Any] = {
            "max_new_tokens": command.max_new_tokens,
            "sampling": command.sampling,
        }
        system = _with_breaks(command.system)
        self._opening: list[Message] = [{"role": "system", "content": system}] if system else []
        self._said: list[Message] = []

    def run(self) -> None:
        """Answers what is typed, until the end of the input."""
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 (lines can be edited and recalled)
        print(_HELP if self._chat else _HELP.partition(", ")[2], file=sys.stderr)
        while (text := _typed()) is not None:
            if self._chat and text.strip() == "/clear":
                self._said = []
            elif text.strip():
                try:
                    self.answer(text)
                except InputError as error:  # of this text, such as one that is too long
                    print(f"loft-jax generate: {error}", file=sys.stderr)
                except KeyboardInterrupt:
                    print()

    def answer(self, text: str) -> None:
        """Prints the answer to a text, token by token, and keeps both in the conversation."""
        prompt = self._asked(text)
        if not self._chat:
            count = self._options["max_new_tokens"]
            check_prompts(self._model.config, self._tokenizer, [prompt], max_new_tokens=count)
            print(text, end="", flush=True)
        pieces = []
        with _interruptible() as check:
            for piece in stream_text(self._model, self._tokenizer, prompt, **self._options):
                pieces.append(piece)
                print(piece, end="", flush=True)
                check()
        print()
        answer = "".join(pieces)
        _say_if_empty(answer, "the answer")
        if self._chat:
            self._said = [*prompt[len(self._opening) :], {"role": "assistant", "content": answer}]

    def answer_all(self, texts: list[str]) -> None:
        """Prints the answers to several texts, each of which is a conversation of its own."""
        asked = [self._asked(text) for text in texts]
        answers = generate_text(self._model, self._tokenizer, asked, **self._options)
        for number, (text, answer) in enumerate(zip(texts, answers, strict=True), 1):
            print(f"{_PROMPT}{text}\n{answer}\n" if self._chat else text + answer)
            _say_if_empty(answer, f"answer {number}")

    def _asked(self, text: str) -> Any:
        if not self._chat:
            return text
        return [*self._opening, *self._said, {"role": "user", "content": text}]


@contextlib.contextmanager
def _interruptible() -> Iterator[Callable[[], None]]:
    """Gives a function that raises a `KeyboardInterrupt` after the first Ctrl-C.

    Raised inside of JAX's compiler, it may crash Python at its end. A second Ctrl-C acts as usual.
    """
    before = signal.getsignal(signal.SIGINT)
    asked = False

    def ask(*_: object) -> None:
        nonlocal asked
        asked = True
        signal.signal(signal.SIGINT, before)

    def check() -> None:
        if asked:
            raise KeyboardInterrupt

    signal.signal(signal.SIGINT, ask)
    try:
        yield check
    finally:
        signal.signal(signal.SIGINT, before)


def _typed() -> str | None:
    """Gives the next line that is typed; None at the end of the input."""
    try:
        return input(_PROMPT)
    except EOFError:
        print()
        return None


def _say_if_empty(answer: str, what: str) -> None:
    if not answer.strip():
        _log.warning("%s is empty: the model ended it at once", what)
