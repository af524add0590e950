"""Who is asked: an engine in this process, or a server that speaks OpenAI's completions."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPException
from typing import TYPE_CHECKING, Any, Protocol

from lockstep.core.errors import ConfigError, EngineDead
from lockstep.core.sampling import SamplingParams

if TYPE_CHECKING:
    from lockstep.engine.llm import LLM

SILENCE_TIMEOUT_S = 1800.0
"""A whole answer that is not there after so long has failed."""
_PROBE_TIMEOUT_S = 30.0


@dataclass(frozen=True, slots=True)
class Reply:
    """The text of one answer. `cut` says that it ended because it was as long as allowed."""

    text: str
    cut: bool


class Respondent(Protocol):
    """Continues prompts, each token the likeliest. Called from many threads at once."""

    name: str

    def ask(self, prompt: str, *, max_tokens: int, stop: str) -> Reply:
        """Raises LockstepError when there is no whole answer."""
        ...


class EngineRespondent:
    """The engine in this process. Threads that ask together share its steps."""

    def __init__(self, llm: LLM) -> None:
        self._llm = llm
        self.name = llm.card.name

    def ask(self, prompt: str, *, max_tokens: int, stop: str) -> Reply:
        """See Respondent."""
        params = SamplingParams(temperature=0.0, max_tokens=max_tokens, stop=(stop,))
        completion = self._llm.generate([prompt], params)[0]
        return Reply(completion.text, completion.finish_reason == "length")


class ServerRespondent:
    """The model called `model` (None: the first) of the server at `url`, with or without its "/v1".

    Raises ConfigError when nobody answers there, the key is refused or no such model is served.
    """

    def __init__(self, url: str, *, model: str | None = None, api_key: str | None = None) -> None:
        self._url = url.rstrip("/").removesuffix("/v1") + "/v1"
        self._headers = {"Content-Type": "application/json"}
        if api_key is not None:
            self._headers["Authorization"] = f"Bearer {api_key}"
        # A proxy of the environment stands between machines, not between a test and its server.
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        self.name = self._served(model)

    def ask(self, prompt: str, *, max_tokens: int, stop: str) -> Reply:
        """See Respondent. Raises EngineDead with the server's own words."""
        body = {
            "model": self.name,
            "prompt": prompt,
            "max_tokens": max_tokens,
            "temperature": 0,
            "stop": [stop],
        }
        try:
            choice = self._exchange("/completions", SILENCE_TIMEOUT_S, body)["choices"][0]
            return Reply(choice["text"], choice["finish_reason"] == "length")
        except (OSError, HTTPException, ValueError) as error:
            raise EngineDead(f"{self._url} did not answer a question: {_words(error)}") from None
        except (KeyError, IndexError, TypeError) as error:
            raise EngineDead(f"{self._url} sent no completion: {type(error).__name__} {error}") from None

    def _served(self, wanted: str | None) -> str:
        try:
            listed = self._exchange("/models", _PROBE_TIMEOUT_S)["data"]
            names = [str(entry["id"]) for entry in listed]
        except (OSError, HTTPException, ValueError) as error:
            raise ConfigError(f"no OpenAI-compatible server answers at {self._url}: {_words(error)}") from None
        except (KeyError, TypeError):
            raise ConfigError(f"{self._url}/models is no list of models: is this the right address?") from None
        if not names or wanted not in (None, *names):
            raise ConfigError(
                f"{self._url} serves no model {wanted or ''}".rstrip() + f" (it serves: {', '.join(names)})"
            )
        return wanted or names[0]

    def _exchange(self, path: str, timeout_s: float, body: Mapping[str, Any] | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self._url + path, data, self._headers)
        with self._opener.open(request, timeout=timeout_s) as response:
            return json.load(response)


def ask_all(
    respondent: Respondent, prompts: Sequence[str], *, concurrency: int, max_tokens: int, stop: str
) -> Iterator[tuple[int, Reply]]:
    """(index of the prompt, reply) as they come, `concurrency` of them under way at once.

    Raises the first failure at once: a question without an answer is neither right nor wrong.
    """
    with _threads(concurrency) as threads:
        waiting: dict[Future[Reply], int] = {
            threads.submit(respondent.ask, prompt, max_tokens=max_tokens, stop=stop): index
            for index, prompt in enumerate(prompts)
        }
        while waiting:
            for done in wait(waiting, return_when=FIRST_COMPLETED).done:
                yield waiting.pop(done), done.result()


@contextmanager
def _threads(count: int) -> Iterator[ThreadPoolExecutor]:
    """Threads that, when left in the middle, begin nothing more."""
    executor = ThreadPoolExecutor(count)
    try:
        yield executor
    finally:
        executor.shutdown(cancel_futures=True)


def _words(error: Exception) -> str:
    """What went wrong, with what the server said about it."""
    if not isinstance(error, urllib.error.HTTPError):
        return str(error) or type(error).__name__
    with error:
        said = error.read().decode(errors="replace").strip()
    hint = "; set LOCKSTEP_API_KEY" if error.code == 401 else ""
    return f"status {error.code}: {said[:200]}{hint}"
