"""A steering result for people: as text and as JSON."""

import json

import pytest
from support.steering import (
    EDITS,
    PROMPT,
)

from sae_lens_route.steering import (
    render,
    steer,
)

pytestmark = pytest.mark.usefixtures("no_gradients")


def test_a_result_as_text_and_as_json(small):
    model, sae = small()
    result = steer(model, sae, PROMPT, EDITS, max_new_tokens=5)
    as_json = json.loads(json.dumps(result.to_dict()))
    assert as_json["text"] == result.text and as_json["clean_text"] == result.clean_text
    edit = {"feature": 3, "mode": "set", "value": 6.0, "relative": False}
    assert as_json["edits"][0] == edit and as_json["units"] == "n(x)"
    assert len(as_json["tokens"]) == len(result.tokens)
    first = result.tokens[1]
    assert as_json["tokens"][1]["block"] == first.block
    assert as_json["tokens"][1]["relative_size"] == first.relative_size > 0

    result = result._replace(text="a\n" + "long line " * 9, clean_text="def f():\n\treturn")
    page = render(result, width=60)
    lines = page.splitlines()
    assert (
        "feature 3 set to 6; feature 70 plus -2.5; feature 11 times 3; feature 40 ablated" in page
    )
    start = next(i for i, line in enumerate(lines) if line.startswith("clean"))
    assert lines[start + 2].split("|")[0].strip() == "def f():"
    assert lines[start + 3].startswith("    return ")
    assert all(len(line) <= 60 for line in lines[start : start + 6])
    assert len(lines) > len(render(result, tokens=False).splitlines()) + len(result.tokens)
    assert '"<|begin_of_text|>"' in page and "units    n(x)" in page
    (row,) = [line for line in lines if line.startswith(f'"{first.token}"')]
    assert row.split()[4] == f"{first.relative_size:.2f}"
    assert (f"warning  {result.warning}" in lines) == (result.warning is not None)
