"""A language model as judge of features, behind an OpenAI-compatible endpoint (paper 3.4).

1. Sample: 100 interpretable features, with a seed.
2. Ask: one prompt per feature (`judge_prompt`), with a JSON schema of the answer where the endpoint
   takes one. Transient errors are retried.
3. Write and summarize the results (`judge_results`); an interrupted run resumes with the features
   that have none.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
import random
import sys
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from sae_lens_route.errors import UserError
from sae_lens_route.features.judge_prompt import (
    ANSWER_SCHEMA,
    MAX_CONTEXTS,
    Answer,
    MalformedAnswer,
    parse_answer,
    prompt,
)
from sae_lens_route.features.judge_results import (
    JudgeResult,
    JudgeSummary,
    ResultsFile,
    read_results,
    summarize,
)
from sae_lens_route.features.table import FeatureTable


class CostEstimate(NamedTuple):
    """Requests, tokens and cost of a run before it starts, at four characters per token.

    That is typical of English prose; code and most other languages have more tokens.
    """

    n_requests: int
    """Features without a result so far, retries not included."""
    prompt_tokens: int
    completion_tokens: int | None
    """Upper bound: the request's limit for every answer; None if the request sets no limit."""
    cost: float | None
    """Upper bound in the currency of the prices; None without prices or without a limit."""

    def __str__(self) -> str:
        completion = "?" if self.completion_tokens is None else f"{self.completion_tokens:,}"
        cost = "unknown" if self.cost is None else f"{self.cost:,.4f}"
        return (
            f"{self.n_requests:,} requests, about {self.prompt_tokens:,} prompt tokens "
            f"(4 characters each), at most {completion} completion tokens, cost {cost}"
        )


class JudgeRun(NamedTuple):
    """What `Judge.run` returns."""

    results: dict[int, JudgeResult]
    """By feature, in the order of the sample, without the failed ones."""
    failed: dict[int, str]
    """By feature, why there is no reply."""
    summary: JudgeSummary


# these fail for every feature: wrong key, no credit, no such model or address
_HOPELESS_STATUS = (401, 402, 404)

# an endpoint without structured outputs refuses the field with one of these
_REFUSED_STATUS = (400, 422)

_STRUCTURED: Mapping[str, Any] = {
    "response_format": {
        "type": "json_schema",
        "json_schema": {"name": "answer", "strict": True, "schema": ANSWER_SCHEMA},
    }
}

_TRANSIENT_STATUS = (408, 409, 425, 429)  # and every 5xx


@dataclass(frozen=True)
class Judge:
    """A language model behind an OpenAI-compatible endpoint.

    Args:
        model: Name of the model at the endpoint.
        base_url: The endpoint, such as "http://localhost:8000/v1". None means `OPENAI_BASE_URL`
            from the environment, or else OpenAI.
        api_key: None means `OPENAI_API_KEY` from the environment.
        concurrency: Features asked for at a time, including those that wait for a retry.
        max_attempts: Requests per feature before it counts as failed. Status 408, 409, 425, 429,
            5xx, timeouts, dropped connections and replies without a chat completion are retried.
        timeout: Limit of one request, in seconds.
        backoff: Seconds before the first retry, doubled for each further one and multiplied by a
            random number from 0.5 to 1. The server's `Retry-After` is added.
        max_wait: Longest wait for a retry, in seconds. A feature fails if the server asks for more.
        max_contexts: Contexts shown per feature, the strongest.
        structured: Whether to send the answer's JSON schema as `response_format`. An endpoint that
            refuses it with status 400 or 422 is asked without it from then on.
        request: Further fields of the request. The reference uses temperature 0.1 and 128 tokens;
            256 leave room for the explanation.
        prices: Of a million prompt tokens and of a million completion tokens, for the estimate.

    Raises:
        UserError: a setting is out of range, or `request` sets a field of the judge.
    """

    model: str
    base_url: str | None = None
    api_key: str | None = field(default=None, repr=False)
    concurrency: int = 8
    max_attempts: int = 6
    timeout: float = 60.0
    backoff: float = 0.5
    max_wait: float = 120.0
    max_contexts: int = MAX_CONTEXTS
    structured: bool = True
    request: Mapping[str, Any] = field(
        default_factory=lambda: {"temperature": 0.1, "max_tokens": 256}
    )
    prices: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        for name in ("concurrency", "max_attempts", "max_contexts"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)}: must be at least 1")
        if self.timeout <= 0:
            raise UserError(f"timeout={self.timeout}: must be above 0")
        for name in ("model", "messages", "stream", "n"):
            if name in self.request:
                raise UserError(f"request={{{name!r}: ...}}: the judge sets this field; remove it")

    def run(
        self, table: FeatureTable, path: str | Path, n_features: int = 100, seed: int = 0
    ) -> JudgeRun:
        """Score a sample of a table's features; each reply is appended to a JSONL file.

        Features with a result in the file are skipped. Cost estimate and progress go to standard
        error. Within a running event loop, as in a notebook, use `await judge.run_async(...)`.

        Args:
            table: Features and their contexts.
            path: The results file, new or of an interrupted run.
            n_features: Size of the sample.
            seed: Of the sample.

        Raises:
            UserError: the `openai` package or the API key is missing; the endpoint refuses the key,
                the model or the address; the file has replies to other prompts (another model,
                table or request); another process writes to it.
        """
        return asyncio.run(self.run_async(table, path, n_features, seed))

    async def run_async(
        self, table: FeatureTable, path: str | Path, n_features: int = 100, seed: int = 0
    ) -> JudgeRun:
        """`run` within a running event loop."""
        openai = _import_openai()
        sample = sample_features(table, n_features, seed)
        prompts = self._prompts(table, sample)
        failed: dict[int, str] = {}
        with ResultsFile(Path(path)) as file:
            self._require_same_requests(file.results, prompts, path)
            todo = [feature for feature in sample if feature not in file.results]
            tqdm.write(str(self._estimate([prompts[f] for f in todo])), file=sys.stderr)
            slots = asyncio.Semaphore(self.concurrency)
            schema = {} if "response_format" in self.request else dict(_STRUCTURED)
            schema = schema if self.structured else {}

            async def score(feature: int) -> None:
                async with slots:
                    reply = await self._ask(openai, client, feature, prompts[feature], schema)
                if isinstance(reply, JudgeResult):
                    file.append(reply)
                else:
                    failed[feature] = reply

            async with self._client(openai) as client:
                n_done = len(sample) - len(todo)
                with tqdm(total=len(sample), initial=n_done, desc="judge", unit="feature") as bar:
                    tasks = [asyncio.create_task(score(feature)) for feature in todo]
                    try:
                        for task in asyncio.as_completed(tasks):
                            await task
                            bar.update()
                    finally:
                        for task in tasks:
                            task.cancel()
                        await asyncio.gather(*tasks, return_exceptions=True)
            results = {f: file.results[f] for f in sample if f in file.results}
        return JudgeRun(results, failed, summarize(table, sample, results))

    def estimate(
        self, table: FeatureTable, path: Path | None = None, n_features: int = 100, seed: int = 0
    ) -> CostEstimate:
        """What `run` would cost, without the features that have a result in the file at `path`."""
        done = read_results(path) if path is not None and path.exists() else {}
        sample = sample_features(table, n_features, seed)
        return self._estimate(self._prompts(table, [f for f in sample if f not in done]).values())

    def _estimate(self, prompts: Iterable[str]) -> CostEstimate:
        lengths = [len(text) for text in prompts]
        prompt_tokens = sum(math.ceil(n / 4) for n in lengths)
        limit = self.request.get("max_completion_tokens", self.request.get("max_tokens"))
        completion_tokens = None if limit is None else len(lengths) * limit
        cost = None
        if self.prices is not None and completion_tokens is not None:
            per_prompt_token, per_completion_token = (price / 1e6 for price in self.prices)
            cost = prompt_tokens * per_prompt_token + completion_tokens * per_completion_token
        return CostEstimate(len(lengths), prompt_tokens, completion_tokens, cost)

    def _prompts(self, table: FeatureTable, features: Iterable[int]) -> dict[int, str]:
        return {f: prompt(table.contexts_of(f), self.max_contexts) for f in features}

    def _request_sha256(self, text: str) -> str:
        asked = {"model": self.model, "prompt": text, **self.request}
        return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()

    def _require_same_requests(
        self, results: Mapping[int, JudgeResult], prompts: Mapping[int, str], path: str | Path
    ) -> None:
        for feature, text in prompts.items():
            done = results.get(feature)
            if done is not None and done.request_sha256 != self._request_sha256(text):
                raise UserError(
                    f"{str(path)!r}: the result of feature {feature} is from {done.model!r} with "
                    "other contexts, wording or settings; choose another file"
                )

    def _client(self, openai: Any) -> Any:
        try:
            return openai.AsyncOpenAI(
                api_key=self.api_key,
                base_url=self.base_url,
                timeout=self.timeout,
                max_retries=0,  # `_ask` retries, counts attempts, and holds its slot while it waits
            )
        except openai.OpenAIError as error:
            raise UserError(
                "no API key: pass api_key or set OPENAI_API_KEY, to any text if the server does "
                "not check keys"
            ) from error

    async def _ask(
        self, openai: Any, client: Any, feature: int, text: str, schema: dict[str, Any]
    ) -> JudgeResult | str:
        """The result, or why there is none; empties `schema` if the endpoint refuses it."""
        problem = ""
        attempt = 0
        while attempt < self.max_attempts:
            attempt += 1
            asked_wait, with_schema = 0.0, dict(schema)
            try:
                reply = await asyncio.wait_for(
                    client.chat.completions.create(
                        model=self.model,
                        messages=[{"role": "user", "content": text}],
                        **with_schema,
                        **self.request,
                    ),
                    self.timeout,
                )
                return self._result(feature, text, reply, attempt)
            except openai.APIStatusError as error:
                status = error.status_code
                problem = f"status {status}: {error.message}"
                if status in _HOPELESS_STATUS or error.code == "insufficient_quota":
                    raise UserError(f"the endpoint answers every request with {problem}") from error
                if with_schema and status in _REFUSED_STATUS:
                    schema.clear()
                    attempt -= 1
                    continue
                if status < 500 and status not in _TRANSIENT_STATUS:
                    return problem
                asked_wait = _retry_after(error.response.headers)
                if asked_wait > self.max_wait:
                    return f"{problem} (to be retried after {asked_wait:.0f} s)"
            except (asyncio.TimeoutError, openai.APITimeoutError):
                problem = f"no reply within {self.timeout} s"
            except (openai.APIError, ValueError, LookupError, TypeError, AttributeError) as error:
                # a dropped connection, or a body that is no chat completion
                problem = f"{type(error).__name__}: {error}"
            if attempt < self.max_attempts:
                backoff = self.backoff * 2 ** (attempt - 1) * random.uniform(0.5, 1.0)
                await asyncio.sleep(min(asked_wait + backoff, self.max_wait))
        return problem

    def _result(self, feature: int, text: str, reply: Any, attempt: int) -> JudgeResult:
        content: str = reply.choices[0].message.content or ""
        usage = getattr(reply, "usage", None)
        fields: dict[str, Any] = dict.fromkeys(Answer._fields)
        with suppress(MalformedAnswer):
            fields = parse_answer(content)._asdict()
        return JudgeResult(
            feature=feature,
            status="malformed" if fields["score"] is None else "valid",
            **fields,
            reply=content,
            model=self.model,
            request_sha256=self._request_sha256(text),
            attempts=attempt,
            prompt_tokens=getattr(usage, "prompt_tokens", None),
            completion_tokens=getattr(usage, "completion_tokens", None),
        )


def _import_openai() -> Any:
    try:
        import openai
    except ImportError as error:
        raise UserError(
            "the judge needs the openai package: pip install 'sae-lens-route[interpret]'"
        ) from error
    return openai


def _retry_after(headers: Mapping[str, str]) -> float:
    """Seconds that a `Retry-After` header asks to wait; 0 without a valid one."""
    value = headers.get("retry-after", "")
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(value).timestamp() - time.time()
        except ValueError:
            return 0.0
    return max(0.0, seconds) if math.isfinite(seconds) else 0.0


def sample_features(table: FeatureTable, n_features: int = 100, seed: int = 0) -> list[int]:
    """Interpretable features drawn without replacement; all of them if there are fewer.

    A larger sample with the same seed begins with the smaller one, so a run can be extended.

    Raises:
        UserError: `n_features` is 0, or the table has no interpretable features.
    """
    if n_features < 1:
        raise UserError(f"n_features={n_features}: must be at least 1")
    if not table.interpretable:
        threshold = table.run.options.threshold
        raise UserError(f"threshold={threshold}: no feature is interpretable; lower it")
    order = np.random.default_rng(seed).permutation(sorted(table.interpretable))
    return [int(feature) for feature in order[:n_features]]
