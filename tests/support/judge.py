"""A judge's endpoint on loopback, and answers to ask it for."""

import json
import re
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from hypothesis import strategies as st

from sae_lens_route.features.judge import Judge
from sae_lens_route.features.judge_prompt import CATEGORIES, Answer


def good_answer(feature):
    return Answer(CATEGORIES[feature % 3], feature % 5 + 1, f"about {feature}")


def scripted_judge(prompt):
    """A judge that counts: the more of the places share a token, the better the feature."""
    places = [
        json.loads(line) for line in prompt.split("Places, the strongest first:\n")[1].split("\n")
    ]
    assert all("<ACTIVATED>" in place["context"] for place in places)
    (token, most), *_ = Counter(place["token"].strip().lower() for place in places).most_common(1)
    score = 1 + round(4 * (most - 1) / max(1, len(places) - 1))
    return Answer("low-level" if score > 2 else "undiscernible", score, f"mostly {token!r}")


def as_text(answer):
    return json.dumps(answer._asdict())


class Endpoint(ThreadingHTTPServer):
    """An OpenAI-compatible server. `behave(feature, nth)` says what the nth request gets.

    The value is a text, or a function that answers through the request handler. With `read_prompt`
    the answer is a function of the prompt alone, as a model's.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.behave = lambda feature, nth: as_text(good_answer(feature))
        self.read_prompt = None
        self.lock = threading.Lock()
        self.asked = []  # (feature, time), in the order of arrival
        self.bodies = []
        self.under_way = self.most_under_way = 0
        self.url = f"http://127.0.0.1:{self.server_port}/v1"

    def handle_error(self, request, client_address):
        pass  # a killed client hangs up

    def times(self, feature):
        return [at for f, at in self.asked if f == feature]

    def counts(self):
        return Counter(feature for feature, _ in self.asked)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Endpoint

    def log_message(self, *args):
        pass

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server, prompt = self.server, body["messages"][0]["content"]
        if server.read_prompt is not None:
            return self.reply(200, completion(as_text(server.read_prompt(prompt))))
        feature = int(re.findall(r"feature-(\d+)", prompt)[0])
        with server.lock:
            server.asked.append((feature, time.monotonic()))
            server.bodies.append((self.path, self.headers["Authorization"], body))
            nth = len(server.times(feature))
            server.under_way += 1
            server.most_under_way = max(server.most_under_way, server.under_way)
        try:
            action = server.behave(feature, nth)
        finally:
            with server.lock:
                server.under_way -= 1
        if callable(action):
            return action(self)
        return self.reply(200, completion(action))

    def reply(self, status, content, content_type="application/json", headers=()):
        data = content.encode() if isinstance(content, str) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(data)))
        for name, value in headers:
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)


def completion(text):
    return {
        "id": "1",
        "object": "chat.completion",
        "created": 0,
        "model": "tiny",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": text},
                "finish_reason": "stop",
            }
        ],
        "usage": {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10},
    }


def status(code, headers=(), error_code=None):
    error = {"error": {"message": "no", "type": "x", "param": None, "code": error_code}}
    return lambda handler: handler.reply(code, error, headers=headers)


def drop(handler):
    handler.close_connection = True
    handler.connection.shutdown(2)


def drop_within_the_body(handler):
    handler.send_response(200)
    handler.send_header("Content-Type", "application/json")
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"id": "1", ')
    handler.wfile.flush()
    drop(handler)


def web_page(handler):
    handler.reply(200, "<html>busy</html>", "text/html")


def broken_json(handler):
    handler.reply(200, '{"id": ')


def judge_of(endpoint, **changes):
    return Judge(
        **{"model": "tiny", "base_url": endpoint.url, "api_key": "k", "backoff": 0.02, **changes}
    )


answer_strategy = st.builds(
    Answer,
    st.sampled_from(CATEGORIES),
    st.integers(1, 5),
    st.text(min_size=1).filter(lambda text: text.strip() != ""),
)
