"""A small RouteSAE to make pages of, and a browser that opens them without a network."""

import json
import os
import shutil
import subprocess
from collections import Counter
from html.parser import HTMLParser

import pytest
import torch

from sae_lens_route.config import routed_hook_name
from sae_lens_route.models.kinds import residual_hook_names
from sae_lens_route.saes import RouteTopKSAE, RouteTopKSAEConfig
from support.small import TINYLLAMA_WIDTH

BLOCKS = [3, 5, 6, 9, 11]
HOSTILE = "</script><script>document.title='broken'</script><b>&amp;"


def routed_sae(model, routing="hard", blocks=BLOCKS):
    """A random RouteSAE that routes tokens to all of its blocks."""
    torch.manual_seed(0)
    sae = RouteTopKSAE(
        RouteTopKSAEConfig(
            d_in=TINYLLAMA_WIDTH, d_sae=96, k=8, n_routed_layers=len(blocks), routing=routing
        )
    )
    sae.W_router.data.mul_(0.3)
    sae.W_dec.data.div_(sae.W_dec.data.norm(dim=-1, keepdim=True))
    metadata = sae.cfg.metadata
    metadata.hook_names = residual_hook_names(model, blocks)
    metadata.hook_name, metadata.routed_blocks = routed_hook_name(blocks[-1]), list(blocks)
    metadata.model_name, metadata.context_size, metadata.prepend_bos = "tiny", 48, True
    metadata.exclude_special_tokens = True
    return sae.eval()


class Page(HTMLParser):
    """The elements of a page, their ids, and the text of each script."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.ids, self.scripts, self.attributes = [], [], [], []
        self._in_script = False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes.append((tag, dict(attrs)))
        self.ids += [value for name, value in attrs if name == "id"]
        self._in_script = tag == "script"
        if self._in_script:
            self.scripts.append("")

    def handle_data(self, data):
        if self._in_script:
            self.scripts[-1] += data

    def handle_endtag(self, tag):
        self._in_script = False

    @property
    def root(self):
        """Attributes of the document's element, where the script reports."""
        return self.attributes[0][1]

    @property
    def classes(self):
        """How many elements have each class."""
        return Counter(name for _, a in self.attributes for name in (a.get("class") or "").split())

    @property
    def data(self):
        """The embedded numbers."""
        return json.loads(self.scripts[1])


CHROMIUM = next(
    (p for n in ("chromium", "chromium-browser", "google-chrome") if (p := shutil.which(n))), None
)


BROWSER_OPTIONS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    # a proxy that does not exist, so that every request of a page fails
    "--proxy-server=127.0.0.1:9",
    *("--enable-logging=stderr", "--v=0", "--virtual-time-budget=20000"),
    *("--window-size=1400,1200", "--dump-dom"),
]


in_browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium to open the page with")


def open_page(url, profile):
    """The document after its scripts ran, and the lines of the browser's console; no network."""
    profile.mkdir()
    done = subprocess.run(
        [CHROMIUM, *BROWSER_OPTIONS, f"--user-data-dir={profile}", url],
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=180,
        env={**os.environ, "HOME": str(profile)},
    )
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return done.stdout, console
