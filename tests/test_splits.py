"Splits: what shares something stays together, and the shares are kept."
import random
from collections import Counter
import pytest
from hypothesis import given, strategies as st
from medchat.core import MedchatError
from medchat.splits import bundle, deal, to_shares

specs = st.lists(st.tuples(st.none() | st.integers(0, 12), st.lists(st.integers(0, 25), max_size=2, unique=True), st.sampled_from(["vqa open", "vqa closed", "caption"])), min_size=1, max_size=60)

def ties(specs): return [(i, t) for i, (group, images, _) in enumerate(specs) for t in images + ([26 + group] if group is not None else [])]

@given(specs)
def test_bundles_agree_with_a_search(specs):
    "The same bundles as walking from row to row along shared things."
    labels, left, found = bundle(len(specs), ties(specs), 39), set(range(len(specs))), []
    things = {i: {t for j, t in ties(specs) if j == i} for i in left}
    while left:
        todo, inside = [left.pop()], set()
        while todo:
            i = todo.pop(); inside.add(i)
            near = {j for j in left if things[i] & things[j]}; left -= near; todo += near
        found.append(sorted(inside))
    mine = {}
    for i, l in enumerate(labels): mine.setdefault(l, []).append(i)
    assert sorted(found) == sorted(mine.values())

@given(specs, st.integers(0, 5))
def test_nothing_stands_in_two_splits(specs, seed):
    labels, strata = bundle(len(specs), ties(specs), 39), [(s,) for *_, s in specs]
    try: split_of = deal(labels, strata, range(len(specs)), seed)
    except MedchatError as e: assert len(set(labels)) < 3 and "too few groups" in str(e); return
    seen = {}
    for i, t in ties(specs): assert seen.setdefault(t, split_of[i]) == split_of[i]
    assert set(split_of) == {0, 1, 2}
    place = list(range(len(specs))); random.Random(seed).shuffle(place) # row i of the file stands at place[i] now
    moved = [None] * len(specs)
    for i, p in enumerate(place): moved[p] = specs[i]
    again = deal(bundle(len(specs), ties(moved), 39), [(s,) for *_, s in moved], place, seed) # the order of ids is the same
    assert [again[p] for p in place] == list(split_of)

@pytest.mark.parametrize("seed", range(8))
def test_shares_of_uneven_groups(seed):
    "300 groups of uneven size: 80/10/10 within one point, closed share within two."
    rng = random.Random(seed)
    group = [g for g in range(300) for _ in range(rng.randint(1, 23))]
    strata = [("closed",) if rng.random() < .6 else ("open",) for _ in group]
    split_of = deal(bundle(len(group), enumerate(group), 300), strata, range(len(group)), seed)
    closed = lambda rows: sum(strata[i] == ("closed",) for i in rows) / len(rows)
    for s, share in enumerate((.8, .1, .1)):
        inside = [i for i, x in enumerate(split_of) if x == s]
        assert abs(len(inside) / len(group) - share) < .01 and abs(closed(inside) - closed(range(len(group)))) < .02

def test_rare_findings_stand_in_every_split():
    "A finding of 40 rows in 2,000 is dealt out 32/4/4, whatever else the rows have."
    rng = random.Random(0)
    strata = [("report", *(["rare"] if i < 40 else []), *(["common"] if rng.random() < .5 else [])) for i in range(2000)]
    split_of = deal(bundle(2000, [], 0), strata, range(2000))
    assert Counter(split_of) == {0: 1600, 1: 200, 2: 200}
    assert all(abs(n - goal) <= 1 for n, goal in zip((sum(s == k for s in split_of[:40]) for k in range(3)), (32, 4, 4)))

@given(st.integers(3, 400), st.sampled_from(["80/20", "80/10/10", "70/0/30", "50/25/25", "90/5/5"]), st.integers(0, 3))
def test_rows_that_share_nothing_hit_the_shares(n, text, seed):
    shares = to_shares(text)
    got = Counter(deal(bundle(n, [], 0), [("caption",)] * n, range(n), seed, shares))
    if n * min(s for s in shares if s) >= 1: assert got[0] == int(n * shares[0] + 1e-9) and got[1] == int(n * shares[1] + 1e-9)
    assert sum(got.values()) == n and all(got[s] for s, share in enumerate(shares) if share)

def test_rocov2_of_the_report(): assert Counter(deal(bundle(22_836, [], 0), [("caption",)] * 22_836, range(22_836), 7, to_shares("80/20"))) == {0: 18_268, 2: 4_568}

def test_seed_matters():
    args = bundle(50, [], 0), [("a",)] * 50, range(50)
    assert deal(*args, 1) == deal(*args, 1) != deal(*args, 2)

@pytest.mark.parametrize("text", ["", "80", "80/30", "a/b", "-10/110", "0/50/50", "80/10/10/0", "nan/50/50", "80/10/9"])
def test_bad_shares(text):
    with pytest.raises(MedchatError, match="not the shares of a split"): to_shares(text)
