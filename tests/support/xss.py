"""Texts that run a script wherever a page takes text for something else, and pages made of them.

Each text, if it ran, would set an attribute of the document's element to its number. A page is
opened in a browser, and a user moves the mouse over everything, focuses and clicks it.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import torch

from sae_lens_route.features.judge_prompt import Answer
from support.pages import Page, open_page
from support.small import TINYLLAMA

_TEXTS = [
    "<script>RUN</script>",
    "</script><script>RUN</script>",
    "</ScRiPt ><sCrIpT>RUN</sCrIpT>",
    "<!--<script>RUN</script>-->",
    "--><script>RUN</script><!--",
    "]]><script>RUN</script>",
    "</title><script>RUN</script>",
    "</style><script>RUN</script>",
    "</textarea><script>RUN</script>",
    "</template></select></noscript><script>RUN</script>",
    "<img src=x onerror=RUN>",
    "<img src=x onerror='RUN'>",
    '"><img src=x onerror="RUN">',
    "'><img src=x onerror='RUN'>",
    "`><img src=x onerror=RUN>",
    "</script><img src=x onerror=RUN>",
    "<image src=x onerror=RUN>",
    "<svg onload=RUN>",
    "<svg/onload=RUN//",
    "<svg><script>RUN</script></svg>",
    "<svg><animate onbegin=RUN attributeName=x dur=1s>",
    "<svg><a xlink:href='javascript:RUN'><text x=20 y=20>x</text></a>",
    "<math><maction actiontype='statusline#' xlink:href='javascript:RUN'>x</maction></math>",
    "<body onload=RUN>",
    "<iframe src='javascript:parent.RUN'></iframe>",
    "<iframe srcdoc='<script>parent.RUN</script>'></iframe>",
    "<object data='javascript:RUN'></object>",
    "<embed src='javascript:RUN'>",
    "<details open ontoggle=RUN>x</details>",
    "<input autofocus onfocus=RUN>",
    "<select autofocus onfocus=RUN><option>x</select>",
    "<video><source onerror=RUN></video>",
    "<audio src=x onerror=RUN></audio>",
    "<marquee onstart=RUN>x</marquee>",
    "<style>@keyframes x{}</style><b style='animation-name:x' onanimationstart=RUN>x</b>",
    "<a href='javascript:RUN'>x</a>",
    "<a href='data:text/html,<script>parent.RUN</script>'>x</a>",
    "<form action='javascript:RUN'><button>x</button></form>",
    "<button formaction='javascript:RUN'>x</button>",
    "<b onmouseover=RUN onmouseenter=RUN onclick=RUN>x</b>",
    "<base href='javascript:/RUN//'><a href='/'>x</a>",
    "<meta http-equiv=refresh content='0;url=javascript:RUN'>",
    "<link rel=stylesheet href='javascript:RUN'>",
    "<table background='javascript:RUN'><td>x</td></table>",
    '" onmouseover="RUN" onfocus="RUN" x="',
    "' onmouseover='RUN' x='",
    " onmouseover=RUN x=",
    "javascript:RUN",
    "\\u003cimg src=x onerror=RUN\\u003e",
    "\\x3cscript\\x3eRUN\\x3c/script\\x3e",
    "&lt;img src=x onerror=RUN&gt;",
    "&#60;img src=x onerror=RUN&#62;",
    "&amp;lt;svg onload=RUN&amp;gt;",
    "%3Cscript%3ERUN%3C/script%3E",
    '";RUN;//',
    "';RUN;//",
    "`;RUN;//",
    "${RUN}",
    '\\";RUN;//',
    "\u2028RUN\u2029",
    "{{constructor.constructor('RUN')()}}",
    "{{DATA}}{{SCRIPT}}</script><script>RUN</script>",
    "$&$`$'</script><script>RUN</script>",
    "__proto__",
    "constructor",
    "<noscript><p title='</noscript><img src=x onerror=RUN>'>",
    "<mglyph><svg><mtext><textarea><path id='</textarea><img src=x onerror=RUN>'>",
    "<math><mtext><table><mglyph><style><!--</style>"
    "<img title='--&gt;&lt;img src=x onerror=RUN&gt;'>",
    "<a href='jav\tascript:RUN'>x</a>",
    "<img src=x onerror=RUN <b>",
    "<b\x0conmouseover=RUN>x",
    "\x00<script>RUN</script>",
    "<dialog open onclose=RUN><form method=dialog><button>x</button></form></dialog>",
    "<span style='font-size:1e9px;position:fixed;inset:0' onpointerover=RUN>x</span>",
    "<br><b>bold</b><sub>x</sub><extra></extra><a href='javascript:RUN'>%{y}</a>",
]
CORPUS = [
    text.replace("RUN", f"document.documentElement.dataset.ran='{i}'".replace("'", "&quot;"))
    if re.search(r"='[^']*RUN", text)
    else text.replace("RUN", f"document.documentElement.dataset.ran={i}")
    for i, text in enumerate(_TEXTS)
]

USER = """<script>
addEventListener("load", () => setTimeout(async () => {
  const wait = time => new Promise(done => setTimeout(done, time));
  const touch = () => {
    for (const node of [...document.body.querySelectorAll("*")].slice(0, 1500)) {
      for (const type of ["pointerover", "mouseover", "mouseenter", "mousemove", "focus"]) {
        node.dispatchEvent(new MouseEvent(type, {bubbles: true}));
      }
      const pressed = "a, button, summary, b, span, td, form *";
      if (!(node instanceof SVGElement) && node.matches(pressed)) {
        node.click();
      }
    }
  };
  touch();
  for (const select of document.querySelectorAll("select")) {
    for (const option of [...select.options].slice(0, 4)) {
      select.value = option.value;
      select.dispatchEvent(new Event("change", {bubbles: true}));
      await wait(20);
      touch();
    }
  }
  for (const input of document.querySelectorAll("input")) {
    input.value = "<";
    input.dispatchEvent(new Event("input", {bubbles: true}));
  }
  await wait(200);
  touch();
  document.documentElement.dataset.touched = "yes";
}, 800));
</script>"""


class Opened(NamedTuple):
    """What became of a page."""

    ran: str | None
    """Number of a text that ran, None if none did."""
    touched: bool
    """Whether the user came to the end."""
    elements: set[str]
    """Tags in the document that only the texts have."""
    console: list[str]


def opened_by_a_user(path: Path, profile: Path) -> Opened:
    """Open a page and touch everything in it."""
    touched = path.with_name(f"touched-{path.name}")
    content = path.read_text(encoding="utf-8")
    end = content.rfind("</body>")
    content = content + USER if end < 0 else content[:end] + USER + content[end:]
    touched.write_text(content, encoding="utf-8")
    dom, console = open_page(touched.as_uri(), profile)
    page = Page(dom)
    foreign = {"img", "iframe", "object", "embed", "video", "audio", "marquee", "dialog"}
    return Opened(
        page.root.get("data-ran"),
        page.root.get("data-touched") == "yes",
        foreign & set(page.tags),
        console,
    )


def opened_alone(path: Path, profile: Path) -> Opened:
    """Open an SVG file, in which there is nothing to touch."""
    dom, console = open_page(path.as_uri(), profile)
    return Opened(Page(dom).root.get("data-ran"), dom.startswith("<"), set(), console)


def texts_that_run(folder: Path) -> int:
    """How many texts run by themselves where they are taken for HTML, an attribute or a script."""
    places = ("<p>{}</p>", '<p title="{}">x</p>', "<script>let x = '{}';</script>")
    frames = [
        f'<iframe data-text="{i}" srcdoc="{escape(place.format(text))}"></iframe>'
        for i, text in enumerate(CORPUS)
        for place in places
    ]
    count = """<script>addEventListener("load", () => setTimeout(() => {
        const ran = [...document.querySelectorAll("iframe")].filter(frame =>
            frame.contentDocument?.documentElement.dataset.ran === frame.dataset.text);
        document.documentElement.dataset.live = new Set(ran.map(f => f.dataset.text)).size;
    }, 3000))</script>"""
    page = folder / "control.html"
    page.write_text(f"<!DOCTYPE html><meta charset=utf-8><body>{''.join(frames)}{count}</body>")
    dom, _ = open_page(page.as_uri(), folder / "control")
    return int(Page(dom).root["data-live"])


# --- where texts come from -----------------------------------------------------------------------


def hostile_tokenizer_folder(folder: Path) -> Path:
    """The tiny Llama with a vocabulary of these texts, as its tokenizer decodes them."""
    shutil.copytree(TINYLLAMA, folder)
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text())
    spelled = _byte_letters()
    special = {token["id"] for token in content["added_tokens"]}
    by_id = {i: token for token, i in content["model"]["vocab"].items()}
    for i in by_id:
        if i not in special:
            text = f"{CORPUS[i % len(CORPUS)]}{i // len(CORPUS) or ''}"
            by_id[i] = "".join(spelled[byte] for byte in text.encode())
    content["model"]["vocab"] = {token: i for i, token in by_id.items()}
    content["model"]["merges"] = []
    file.write_text(json.dumps(content))
    return folder


def _byte_letters() -> dict[int, str]:
    """The letters by which byte-level tokenizers spell bytes."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return {b: chr(b) for b in plain} | {b: chr(256 + i) for i, b in enumerate(others)}


def hostile_answers(features: list[int]) -> dict[int, Any]:
    """A judge's answers to features, in these texts."""
    return {
        feature: Answer(CORPUS[i % len(CORPUS)], 3, " ".join(CORPUS[i % len(CORPUS) :]))
        for i, feature in enumerate(features)
    }


def with_hostile_texts(value: Any, replace: Callable[[], str]) -> Any:
    """JSON-like data with every text in it replaced."""
    if isinstance(value, str):
        return replace()
    if isinstance(value, list):
        return [with_hostile_texts(each, replace) for each in value]
    if isinstance(value, dict):
        return {key: with_hostile_texts(each, replace) for key, each in value.items()}
    return value


def every_token(context_size: int = 48) -> torch.Tensor:
    """Token ids that hold every text, in rows."""
    ids = torch.arange(2, 512).repeat(3)
    return ids[: len(ids) // context_size * context_size].view(-1, context_size)
