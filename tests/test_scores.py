"""Scores of texts: agreement with the reference implementations, hand-worked examples, properties."""
import math, random
import pytest
from hypothesis import given, settings, strategies as st
from medchat.core import MedchatError
from medchat.findings import FINDINGS, find_findings
from medchat.metrics import normalise_answer
from medchat.scores import bleu, cider, exact_match, finding_scores, meteor_exact_stem, rouge, token_scores

WORDS = "the heart is enlarged no left right pleural effusion effusions nodule in upper lung clear of lungs".split()
text = st.lists(st.sampled_from(WORDS), max_size=14).map(" ".join)
some = st.lists(st.sampled_from(WORDS), min_size=1, max_size=14).map(" ".join)
pairs = st.lists(st.tuples(text, some), min_size=1, max_size=8)
REPORTS = ["The heart is enlarged.", "Small left pleural effusion.", "No pneumothorax.", "There may be pneumonia.", "The lungs are clear.", "A nodule in the right upper lobe.", "Pulmonary edema.", "No acute disease."]
report = st.lists(st.sampled_from(REPORTS), min_size=1, max_size=4).map(" ".join)

def close(a, b): assert a == pytest.approx(b, abs=1e-9), (a, b)
def columns(rows): return [a for a, _ in rows], [b for _, b in rows]
tokens = lambda t: normalise_answer(t).split()

# -- agreement with the reference implementations

@settings(max_examples=60, deadline=None)
@given(pairs)
def test_bleu_agrees_with_sacrebleu(rows):
    from sacrebleu.metrics import BLEU
    replies, references = columns(rows)
    plain = lambda texts: [" ".join(tokens(t)) for t in texts]
    for n, ours in enumerate(bleu(replies, references).values(), 1):
        assert ours == pytest.approx(BLEU(tokenize="none", smooth_method="none", max_ngram_order=n).corpus_score(plain(replies), [plain(references)]).score/100, abs=1e-9)

four = st.lists(st.sampled_from([w for w in WORDS if w != "the"]), min_size=4, max_size=14).map(" ".join) # nltk counts one pair in a reply of one word

@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(four, some), min_size=1, max_size=8))
def test_bleu_agrees_with_nltk(rows):
    import warnings
    from nltk.translate.bleu_score import corpus_bleu
    replies, references = columns(rows)
    ours = bleu(replies, references)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore") # of orders without a match, which nltk gives the tiniest number there is
        for n in (1, 2, 3, 4): assert ours[f"bleu_{n}"] == pytest.approx(corpus_bleu([[tokens(r)] for r in references], [tokens(r) for r in replies], weights=[1/n]*n), abs=1e-6)

@settings(max_examples=100, deadline=None)
@given(text, text)
def test_rouge_agrees_with_rouge_score(reply, reference):
    from rouge_score.rouge_scorer import RougeScorer
    class Tokens:
        def tokenize(self, t): return tokens(t)
    theirs = RougeScorer(["rouge1", "rouge2", "rougeL"], tokenizer=Tokens()).score(reference, reply)
    ours = rouge(reply, reference)
    for name, key in (("rouge_1", "rouge1"), ("rouge_2", "rouge2"), ("rouge_l", "rougeL")): close(ours[name], theirs[key].fmeasure)

@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(report, report), min_size=1, max_size=8))
def test_findings_agree_with_scikit_learn(rows):
    from sklearn.metrics import precision_recall_fscore_support
    replies, references = columns(rows)
    table = lambda texts: [[int(find_findings(t).get(f, "absent") != "absent") for f in FINDINGS] for t in texts]
    said, wanted = table(replies), table(references)
    ours = finding_scores(replies, references)
    close(ours["micro"], precision_recall_fscore_support(wanted, said, average="micro", zero_division=0)[2])
    asked = [k for k in range(len(FINDINGS)) if any(row[k] for row in wanted)]
    close(ours["macro"], precision_recall_fscore_support(wanted, said, labels=asked, average="macro", zero_division=0)[2] if asked else 0.)
    each = precision_recall_fscore_support(wanted, said, average=None, zero_division=0)
    for k, finding in enumerate(FINDINGS):
        if finding in ours["by_finding"]: close([ours["by_finding"][finding][n] or 0. for n in ("precision", "recall", "f1")], [each[i][k] for i in range(3)])

def test_cider_by_hand():
    "Each word stands in one of two references: it weighs ln 2. Of 'clear lung' and 'clear' the words share a cosine of 1/sqrt(2), the pairs nothing; one word too many costs exp(-1/72)."
    scores = cider(["left lung", "clear lung"], ["left lung", "clear"])
    close(scores, [10*(1 + 1 + 0 + 0)/4, 10/math.sqrt(2)/4*math.exp(-1/72)])

def test_cider_by_another_way():
    "Vectors over all n-grams with numpy, as the formula has it."
    import numpy as np
    rng = random.Random(0)
    replies, references = ([" ".join(rng.choices(WORDS, k=rng.randint(1, 12))) for _ in range(30)] for _ in range(2))
    grams = lambda words, n: [tuple(words[i:i + n]) for i in range(len(words) - n + 1)]
    total = np.zeros(30)
    for n in (1, 2, 3, 4):
        names = sorted({g for t in replies + references for g in grams(tokens(t), n)})
        count = lambda texts: np.array([[grams(tokens(t), n).count(g) for g in names] for t in texts], float).reshape(30, len(names))
        a, b = count(replies), count(references)
        idf = np.log(30 / np.maximum(1, (b > 0).sum(0)))
        a, b = a*idf, b*idf
        down = np.linalg.norm(a, axis=1)*np.linalg.norm(b, axis=1)
        total += np.divide((np.minimum(a, b)*b).sum(1), down, out=np.zeros(30), where=down > 0)
    gap = np.array([len(tokens(a)) - len(tokens(b)) for a, b in zip(replies, references)])
    np.testing.assert_allclose(cider(replies, references), 10*total/4*np.exp(-gap**2/72), atol=1e-9)

# -- by hand

def test_token_scores_by_hand():
    eq = lambda reply, reference, *wanted: close(list(token_scores(reply, reference)), list(wanted))
    eq("left lung", "the left lung", 1, 1, 1)
    eq("a nodule in the left lung", "left lung", .5, 1, 2/3) # 4 words without articles, 2 of them wanted
    eq("lung", "left lung", 1, .5, 2/3)
    eq("left left", "left lung", .5, .5, .5) # a word counts as often as both have it
    eq("", "left", 0, 0, 0); eq("", "", 1, 1, 1); eq("the", "", 1, 1, 1)

def test_precision_and_recall_are_not_swapped():
    "MedEvalKit divides by the other text's words."
    long, brief = "a small nodule in the left upper lung", "nodule"
    precision, recall, _ = token_scores(long, brief)
    assert precision < recall == 1
    precision, recall, _ = token_scores(brief, long)
    assert recall < precision == 1
    two = finding_scores(["Pneumonia. Fracture.", "Pneumonia."], ["Pneumonia.", "No pneumonia."])["by_finding"]["Pneumonia"]
    assert (two["precision"], two["recall"], two["said"], two["n"]) == (.5, 1, 2, 1)

def test_words_of_languages_without_blanks():
    assert exact_match("左侧。", "左侧") and not exact_match("左侧", "右侧")
    close(token_scores("左侧肺", "左侧")[0], 2/3)
    close(rouge("左侧肺", "右侧肺")["rouge_1"], 2/3)
    assert tokens("CT显示肺炎X光") == ["ct", "显", "示", "肺", "炎", "x", "光"]
    assert tokens("ปอดขวา") != ["ปอดขวา"] and "".join(tokens("ปอดขวา")) == "ปอดขวา" # a vowel stays with its consonant
    assert tokens("폐 결절") == ["폐", "결절"] # Korean has blanks

def test_meteor_knows_stems_and_order():
    assert meteor_exact_stem("pleural effusions", "pleural effusion") == meteor_exact_stem("pleural effusion", "pleural effusion")
    assert meteor_exact_stem("effusion pleural left", "left pleural effusion") < meteor_exact_stem("left pleural effusion", "left pleural effusion")
    close(meteor_exact_stem("left lung", "left lung"), 1 - .5*(1/2)**3) # one piece of two words: penalty 0.5 (1/2)^3
    close(meteor_exact_stem("lung", "left lung"), 1*.5/(.9*1 + .1*.5) * (1 - .5*1)) # P 1, R 1/2; one piece of one word

def test_an_opposite_report_is_told_from_a_right_one_only_by_its_findings():
    right = "The heart is enlarged. There is a left pleural effusion. No pneumothorax."
    opposite = "The heart is not enlarged. There is no left pleural effusion. Pneumothorax."
    assert rouge(opposite, right)["rouge_1"] > .9 and bleu([opposite], [right])["bleu_1"] > .8
    assert finding_scores([opposite], [right])["micro"] == 0

def test_uncertain_counts_as_said():
    assert finding_scores(["Possible pneumonia."], ["Pneumonia."])["micro"] == 1
    assert finding_scores(["No pneumonia."], ["Pneumonia."])["micro"] == 0

# -- properties

@settings(max_examples=80, deadline=None)
@given(text, text)
def test_ranges_and_symmetry(a, b):
    for value in (*token_scores(a, b), *rouge(a, b).values(), meteor_exact_stem(a, b)): assert 0 <= value <= 1
    close(token_scores(a, b)[2], token_scores(b, a)[2])
    close(token_scores(a, b)[0], token_scores(b, a)[1])
    close(list(rouge(a, b).values()), list(rouge(b, a).values()))
    assert exact_match(a, a) and exact_match(a, b) == exact_match(b, a)
    if exact_match(a, b): close(list(token_scores(a, b)), [1, 1, 1])

@settings(max_examples=30, deadline=None)
@given(pairs, st.integers(0, 99))
def test_the_order_of_the_rows_does_not_matter(rows, seed):
    mixed = random.Random(seed).sample(rows, len(rows))
    close(list(bleu(*columns(rows)).values()), list(bleu(*columns(mixed)).values()))
    close(sorted(cider(*columns(rows))), sorted(cider(*columns(mixed))))
    assert all(-1e-9 <= s <= 10 + 1e-9 for s in cider(*columns(rows)))
    assert finding_scores(*columns(rows)) == finding_scores(*columns(mixed))

@pytest.mark.parametrize("score", [bleu, cider, finding_scores])
def test_bad_input(score):
    with pytest.raises(MedchatError, match=r"one reference for each reply: \[1, 2\]"): score(["a"], ["a", "b"])
    with pytest.raises(MedchatError, match="nothing to score"): score([], [])
