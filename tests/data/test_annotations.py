"""Readers of gold annotations: treebanks, and datasets with columns of labels."""

import pytest
from datasets import ClassLabel, Dataset, Features, Sequence, Value

from sae_lens_route.data.annotations import labelled_rows, read_conllu
from sae_lens_route.errors import UserError

TREEBANK = """\
# newdoc id = weblog-example.com_1
# global.columns = ID FORM LEMMA UPOS XPOS FEATS HEAD DEPREL DEPS MISC
# sent_id = 1
# newpar id = weblog-example.com_1-p1
# text = "I don't," Said 😀 (twice).
1 " " PUNCT `` _ 3 punct _ SpaceAfter=No
2 I I PRON PRP Case=Nom|Number=Sing 3 nsubj _ _
3-4 don't _ _ _ _ _ _ _ SpaceAfter=No|Other=Yes
3 do do AUX VBP VerbForm=Fin 6 aux _ _
4 n't not PART RB Polarity=Neg 3 advmod _ _
5 , , PUNCT , _ 3 punct _ SpaceAfter=No
5.1 said say VERB VBD _ _ _ 0:root CopyOf=7
6 " " PUNCT '' _ 3 punct _ _
7 Said SAY VERB VBD Tense=Past 0 root _ _
8 😀 😀 SYM NFP _ 7 nsubj:pass _ _
9 ( ( PUNCT -LRB- _ 10 punct _ SpaceAfter=No
10 twice _ ADV RB _ 7 advmod _ SpaceAfter=No
11 ) ) PUNCT -RRB- _ 10 punct _ SpaceAfter=No
12 . . PUNCT . _ 7 punct _ _

# sent_id = 2
# text = Gonna go al cine
1-2 Gonna _ _ _ _ _ _ _ _
1 Gon go VERB VBG _ 0 root _ _
2 na to PART TO _ 3 mark _ _
3 go go VERB VB _ 1 xcomp _ _
4-5 al _ _ _ _ _ _ _ _
4 a a ADP _ _ 6 case _ _
5 el el DET _ Definite=Def 6 det _ _
6 cine cine NOUN _ _ 3 obl _ SpaceAfter=No

# newpar
# text = _ ok
1 _ _ SYM NFP _ 0 root _ _
2 ok ok INTJ UH _ 1 dep _ _

# newdoc
# text = New
1 New new ADJ JJ _ 0 root _ _
"""


def write_treebank(folder, text=TREEBANK, name="bank.conllu"):
    """Columns are separated by spaces in this file, so that it can be read."""
    lines = [line if line.startswith("#") else "\t".join(line.split()) for line in text.split("\n")]
    path = folder / name
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


@pytest.fixture
def treebank(tmp_path):
    return read_conllu(write_treebank(tmp_path))


def words_of(document):
    """Text and names of the concepts of each span."""
    return [
        (document.text[start:end], {concept.name for concept in concepts})
        for start, end, concepts in document.spans
    ]


def test_the_text_is_rebuilt_as_the_treebank_says(treebank):
    texts = [line.removeprefix("# text = ") for line in TREEBANK.split("\n") if "# text" in line]
    first, second, third, fourth = texts
    assert [document.text for document in treebank] == [f"{first} {second}\n\n{third}", fourth]


def test_a_document_is_named_by_its_id_or_its_file(treebank):
    assert [document.name for document in treebank] == ["weblog-example.com_1", "bank.2"]


def test_every_word_has_its_characters_and_concepts(treebank):
    words = words_of(treebank[0])
    assert all("genre=weblog" in concepts for _, concepts in words)
    forms = '" I do n\'t , " Said 😀 ( twice ) . Gon na go al al cine _ ok'
    assert " ".join(form for form, _ in words) == forms
    concepts = {form: found - {"genre=weblog"} for form, found in words}
    assert concepts["I"] == {"lemma=i", "Case=Nom", "Number=Sing", "upos=PRON", "deprel=nsubj"}
    assert concepts["n't"] == {"lemma=not", "Polarity=Neg", "upos=PART", "deprel=advmod"}
    assert concepts["Said"] == {"lemma=say", "Tense=Past", "upos=VERB", "deprel=root"}
    assert concepts["😀"] == {"lemma=😀", "upos=SYM", "deprel=nsubj:pass"}
    assert concepts["twice"] == {"upos=ADV", "deprel=advmod"}, "an underscore is no lemma"
    assert "lemma=_" in concepts["_"], "unless the form is an underscore, too"
    assert [found & {"lemma=a", "lemma=el"} for form, found in words if form == "al"] == [
        {"lemma=a"},
        {"lemma=el"},
    ]


def test_a_concept_has_the_level_of_its_column(treebank):
    levels = {concept.name: concept.level for d in treebank for s in d.spans for concept in s[2]}
    assert levels["lemma=i"] == "word"
    assert levels["Case=Nom"] == "morphology"
    assert levels["upos=PRON"] == "part of speech"
    assert levels["deprel=nsubj:pass"] == "syntax"
    assert levels["genre=weblog"] == "document"


def test_a_name_without_a_hyphen_has_no_genre(treebank):
    assert words_of(treebank[1]) == [("New", {"lemma=new", "upos=ADJ", "deprel=root"})]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1 a a NOUN _ _ 0 root _", r"bank.conllu, line 1: 9 columns instead of the ten"),
        ("1-3 ab _ _ _ _ _ _ _ _\n1 a a X _ _ 0 root _ _\n", "up to line 2: the token id '1-3'"),
        ("1 a a X _ _ 0 root _ _\n1 b b X _ _ 0 root _ _", "up to line 2: two words have the same"),
        ("one a a NOUN _ _ 0 root _ _", "the token id 'one' names no word"),
        ("# newdoc id = empty\n", "holds no sentence"),
    ],
)
def test_a_file_in_another_format_is_an_error(tmp_path, text, message):
    with pytest.raises(UserError, match=message):
        read_conllu(write_treebank(tmp_path, text))


def test_a_missing_file_is_an_error(tmp_path):
    with pytest.raises(UserError, match=r"none\.conllu: cannot be read"):
        read_conllu(tmp_path / "none.conllu")


def test_labels_of_words_are_concepts_of_the_level_of_their_column():
    rows = {
        "tokens": [["Anna", "flew", "home"], ["Yes"]],
        "pos": [["NOUN", "VERB", "ADV"], ["INTJ"]],
        "ner": [[1, 0, None], [None]],
        "topic": ["travel", None],
    }
    words, tags = Sequence(Value("string")), Sequence(ClassLabel(names=["O", "PER"]))
    features = Features({"tokens": words, "pos": words, "ner": tags, "topic": Value("string")})
    dataset = Dataset.from_dict(rows, features=features)
    first, second = labelled_rows(dataset, ["pos", "ner", "topic"])
    assert first.text == "Anna flew home" and (first.name, second.name) == ("0", "1")
    assert words_of(first) == [
        ("Anna", {"pos=NOUN", "ner=PER", "topic=travel"}),
        ("flew", {"pos=VERB", "ner=O", "topic=travel"}),
        ("home", {"pos=ADV", "topic=travel"}),
    ]
    assert {concept.level for span in first.spans for concept in span.concepts} == {
        "pos",
        "ner",
        "topic",
    }
    assert words_of(second) == [("Yes", {"pos=INTJ"})]
    assert words_of(labelled_rows(dataset, ["ner"])[1]) == [], "no label, no annotation"


def test_the_label_of_a_text_stands_at_all_its_words():
    dataset = Dataset.from_dict({"text": ["So  good!", "bad"], "label": [1, 0]})
    documents = labelled_rows(dataset, ["label"], column="text")
    assert words_of(documents[0]) == [("So", {"label=1"}), ("good!", {"label=1"})]
    assert words_of(documents[1]) == [("bad", {"label=0"})]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({"tokens": [["a"], ["b", "c"]], "pos": [["X"], ["X"]]}, "row 1: 1 labels in 'pos', 2 wor"),
        ({"tokens": [["a"], None], "pos": [["X"], ["X"]]}, "row 1: column 'tokens' holds neither"),
        ({"tokens": [["a"]], "tag": [["X"]]}, "no column 'pos': the dataset has"),
    ],
)
def test_rows_that_do_not_fit_are_an_error(rows, message):
    with pytest.raises(UserError, match=message):
        labelled_rows(Dataset.from_dict(rows), ["pos"])
